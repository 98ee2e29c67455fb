"""Linear maps: the element that leads from input ``i`` to output ``o`` scales by label(o) - label(i)."""

from __future__ import annotations

import numpy as np

from lightning_ecopt.symmetry.labels import (
    GROUND,
    ZERO,
    IntArray,
    ParameterView,
    Value,
    align,
    along_channels,
    constant,
    map_value,
)
from lightning_ecopt.symmetry.rules.pointwise import add
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("mm", "bmm")
def matrix_product(call: Call) -> IntArray:
    return contract(call, call.value("self"), call.value("mat2"), call.output.ndim)


@rule("addmm")
def matrix_product_with_bias(call: Call) -> IntArray:
    ids = contract(call, call.value("mat1"), call.value("mat2"), call.output.ndim)
    return add(call, ids, call.value("self"), call.output.ndim)


@rule("baddbmm")
def batched_matrix_product_with_bias(call: Call) -> IntArray:
    ids = contract(call, call.value("batch1"), call.value("batch2"), call.output.ndim)
    return add(call, ids, call.value("self"), call.output.ndim)


@rule("mv")
def matrix_vector_product(call: Call) -> IntArray:
    vector = map_value(call.value("vec"), lambda ids: ids[..., None])
    return contract(call, call.value("self"), vector, 2)[..., 0]


@rule("addmv")
def matrix_vector_product_with_bias(call: Call) -> IntArray:
    vector = map_value(call.value("vec"), lambda ids: ids[..., None])
    ids = contract(call, call.value("mat"), vector, 2)[..., 0]
    return add(call, ids, call.value("self"), 1)


@rule("linear")
def linear(call: Call) -> IntArray:
    weight = map_value(call.value("weight"), lambda ids: ids.swapaxes(-1, -2))
    ids = contract(call, call.value("input"), weight, call.output.ndim)
    return ids if call["bias"] is None else add(call, ids, call.value("bias"), call.output.ndim)


@rule("convolution", "_convolution", "convolution_overrideable")
def convolution(call: Call) -> IntArray:
    """Grouped, depthwise, dilated, strided and transposed, in any number of dimensions."""
    ids, weight = call.ids("input"), call.value("weight")
    channels, groups = call.output.shape[1], call["groups"]
    ids = call.tracer.uniform(ids, [axis for axis in range(ids.ndim) if axis != 1])
    inputs = np.broadcast_to(ids.reshape(-1), call.shape("input")[1]).reshape(groups, -1)
    if (inputs == ZERO).all():
        output = constant(ZERO, ids.ndim)
    elif isinstance(weight, ParameterView):
        label = call.tracer.fresh((channels,))
        outputs = label.reshape(groups, -1)
        if call["transposed"]:
            incoming, outgoing = _grouped(outputs, inputs)  # [groups, in, out]
        else:
            outgoing, incoming = _grouped(inputs, outputs)  # [groups, out, in]
        call.tracer.assign(weight, _spread(incoming, ids.ndim), _spread(outgoing, ids.ndim), additive=False)
        output = along_channels(label, ids.ndim)
    else:
        call.tracer.ground(weight)
        mixed = call.tracer.uniform(inputs, [1])
        output = along_channels(np.repeat(mixed.reshape(-1), channels // groups), ids.ndim)
    if call["bias"] is None:
        return output
    return add(call, output, map_value(call.value("bias"), lambda axis: along_channels(axis, ids.ndim)), ids.ndim)


def _grouped(inner: IntArray, outer: IntArray) -> tuple[IntArray, IntArray]:
    """Labels [groups, inner] and [groups, outer] along axis 1 and axis 0 of a weight [groups * outer, inner, ...]."""
    groups, count = outer.shape
    if groups == 1:
        return inner, outer.reshape(-1, 1)
    return np.repeat(inner, count, axis=0), outer.reshape(-1, 1)


def _spread(ids: IntArray, ndim: int) -> IntArray:
    return ids.reshape(ids.shape + (1,) * (ndim - 2))


def contract(call: Call, left: Value, right: Value, ndim: int) -> IntArray:
    """Label of ``left @ right`` for ``left`` [..., n, k] and ``right`` [..., k, p], with ``ndim`` axes."""
    if isinstance(left, ParameterView) and isinstance(right, ParameterView):
        left = call.tracer.materialise(left)
    if isinstance(left, ParameterView):
        return contract(call, _transposed(right, ndim), _transposed(left, ndim), ndim).swapaxes(-1, -2)
    left = align(left, ndim)
    if isinstance(right, ParameterView):
        return _parameter_product(call, left, right.map(lambda axis: align(axis, ndim)))
    right = align(right, ndim)
    if (left == ZERO).all() or (right == ZERO).all():
        return constant(ZERO, ndim)
    if (left > GROUND).any() and (right > GROUND).any():  # products of two labels are not solved
        call.tracer.ground(left)
        call.tracer.ground(right)
        return constant(GROUND, ndim)
    # One factor is constant. What it mixes must have one label; rows of the other may keep their own.
    if (right > GROUND).any():
        return call.tracer.uniform(right, [ndim - 2])
    return call.tracer.uniform(left, [ndim - 1])


def _transposed(value: Value, ndim: int) -> Value:
    return map_value(value, lambda ids: align(ids, ndim).swapaxes(-1, -2))


def _parameter_product(call: Call, left: IntArray, weight: ParameterView) -> IntArray:
    ndim = left.ndim
    if (left == ZERO).all():
        return constant(ZERO, ndim)
    varying = weight.varying()
    batch = [axis for axis in range(ndim - 2) if axis in varying]
    left = call.tracer.uniform(left, [axis for axis in range(ndim - 1) if axis not in batch])
    shape = [1] * ndim
    for axis in [*batch, ndim - 1]:
        shape[axis] = max((index.shape[axis] for index in weight.axes), default=1)
    output = call.tracer.fresh(shape)
    call.tracer.assign(weight, output, left.swapaxes(-1, -2), additive=False)
    return output
