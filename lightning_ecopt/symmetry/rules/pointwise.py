"""Element by element: positively homogeneous functions, sums, products, comparisons with zero."""

from __future__ import annotations

import numpy as np

from lightning_ecopt.symmetry.labels import GROUND, ZERO, IntArray, ParameterView, Value, align, constant, map_value
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("relu", "leaky_relu", "abs", "absolute", "neg", "negative", "rrelu_with_noise")
def homogeneous(call: Call) -> IntArray:
    """f(c x) = c f(x) for c > 0."""
    return call.ids("self")


@rule("_prelu_kernel", "prelu")
def prelu(call: Call) -> IntArray:
    """Homogeneous in its input; the slope must not change."""
    call.tracer.ground(call.value("weight"))
    return call.ids("self")


@rule("native_dropout")
def dropout(call: Call) -> list[Value]:
    value = call.ids("input")
    return [value, constant(GROUND, value.ndim)]


@rule("clamp", "clamp_min", "clamp_max", "clip", "hardtanh")
def clamped(call: Call) -> IntArray:
    """A bound of zero is a relu; any other bound must not be crossed."""
    bounds = [name for name in ("min", "max", "min_val", "max_val") if call.arguments.get(name) is not None]
    return _all_equal(call, "self", *bounds)


@rule("threshold")
def thresholded(call: Call) -> IntArray:
    return _all_equal(call, "self", "threshold", "value")


@rule("add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin")
def added(call: Call) -> IntArray:
    """Summands have one label; a constant other than zero grounds."""
    return add(call, call.value("self"), call.value("other"), call.output.ndim)


@rule("where")
def chosen(call: Call) -> IntArray:
    return _all_equal(call, "self", "other")


@rule("masked_fill")
def masked(call: Call) -> IntArray:
    return _all_equal(call, "self", "value")


@rule("copy")
def copied(call: Call) -> Value:
    return map_value(call.value("src"), lambda ids: align(ids, call.output.ndim))


@rule("mul", "multiply")
def multiplied(call: Call) -> Value:
    """Constants pass the label on; a vector of parameters times a tensor is a gain with scales of its own."""
    first, second, ndim = call.value("self"), call.value("other"), call.output.ndim
    if isinstance(first, ParameterView):
        first, second = second, first
    if isinstance(first, ParameterView):
        first = call.tracer.materialise(first)
    if isinstance(second, ParameterView):
        return gain(call, align(first, ndim), second.map(lambda axis: align(axis, ndim)))
    return _product(call, first, second)


@rule("div", "divide", "true_divide")
def divided(call: Call) -> Value:
    """Division by constants passes the label on."""
    call.tracer.ground(call.ids("other"))
    numerator, ndim = call.value("self"), call.output.ndim
    if call.arguments.get("rounding_mode") is not None:
        call.tracer.ground(numerator)
        return constant(GROUND, ndim)
    return map_value(numerator, lambda ids: align(ids, ndim))


@rule("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
def compared(call: Call) -> IntArray:
    """The outcome stays the same if both sides are multiplied by one factor, and a side of zero by any."""
    _all_equal(call, "self", "other")
    return constant(GROUND, call.output.ndim)


@rule("sign", "sgn", "signbit", "logical_not", "isnan", "isinf", "isfinite")
def unchanging(call: Call) -> IntArray:
    call.ids("self")
    return constant(GROUND, call.output.ndim)


def _all_equal(call: Call, *names: str) -> IntArray:
    ids = call.broadcast(names[0])
    for name in names[1:]:
        ids = call.tracer.equate(ids, call.broadcast(name))
    return ids


def _product(call: Call, first: IntArray, second: IntArray) -> IntArray:
    """One factor must be ground: products of two labels are not solved."""
    ndim = call.output.ndim
    first, second = np.broadcast_arrays(align(first, ndim), align(second, ndim))
    both = (first > GROUND) & (second > GROUND)
    if both.any():
        call.tracer.ground(first[both])
        call.tracer.ground(second[both])
        first, second = np.where(both, GROUND, first), np.where(both, GROUND, second)
    zero = (first == ZERO) | (second == ZERO)
    return np.where(zero, ZERO, np.maximum(first, second))


def gain(call: Call, ids: IntArray, parameter: ParameterView) -> Value:
    """``x * g``: the output has scales of its own, one per element of the vector ``g``.

    They can only be free where ``x`` has one label for each element of ``g``; elsewhere ``g`` is ground. A matrix times
    constants (a pruning mask) is still that matrix.
    """
    varying = parameter.varying()
    if (ids <= GROUND).all() and sum(axis.size > 1 for axis in parameter.axes) > 1:
        return parameter
    if any(size > 1 for k, size in enumerate(ids.shape) if k not in varying) or (ids == ZERO).any():
        call.tracer.ground(parameter)
        return ids
    if sum(axis.size > 1 for axis in parameter.axes) > 1:
        call.tracer.ground(parameter)
        return ids
    shape = [max(axis.shape[k] for axis in parameter.axes) if k in varying else 1 for k in range(ids.ndim)]
    output = call.tracer.fresh(shape)
    call.tracer.assign(parameter, output, ids, additive=False)
    return output


def add(call: Call, first: Value, second: Value, ndim: int) -> IntArray:
    """``x + b``: a parameter that is added takes the label of what it is added to."""
    if isinstance(first, ParameterView):
        first, second = second, first
    if isinstance(first, ParameterView):
        first = call.tracer.materialise(first)
    ids = align(first, ndim)
    if not isinstance(second, ParameterView):
        return call.tracer.equate(ids, align(second, ndim))
    parameter = second.map(lambda axis: align(axis, ndim))
    varying = parameter.varying()
    ids = call.tracer.uniform(ids, [k for k in range(ndim) if k not in varying])
    if (ids == ZERO).any():
        return call.tracer.equate(ids, call.tracer.materialise(parameter))
    call.tracer.assign(parameter, ids, constant(GROUND, 0), additive=True)
    return ids
