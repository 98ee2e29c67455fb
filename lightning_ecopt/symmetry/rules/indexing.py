"""Elements that are picked out, or put in place, by data: ``embedding``, ``x[i]``, ``gather``, ``scatter``.

Data may choose any of the elements along an axis, so these have one scale: the rows of an embedding ``[V, C]`` have the
label ``[1, C]``. If the indices are the same in every call, as in ``x[:, torch.tensor([2, 0, 1])]``, the label is
indexed instead, and no freedom is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf

import numpy as np
from torch import Tensor

from lightning_ecopt.symmetry.labels import (
    FIXED,
    Cases,
    Choice,
    IntArray,
    ParameterView,
    Value,
    align,
    arrays_in,
    compress,
    constant,
    map_value,
    stretch,
    varying,
)
from lightning_ecopt.symmetry.picking import pick
from lightning_ecopt.symmetry.rules.registry import Call, rule

#: A parameter of which more rows may be chosen gets one scale for all of them.
MOST_CASES = 2**10


def chosen(call: Call, name: str, axes: Iterable[int]) -> Value:
    """The label of an argument after data have chosen among its elements along ``axes``: size 1 there."""
    return pick(call.equations, call.value(name), axes)


def _any_element(call: Call, name: str, ndim: int) -> IntArray:
    """Demand one scale for all elements of an argument; returns the label of a tensor of them, with ``ndim`` axes."""
    return constant(int(call.uniform(name, range(len(call.shape(name)))).item()), ndim)


@rule("embedding")
def embedding(call: Call) -> Value:
    """Rows of a table, which is held fixed if its gradients are sparse."""
    if call["sparse"]:
        call.hold_fixed("weight")
        return constant(FIXED, call.output.ndim)
    leading = (1,) * (call.output.ndim - 1)
    return map_value(chosen(call, "weight", [0]), lambda ids: ids.reshape(leading + ids.shape[1:]))


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[IntArray]:
    """Sums, means or maxima of rows of a table, which is held fixed if its gradients are sparse."""
    ids = call.uniform("weight", [0])
    if call["sparse"]:
        call.hold_fixed("weight")
    if call["per_sample_weights"] is not None:
        weights = call.uniform("per_sample_weights", [0])
        ids = call.equations.combine((1, ids), (1, weights[None]))
    return [ids, *(constant(FIXED, part.ndim) for part in call.output[1:])]


@rule("index_select")
def index_selected(call: Call) -> Value | Cases:
    index, axes = call.constants.get(id(call["index"])), call.axes("dim")
    if index is not None:
        exact = _at(call, dict.fromkeys(axes, index))
        if exact is not None:
            return exact
    return _by_choice(call, axes[0], call["index"], 1) if axes else call.value("self")


def _by_choice(call: Call, axis: int, index: Tensor, ndim: int) -> Value | Cases:
    """The label of the elements along one axis that an index chooses, with ``ndim`` axes in its place."""
    value, count = call.value("self"), call.shape("self")[axis]
    rows = tuple(range(axis, axis + ndim))
    if count > MOST_CASES or axis not in varying(*arrays_in(value)):
        return map_value(pick(call.equations, value, [axis]), lambda ids: np.expand_dims(ids.take(0, axis), rows))
    first = map_value(value, lambda ids: np.expand_dims(np.moveaxis(ids, axis, 0), tuple(row + 1 for row in rows)))
    return Cases(Choice("element", call.values_of(index), count), rows, first)


def _at(call: Call, indices: dict[int, IntArray]) -> Value | None:
    """The label of the elements at known indices; ``None`` if they are elements of a parameter, and no box of it."""

    def taken(ids: IntArray) -> IntArray:
        places = (indices[k] * (ids.shape[k] > 1) if k in indices else slice(None) for k in range(ids.ndim))
        return ids[tuple(places)]

    value = map_value(call.value("self"), taken)
    return None if isinstance(value, ParameterView) and not call.equations.is_box(value) else value


@rule("index", "_unsafe_index")
def indexed(call: Call) -> Value | Cases:
    indices = _indices(call)
    if any(index is not None and _is_mask(index) for index in indices):  # masks take more than one axis
        return _any_element(call, "self", call.output.ndim)
    given = {axis: index for axis, index in enumerate(indices) if index is not None}
    known = {axis: call.constants[id(index)] for axis, index in given.items() if id(index) in call.constants}
    if len(known) == len(given):
        exact = _at(call, known)
        if exact is not None:
            return exact
    if len(given) == 1:
        ((axis, index),) = given.items()
        return _by_choice(call, axis, index, index.ndim)
    places = tuple(slice(None) if i is None else np.zeros((1,) * i.ndim, np.int64) for i in indices)
    return map_value(chosen(call, "self", given), lambda ids: ids[places])


def _indices(call: Call) -> list[Tensor | None]:
    return list(call["indices"]) + [None] * (len(call.shape("self")) - len(call["indices"]))


def _is_mask(index: Tensor) -> bool:
    return index.dtype.itemsize == 1


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def put_at_indices(call: Call) -> IntArray:
    indices = _indices(call)
    if any(index is not None and _is_mask(index) for index in indices):
        ndim = len(indices)
        return call.equations.equate(_any_element(call, "self", ndim), _any_element(call, "values", ndim))
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if len(axes) == 1:
        exact = _put_at(call, axes[0], indices[axes[0]], "values", adding=call["accumulate"])
        if exact is not None:
            return exact
    ids = call.uniform("self", axes)
    width = max(index.ndim for index in indices if index is not None)
    place = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0  # where the axes of the indices stand in what is put
    among = range(place, place + width)
    values = align(call.ids("values"), ids.ndim - len(axes) + width)
    values = call.equations.uniform(values, among).squeeze(tuple(among))
    return call.equations.equate(ids, np.expand_dims(values, tuple(axes)))


def _put_at(call: Call, axis: int, index: Tensor | None, name: str, *, adding: bool) -> IntArray | None:
    """The label after known places along an axis got new elements, or additions; ``None`` if they are not known."""
    places = call.constants.get(id(index))
    if places is None or places.ndim != 1 or call.output.ndim == 0:
        return None
    ids, new = call.ids("self"), align(call.ids(name), call.output.ndim)
    if ids.shape[axis] == new.shape[axis] == 1:
        return None
    whole = np.array(stretch(ids, call.output.shape, {axis, *varying(new)}))
    where = (slice(None),) * axis + (places,)
    if adding:
        new = call.equations.equate(whole[where], new)
    whole[where] = new
    call.equations.equate(whole[where], new)  # a place that is named twice has one label
    return compress(whole)


@rule("gather")
def gathered(call: Call) -> Value:
    """Elements along one axis, of a tensor that is held fixed if its gradients are sparse."""
    if call.arguments.get("sparse_grad"):
        call.hold_fixed("self")
    return _cut(chosen(call, "self", call.axes("dim")), call.shape("index"))


def _cut(value: Value, shape: tuple[int, ...]) -> Value:
    """The label of ``tensor[:shape[0], :shape[1], ...]``."""
    return map_value(value, lambda ids: ids[tuple(slice(size) for size in shape)] if ids.ndim else ids)


@rule("take")
def taken(call: Call) -> IntArray:
    return _any_element(call, "self", call.output.ndim)


@rule("masked_select")
def selected_by_mask(call: Call) -> IntArray:
    return _any_element(call, "self", 1)


@rule("masked_scatter")
def put_at_mask(call: Call) -> IntArray:
    ndim = call.output.ndim
    return call.equations.equate(_any_element(call, "self", ndim), _any_element(call, "source", ndim))


@rule("scatter", "scatter_add", "scatter_reduce")
def scattered(call: Call) -> IntArray:
    """What is put, or added, must have the label of what it is put into; products over elements are held fixed."""
    if call.arguments.get("reduce") in ("prod", "multiply"):
        call.hold_fixed("self", "src", "value")
        return constant(FIXED, call.output.ndim)
    axes = call.axes("dim")
    ids = call.uniform("self", axes)
    if call.arguments.get("src") is None:
        return call.equations.equate(ids, align(call.ids("value"), ids.ndim))
    shape = call.shape("index")
    source = np.asarray(_cut(call.uniform("src", axes), shape))
    # Only a part of the rows may be put into, so the label is written out along the axes on which the source changes.
    whole = np.array(stretch(ids, call.shape("self"), varying(source)))
    part = tuple(slice(size) if own > 1 else slice(None) for size, own in zip(shape, whole.shape, strict=True))
    whole[part] = call.equations.equate(whole[part], source)
    return compress(whole)


@rule("index_add", "index_copy", "index_reduce")
def put_along_axis(call: Call) -> IntArray:
    axes = call.axes("dim")
    if call.arguments.get("reduce") == "prod":
        call.hold_fixed("self", "source")
        return constant(FIXED, call.output.ndim)
    if "reduce" not in call.arguments and axes:
        exact = _put_at(call, axes[0], call["index"], "source", adding="alpha" in call.arguments)
        if exact is not None:
            return exact
    source = align(call.uniform("source", axes) if call.shape("source") else call.ids("source"), call.output.ndim)
    return call.equations.equate(call.uniform("self", axes), source)


@rule("index_fill")
def filled_along_axis(call: Call) -> IntArray:
    return call.equations.equate(call.uniform("self", call.axes("dim")), align(call.ids("value"), call.output.ndim))


@rule("slice_scatter", "select_scatter")
def put_into_slice(call: Call) -> IntArray:
    """A copy in which ``src`` replaces one slice."""
    (axis,) = call.axes("dim")
    ids, source = call.ids("self"), call.ids("src")
    if "index" in call.arguments:
        source = np.expand_dims(source, axis)
        part = slice(call["index"], call["index"] + 1 or None)
    else:
        part = slice(call["start"], call["end"], call["step"])
    return put_into(call, ids, source, (slice(None),) * axis + (part,))


def put_into(call: Call, ids: IntArray, source: IntArray, part: tuple[slice, ...]) -> IntArray:
    """The label of a tensor with label ``ids`` after something with label ``source`` has replaced a box of it."""
    partial = [axis for axis, piece in enumerate(part) if piece != slice(None)]
    whole = np.array(stretch(ids, call.output.shape, {*partial, *varying(source)}))
    whole[part] = source
    return compress(whole)


@rule("_pack_padded_sequence")
def packed(call: Call) -> list[IntArray]:
    """[batch, time, channels] to [steps, channels], and how many sequences each time has."""
    ids = call.uniform("input", [0, 1])
    return [ids[0], constant(FIXED, 1)]


@rule("_pad_packed_sequence")
def unpacked(call: Call) -> list[IntArray]:
    """[steps, channels] to [batch, time, channels], which is held fixed if it is filled up with anything but zeros."""
    if call["padding_value"] != 0:
        call.hold_fixed("data")
    return [call.uniform("data", [0])[None], constant(FIXED, 1)]


@rule("_jagged_to_padded_dense_forward")
def padded_rows(call: Call) -> IntArray:
    """[rows, channels] to [batch, time, channels], filled up: zero and infinity stay what they are times a scale."""
    if call["padding_value"] != 0 and not isinf(call["padding_value"]):
        call.hold_fixed("values")
    return call.uniform("values", [0])[None]


@rule("_padded_dense_to_jagged_forward")
def rows_of_padded(call: Call) -> IntArray:
    """[batch, time, channels] to [rows, channels]."""
    return call.uniform("dense", [0, 1])[0]
