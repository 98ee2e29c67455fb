"""Operations that move elements about: the same is done to the label, or to the indices of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lightning_ecopt.symmetry.labels import (
    GROUND,
    ZERO,
    IntArray,
    ParameterView,
    Value,
    align,
    compress,
    constant,
    map_value,
    reshape,
    stretch,
)
from lightning_ecopt.symmetry.rules.registry import Call, is_inexact, rule

View = Callable[[Call, IntArray], IntArray | list[IntArray]]


def view(*names: str) -> Callable[[View], View]:
    """Register a rule that acts alike on labels and on the index arrays of a parameter."""

    def register(function: View) -> View:
        @rule(*names)
        def moved(call: Call) -> Value | Sequence[Value]:
            value = call.value("self")
            if not isinstance(value, ParameterView):
                return function(call, value)
            parts = [function(call, axis) for axis in value.axes]
            if isinstance(parts[0] if parts else None, list):
                return [ParameterView(value.name, tuple(part)) for part in zip(*parts, strict=True)]
            return ParameterView(value.name, tuple(parts))  # type: ignore[arg-type]

        return function

    return register


@view("_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze")
def reshaped(call: Call, ids: IntArray) -> IntArray:
    return reshape(ids, call.shape("self"), call.output.shape)


@rule("view")
def viewed(call: Call) -> Value:
    """As another shape; or as another type, which makes other elements."""
    value = call.value("self")
    if "dtype" in call.arguments:
        call.tracer.ground(value)
        return constant(GROUND, call.output.ndim)
    return map_value(value, lambda ids: reshape(ids, call.shape("self"), call.output.shape))


@view("detach", "clone", "alias", "positive", "lift_fresh", "lift_fresh_copy", "detach_copy")
def unchanged(call: Call, ids: IntArray) -> IntArray:
    return ids


@rule("_to_copy")
def cast(call: Call) -> Value:
    value = call.value("self")
    if not is_inexact(call.output):
        call.tracer.ground(value)
        return constant(GROUND, call.output.ndim)
    return value


@view("permute")
def permuted(call: Call, ids: IntArray) -> IntArray:
    return ids.transpose(call.axes("dims"))


@view("transpose")
def transposed(call: Call, ids: IntArray) -> IntArray:
    if ids.ndim == 0:
        return ids
    return ids.swapaxes(call.axes("dim0")[0], call.axes("dim1")[0])


@view("t")
def matrix_transposed(call: Call, ids: IntArray) -> IntArray:
    return ids.T


@view("expand")
def expanded(call: Call, ids: IntArray) -> IntArray:
    return align(ids, call.output.ndim)


@view("slice")
def sliced(call: Call, ids: IntArray) -> IntArray:
    (axis,) = call.axes("dim")
    if ids.shape[axis] == 1:
        return ids
    return ids[(slice(None),) * axis + (slice(call["start"], call["end"], call["step"]),)]


@view("select")
def selected(call: Call, ids: IntArray) -> IntArray:
    (axis,) = call.axes("dim")
    index = call["index"] if ids.shape[axis] > 1 else 0
    return ids[(slice(None),) * axis + (index,)]


def _pieces(ids: IntArray, axis: int, sizes: Sequence[int]) -> list[IntArray]:
    if ids.shape[axis] == 1:
        return [ids] * len(sizes)
    return np.split(ids, np.cumsum(sizes)[:-1], axis)


@view("split", "split_with_sizes")
def split(call: Call, ids: IntArray) -> list[IntArray]:
    (axis,) = call.axes("dim")
    return _pieces(ids, axis, [part.shape[axis] for part in call.output])


@view("unbind")
def unbound(call: Call, ids: IntArray) -> list[IntArray]:
    (axis,) = call.axes("dim")
    return [piece.squeeze(axis) for piece in _pieces(ids, axis, [1] * len(call.output))]


@view("roll")
def rolled(call: Call, ids: IntArray) -> IntArray:
    if not call["dims"]:
        flat = np.roll(stretch(ids, call.shape("self"), range(ids.ndim)).ravel(), call["shifts"])
        return compress(flat.reshape(call.output.shape))
    return np.roll(ids, call["shifts"], call.axes("dims"))


@view("flip")
def flipped(call: Call, ids: IntArray) -> IntArray:
    return np.flip(ids, call.axes("dims"))


@view("repeat")
def repeated(call: Call, ids: IntArray) -> IntArray:
    ids = align(ids, call.output.ndim)
    return np.tile(ids, [times if size > 1 else 1 for times, size in zip(call["repeats"], ids.shape, strict=True)])


@rule("cat")
def concatenated(call: Call) -> IntArray:
    # The legacy empty tensor of one axis may be concatenated with anything.
    tensors = [tensor for tensor in call["tensors"] if tuple(tensor.shape) != (0,)]
    axis = call["dim"] % max(call.output.ndim, 1)
    parts = [stretch(call.ids(tensor), tensor.shape, [axis]) for tensor in tensors]
    return _joined(parts, axis) if parts else constant(GROUND, call.output.ndim)


@rule("stack")
def stacked(call: Call) -> IntArray:
    axis = call["dim"] % call.output.ndim
    return _joined([np.expand_dims(call.ids(tensor), axis) for tensor in call["tensors"]], axis)


def _joined(parts: Sequence[IntArray], axis: int) -> IntArray:
    others = np.broadcast_shapes(*((*part.shape[:axis], 1, *part.shape[axis + 1 :]) for part in parts))
    whole = [np.broadcast_to(part, (*others[:axis], part.shape[axis], *others[axis + 1 :])) for part in parts]
    return compress(np.concatenate(whole, axis))


@rule("constant_pad_nd")
def padded(call: Call) -> IntArray:
    ids = call.ids("self")
    if call["value"] != 0:
        call.tracer.ground(ids)
        return constant(GROUND, ids.ndim)
    for pair, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True)):
        axis = ids.ndim - 1 - pair
        if ids.shape[axis] == 1:
            continue  # zeros fit the label that is there
        kept = slice(max(-before, 0), ids.shape[axis] - max(-after, 0))
        ids = ids[(slice(None),) * axis + (kept,)]
        widths = [(0, 0)] * ids.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        ids = np.pad(ids, widths, constant_values=ZERO)
    return ids


@rule(
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def padded_by_copies(call: Call) -> IntArray:
    ids = call.ids("self")
    spatial = len(call["padding"]) // 2
    return call.tracer.uniform(ids, range(ids.ndim - spatial, ids.ndim))


@rule("index_select")
def index_selected(call: Call) -> IntArray:
    return call.tracer.uniform(call.ids("self"), call.axes("dim"))


@rule("index")
def indexed(call: Call) -> IntArray:
    """Which elements an index picks is data: one label along the indexed axes."""
    ids = call.ids("self")
    indices = list(call["indices"]) + [None] * (ids.ndim - len(call["indices"]))
    if any(index is not None and index.dtype.itemsize == 1 for index in indices):  # masks take more than one axis
        return call.tracer.uniform(ids, range(ids.ndim)).reshape((1,) * call.output.ndim)
    ids = call.tracer.uniform(ids, [axis for axis, index in enumerate(indices) if index is not None])
    return ids[tuple(slice(None) if index is None else np.zeros((1,) * index.ndim, np.int64) for index in indices)]
