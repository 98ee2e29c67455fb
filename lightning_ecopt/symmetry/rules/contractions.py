"""Linear maps ``y[o] = sum_i w[o, i] x[i]``: the element ``w[o, i]`` scales by label(y[o]) / label(x[i]).

If ``w`` is a parameter, every output gets a scale of its own. If both factors are computed, as in attention, then
label(w[o, i]) * label(x[i]) must be the same for all i, and is the label of ``y[o]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    AnyValue,
    IntArray,
    Label,
    ParameterView,
    Value,
    align,
    along_channels,
    constant,
    factors_of,
    map_value,
    stretch,
    varying,
)
from lightning_ecopt.symmetry.rules.pointwise import add_to
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("mm", "bmm")
def matrix_product(call: Call) -> Label:
    return contract(call, call.factored("self"), call.factored("mat2"), call.output.ndim)


@rule("addmm")
def matrix_product_with_bias(call: Call) -> Label:
    label = contract(call, call.factored("mat1"), call.factored("mat2"), call.output.ndim)
    return add_to(call, label, call.factored("self"), call.output.ndim)


@rule("baddbmm")
def batched_matrix_product_with_bias(call: Call) -> Label:
    label = contract(call, call.factored("batch1"), call.factored("batch2"), call.output.ndim)
    return add_to(call, label, call.factored("self"), call.output.ndim)


@rule("mv")
def matrix_vector_product(call: Call) -> Label:
    vector = map_value(call.value("vec"), lambda ids: ids[..., None])
    return map_value(contract(call, call.value("self"), vector, 2), lambda ids: ids[..., 0])


@rule("addmv")
def matrix_vector_product_with_bias(call: Call) -> Label:
    vector = map_value(call.value("vec"), lambda ids: ids[..., None])
    label = map_value(contract(call, call.value("mat"), vector, 2), lambda ids: ids[..., 0])
    return add_to(call, label, call.value("self"), 1)


@rule("linear")
def linear(call: Call) -> Label:
    weight = map_value(call.value("weight"), lambda ids: ids.swapaxes(-1, -2))
    ndim = max(call.output.ndim, 2)  # a vector is a matrix of one row
    label = contract(call, map_value(call.factored("input"), lambda ids: align(ids, ndim)), weight, ndim)
    label = map_value(label, lambda ids: ids.reshape(ids.shape[ndim - call.output.ndim :]))
    return label if call["bias"] is None else add_to(call, label, call.value("bias"), call.output.ndim)


@rule("convolution", "_convolution", "convolution_overrideable")
def convolution(call: Call) -> Label:
    """``weight`` is [out, in / groups, ...], or [in, out / groups, ...] if transposed; one scale per output channel.

    Positions that the kernel does not mix may have a factor each, which the output keeps.
    """
    weight, ndim = call.value("weight"), call.output.ndim
    inputs, *own = _channels_and_positions(call)
    channels, groups = call.output.shape[1], call["groups"]
    if isinstance(weight, ParameterView):
        label = call.equations.fresh((channels,))
        outputs = label.reshape(groups, -1)
        if call["transposed"]:
            incoming, outgoing = _grouped(outputs, inputs)  # [groups, in, out]
        else:
            outgoing, incoming = _grouped(inputs, outputs)  # [groups, out, in]
        call.equations.assign(weight, _spread(incoming, ndim), _spread(outgoing, ndim), additive=False)
    else:
        rows = stretch(call.equations.uniform(weight, range(2, weight.ndim)), call.shape("weight"), [0])
        kernel = rows.reshape((groups, rows.shape[0] // groups, rows.shape[1]))  # [groups, out, in]
        if call["transposed"]:
            kernel = kernel.swapaxes(1, 2)
        products = call.equations.combine((1, kernel), (1, inputs[:, None]))
        mixed = call.equations.uniform(products, [2])[..., 0]
        label = np.broadcast_to(mixed, (groups, channels // groups)).reshape(-1)
    output = call.equations.product(along_channels(label, ndim), *own)
    if call["bias"] is None:
        return output
    return add_to(call, output, map_value(call.value("bias"), lambda axis: along_channels(axis, ndim)), ndim)


def _channels_and_positions(call: Call) -> list[IntArray]:
    """The label of the input as that of its channels, [groups, in], times factors of each position of the output."""
    label, shape, groups = call.label("input"), call.shape("input"), call["groups"]
    label = call.equations.match_along(label, set(range(2, label.ndim)) - _unmixed(call))
    positions = set(range(label.ndim)) - {1}
    apart, ids = _apart(call, label, positions)
    first, own = _first(ids, positions), constant(FIXED, ids.ndim)
    if ids.size > first.size and shape[1] > groups and (ids == ZERO).any():
        first = call.equations.uniform(ids, positions)
    elif ids.size > first.size:
        factor = stretch(ids, shape, [1]).reshape(ids.shape[0], groups, -1, *ids.shape[2:])
        if shape[1] > groups:  # from position to position, all channels of a group differ by one factor
            axes = set(range(factor.ndim)) - {2}
            factor = call.equations.difference(factor, _first(factor, axes - {1}), axes)
        else:
            first = own
        own = np.repeat(factor[:, :, 0], call.output.shape[1] // groups, axis=1)
    return [np.broadcast_to(first.reshape(-1), shape[1]).reshape(groups, -1), own, *apart]


def _unmixed(call: Call) -> set[int]:
    """Axes of positions that the kernel leaves apart and in place, as it has size one along them."""

    def is_moved(k: int) -> bool:
        return any(call[name][k % len(call[name])] != number for name, number in _IN_PLACE)  # one number may be for all

    return {2 + k for k, size in enumerate(call.shape("weight")[2:]) if size == 1 and not is_moved(k)}


_IN_PLACE = (("stride", 1), ("padding", 0), ("output_padding", 0))


def _first(ids: IntArray, axes: Iterable[int]) -> IntArray:
    """The part of a label that comes first along axes, which it keeps with size one."""
    for axis in axes:
        ids = ids.take([0], axis)
    return ids


def _grouped(inner: IntArray, outer: IntArray) -> tuple[IntArray, IntArray]:
    """Labels [groups, inner] and [groups, outer] along axis 1 and axis 0 of a weight [groups * outer, inner, ...]."""
    groups, count = outer.shape
    if groups == 1:
        return inner, outer.reshape(-1, 1)
    return np.repeat(inner, count, axis=0), outer.reshape(-1, 1)


def _spread(ids: IntArray, ndim: int) -> IntArray:
    return ids.reshape(ids.shape + (1,) * (ndim - 2))


def contract(call: Call, left: Value, right: Value, ndim: int) -> Label:
    """The label of ``left @ right`` for ``left`` [..., n, k] and ``right`` [..., k, p], with ``ndim`` axes."""
    if isinstance(left, ParameterView) and isinstance(right, ParameterView):
        left = call.equations.materialise(left)
    if isinstance(left, ParameterView):
        return _transposed(contract(call, _transposed(right, ndim), _transposed(left, ndim), ndim), ndim)
    if isinstance(right, ParameterView):
        aligned = map_value(left, lambda ids: align(ids, ndim))
        return _parameter_product(call, aligned, map_value(right, lambda axis: align(axis, ndim)))
    left, right = (align(call.equations.whole(label), ndim) for label in (left, right))
    if left.shape[-2] > 1 and right.shape[-1] > 1 and not (left == ZERO).any() and not (right == ZERO).any():
        # If x(n, k) y(k, p) is the same for all k, then x = a(n) t(k) and y = b(p) / t(k). The product is a(n) b(p):
        # no label [n, k, p] has to be written out.
        left, mixed = _split_rows(call, left)
        right = call.equations.uniform(call.equations.combine((1, right), (1, mixed.swapaxes(-1, -2))), [ndim - 2])
        return call.equations.product(left, right)
    products = call.equations.combine((1, left[..., None]), (1, right[..., None, :, :]))
    return call.equations.uniform(products, [ndim - 1]).squeeze(-2)


def _split_rows(call: Call, left: IntArray) -> tuple[IntArray, IntArray]:
    """Write a label [..., n, k] as the product of a label [..., n, 1] and a label [..., 1, k]."""
    if left.shape[-1] == 1:
        return left, constant(FIXED, left.ndim)
    first = left[..., :1, :]
    if left.shape[-2] == 1:
        return constant(FIXED, left.ndim), first
    axes = [axis for axis in range(left.ndim) if axis != left.ndim - 1]
    return call.equations.difference(left, first, axes), first


def _transposed(value: AnyValue, ndim: int) -> AnyValue:
    return map_value(value, lambda ids: align(ids, ndim).swapaxes(-1, -2))


def _parameter_product(call: Call, label: Label, weight: ParameterView) -> Label:
    """The label of ``x @ w`` for a parameter ``w``: element (n, p) has a scale of row n, times a new scale of column p.

    Rows of ``x`` that differ in their labels, [..., n, k], may do so by a factor per row only, [..., n, 1]: by factors
    of the label that change along rows only, and by the ratio of the rows of all others. The product with zeros has new
    scales, too, so that ``w`` follows what it is added to.
    """
    ndim = label.ndim
    batch = [axis for axis in range(ndim - 2) if axis in weight.varying()]
    rows = [axis for axis in range(ndim - 1) if axis not in batch]
    shape = [1] * ndim
    for axis in [*batch, ndim - 1]:
        shape[axis] = max((index.shape[axis] for index in weight.axes), default=1)
    output = call.equations.fresh(shape)
    own, left = _apart(call, label, rows)
    if varying(left) & set(rows) and not (left == ZERO).any():
        first = _first(left, rows)
        own.append(call.equations.difference(left, first, [*rows, *batch]))
        left = first
    else:
        left = call.equations.uniform(left, rows)
    call.equations.assign(weight, output, left.swapaxes(-1, -2), additive=False)
    return call.equations.product(*own, output)


def _apart(call: Call, label: Label, axes: Iterable[int]) -> tuple[list[IntArray], IntArray]:
    """Factors of a label that change along axes, and along no others; and the product of all other factors."""
    apart: list[IntArray] = []
    rest = [constant(FIXED, label.ndim)]
    for ids in factors_of(label):
        is_apart = varying(ids) and varying(ids) <= set(axes) and not (ids == ZERO).any()
        (apart if is_apart else rest).append(ids)
    return apart, call.equations.whole(call.equations.product(*rest))


@rule("dot", "vdot")
def inner_product(call: Call) -> Label:
    row = map_value(call.value("self"), lambda ids: ids[None])
    other = call["tensor" if "tensor" in call.arguments else "other"]
    label = contract(call, row, map_value(call.value(other), lambda ids: ids[:, None]), 2)
    return map_value(label, lambda ids: ids.reshape(()))


@rule("addr")
def outer_product_added(call: Call) -> Label:
    product = call.equations.product(call.ids("vec1")[:, None], call.ids("vec2")[None])
    return add_to(call, product, call.value("self"), 2)


@rule("addbmm")
def products_summed(call: Call) -> Label:
    label = call.equations.match_along(contract(call, call.value("batch1"), call.value("batch2"), 3), [0])
    return add_to(call, map_value(label, lambda ids: ids[0]), call.value("self"), 2)


@rule("linalg_cross")
def cross_product(call: Call) -> IntArray:
    """Differences of products of different elements: each factor must have one scale along the axis."""
    axis = call["dim"] % call.output.ndim
    factors = [call.equations.uniform(call.broadcast(name), [axis]) for name in ("self", "other")]
    return call.equations.combine(*((1, ids) for ids in factors))


@rule("_trilinear")
def trilinear(call: Call) -> IntArray:
    """A product of three tensors, each of them expanded along some axes, then summed over axes; of ``bilinear``."""
    factors = []
    for name in ("i1", "i2", "i3"):
        value = call.value(name)
        for axis in sorted(call[f"expand{name[1]}"]):
            value = map_value(value, partial(np.expand_dims, axis=axis))
        factors.append(value)
    labels = [value for value in factors if not isinstance(value, ParameterView)]
    weights = [value for value in factors if isinstance(value, ParameterView)]
    labels += [call.equations.materialise(weight) for weight in weights[1:]]
    axes = tuple(call["sumdim"])
    ids = call.equations.combine(*((1, label) for label in labels))
    if weights:
        weight = weights[0]
        ids = call.equations.uniform(ids, set(range(ids.ndim)) - weight.varying())
        kept = weight.varying() - set(axes)
        output = call.equations.fresh(
            [max(a.shape[k] for a in weight.axes) if k in kept else 1 for k in range(ids.ndim)]
        )
        call.equations.assign(weight, output, ids, additive=False)
        ids = output
    return call.equations.uniform(ids, axes).squeeze(axes)
