"""Operations that move elements about: label(x.transpose(0, 1)) = label(x).transpose(0, 1).

The index arrays of a parameter view are moved in the same way, so that ``w.t()`` still knows its elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import cast

import numpy as np

from lightning_ecopt.symmetry.aten import is_inexact
from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    IntArray,
    ParameterView,
    Product,
    Value,
    align,
    compress,
    constant,
    map_value,
    reshape,
    stretch,
)
from lightning_ecopt.symmetry.rules.registry import Call, rule

View = Callable[[Call, IntArray], IntArray | list[IntArray]]


def view(*names: str) -> Callable[[View], View]:
    """Register a function of one array as a rule, for labels and for the index arrays of a parameter view.

    Example::

        @view("t")
        def matrix_transposed(call, ids):
            return ids.T
    """

    def register(function: View) -> View:
        @rule(*names)
        @wraps(function)
        def moved(call: Call) -> Value | Sequence[Value]:
            value = call.factored("self")
            if not isinstance(value, Product | ParameterView):
                return function(call, value)
            if isinstance(call.output, list | tuple):
                pieces = range(len(call.output))
                return [value.map(lambda ids, k=k: function(call, ids)[k]) for k in pieces]  # type: ignore[misc]
            return value.map(lambda ids: cast(IntArray, function(call, ids)))

        return function

    return register


@view("_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze")
def reshaped(call: Call, ids: IntArray) -> IntArray:
    return reshape(ids, call.shape("self"), call.output.shape)


@rule("view")
def viewed(call: Call) -> Value:
    """The same elements in another shape; as another dtype they are other elements, and held fixed."""
    value = call.factored("self")
    if "dtype" in call.arguments:
        call.equations.hold_fixed(value)
        return constant(FIXED, call.output.ndim)
    return map_value(value, lambda ids: reshape(ids, call.shape("self"), call.output.shape))


@view(
    "detach",
    "clone",
    "alias",
    "positive",
    "lift_fresh",
    "lift_fresh_copy",
    "detach_copy",
    "tril",
    "triu",
)
def unchanged(call: Call, ids: IntArray) -> IntArray:
    return ids


@rule("_to_copy")
def converted(call: Call) -> Value:
    value = call.factored("self")
    if not is_inexact(call.output):
        call.equations.hold_fixed(value)
        return constant(FIXED, call.output.ndim)
    return value


@rule("as_strided")
def restrided(call: Call) -> None:
    """A view of the memory, whatever shape that had; its label is found when it is read (:class:`~.memory.Memory`)."""


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
    return ids.swapaxes(-1, -2) if ids.ndim > 1 else ids


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


@view("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(call: Call, ids: IntArray) -> list[IntArray]:
    (axis,) = call.axes("dim")
    return _pieces(ids, axis, [part.shape[axis] for part in call.output])


@view("unbind")
def unbound(call: Call, ids: IntArray) -> list[IntArray]:
    (axis,) = call.axes("dim")
    return [piece.squeeze(axis) for piece in _pieces(ids, axis, [1] * len(call.output))]


@view("unfold")
def windows(call: Call, ids: IntArray) -> IntArray:
    """[..., L, ...] to [..., windows, ..., size]: pieces along an axis, which may overlap."""
    axis = call["dimension"] % max(ids.ndim, 1)
    if ids.ndim == 0 or ids.shape[axis] == 1:
        return ids[..., None]
    pieces = np.lib.stride_tricks.sliding_window_view(ids, call["size"], axis)
    return pieces[(slice(None),) * axis + (slice(None, None, call["step"]),)]


@view("diagonal")
def diagonal(call: Call, ids: IntArray) -> IntArray:
    axes = call.axes("dim1")[0], call.axes("dim2")[0]
    if all(ids.shape[axis] == 1 for axis in axes):
        return np.diagonal(ids, 0, *axes)
    return np.diagonal(stretch(ids, call.shape("self"), axes), call["offset"], *axes)


@view("roll")
def rolled(call: Call, ids: IntArray) -> IntArray:
    if not call["dims"]:
        flat = np.roll(stretch(ids, call.shape("self"), range(ids.ndim)).ravel(), call["shifts"])
        return compress(flat.reshape(call.output.shape))
    return np.roll(ids, call["shifts"], call.axes("dims"))


@view("flip")
def flipped(call: Call, ids: IntArray) -> IntArray:
    return np.flip(ids, call.axes("dims")) if call["dims"] else ids


@rule("rot90")
def turned(call: Call) -> IntArray:
    return call.uniform("self", call.axes("dims"))


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
    return _joined(parts, axis) if parts else constant(FIXED, call.output.ndim)


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
    ids, shape = call.ids("self"), call.shape("self")
    for pair, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True)):
        axis = len(shape) - 1 - pair
        if ids.shape[axis] == 1 and call["value"] == 0 and axis > 1 and len(shape) > 3:
            continue  # zeros among pixels take the label of the pixels beside them; zeros as channels stay ZERO
        kept = slice(max(-before, 0), shape[axis] - max(-after, 0))
        ids = stretch(ids, shape, [axis])[(slice(None),) * axis + (kept,)]
        widths = [(0, 0)] * ids.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        ids = np.pad(ids, widths, constant_values=ZERO if call["value"] == 0 else FIXED)
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
    ndim = call.output.ndim
    return call.uniform("self", range(ndim - len(call["padding"]) // 2, ndim))
