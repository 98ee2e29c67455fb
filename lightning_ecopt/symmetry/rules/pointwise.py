"""Element by element: ``relu(c x) = c relu(x)``, equal labels in ``x + y``, and label(x) * label(y) for ``x * y``.

What a function of the sign alone returns, such as ``x > 0``, is fixed, and x need not be.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    IntArray,
    Label,
    ParameterView,
    Product,
    Value,
    align,
    constant,
    factors_of,
    map_value,
    stretch,
    varying,
)
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("relu", "leaky_relu", "abs", "absolute", "neg", "negative", "rrelu_with_noise", "nan_to_num")
def homogeneous(call: Call) -> Value:
    """f(c x) = c f(x) for c > 0 and finite x."""
    return call.factored("self")


@rule("_prelu_kernel", "prelu")
def prelu(call: Call) -> Label:
    """f(c x) = c f(x) for c > 0; the slope must not change."""
    call.hold_fixed("weight")
    return call.label("self")


@rule("native_dropout")
def dropout(call: Call) -> list[Value]:
    return [call.factored("input"), constant(FIXED, call.output[1].ndim)]


@rule("clamp", "clamp_min", "clamp_max", "clip", "hardtanh")
def clamped(call: Call) -> Value:
    """clamp(c x, min=0) = c clamp(x, min=0) for c > 0; with any other bound x must not change."""
    bounds = [name for name in ("min", "max", "min_val", "max_val") if call.arguments.get(name) is not None]
    return all_equal(call, "self", *bounds)


@rule("threshold")
def thresholded(call: Call) -> Value:
    return all_equal(call, "self", "threshold", "value")


@rule("pow", "float_power")
def power(call: Call) -> IntArray:
    """(c x)**p = c**p x**p for a constant exponent p."""
    exponent = call["exponent"]
    if isinstance(exponent, int | float) and abs(exponent) < 1e6:
        exact = Fraction(exponent).limit_denominator(1000)
        if abs(exact - Fraction(exponent)) < 1e-9:
            return call.equations.combine((exact, call.ids("self")))
    call.hold_fixed("self", "exponent")
    return constant(FIXED, call.output.ndim)


def _raised(call: Call, exponent: int | Fraction) -> IntArray:
    return call.equations.combine((exponent, call.ids("self")))


rule("square")(lambda call: _raised(call, 2))
rule("sqrt")(lambda call: _raised(call, Fraction(1, 2)))
rule("rsqrt")(lambda call: _raised(call, Fraction(-1, 2)))
rule("reciprocal")(lambda call: _raised(call, -1))


@rule("glu")
def gated(call: Call) -> IntArray:
    """The first half of x, times the sigmoid of the second, which must not change."""
    (axis,) = call.axes("dim")
    half = call.output.shape[axis]
    ids = stretch(call.ids("self"), call.shape("self"), [axis])
    call.equations.hold_fixed(ids.take(range(half, 2 * half), axis))
    return ids.take(range(half), axis)


@rule("add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin")
def added(call: Call) -> Value:
    """``c x + c y = c (x + y)``: summands have equal labels, so adding a constant other than zero holds x fixed."""
    return add(call, call.factored("self"), call.factored("other"), call.output.ndim)


@rule("where")
def chosen(call: Call) -> Value:
    return all_equal(call, "self", "other")


@rule("masked_fill")
def masked(call: Call) -> Value:
    return all_equal(call, "self", "value")


@rule("copy")
def copied(call: Call) -> Value:
    return map_value(call.factored("src"), lambda ids: align(ids, call.output.ndim))


@rule("mul", "multiply")
def multiplied(call: Call) -> Value:
    """(a x) (b y) = (a b) (x y); a vector of parameters is a gain, and gives the product scales of its own."""
    return multiply(call, call.factored("self"), call.factored("other"), call.output.ndim)


@rule("div", "divide", "true_divide")
def divided(call: Call) -> Value:
    """(a x) / (b y) = (a / b) (x / y); a quotient that is rounded is held fixed."""
    numerator, ndim = call.factored("self"), call.output.ndim
    if call.arguments.get("rounding_mode") is not None:
        call.hold_fixed("self", "other")
        return constant(FIXED, ndim)
    return divide(call, numerator, call.ids("other"), ndim)


@rule("addcmul")
def product_added(call: Call) -> Value:
    ndim = call.output.ndim
    return add(call, call.value("self"), multiply(call, call.value("tensor1"), call.value("tensor2"), ndim), ndim)


@rule("addcdiv")
def quotient_added(call: Call) -> Value:
    ndim = call.output.ndim
    return add(call, call.value("self"), divide(call, call.value("tensor1"), call.ids("tensor2"), ndim), ndim)


@rule("lerp")
def interpolated(call: Call) -> Value:
    """``x + weight (y - x)``: x and y have equal labels, and the weight must not change."""
    call.hold_fixed("weight")
    return add(call, call.value("self"), call.value("end"), call.output.ndim)


@rule("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
def compared(call: Call) -> IntArray:
    """``c x > c y`` if ``x > y``, for c > 0: the result is fixed; the sides have equal labels, unless one is zero."""
    all_equal(call, "self", "other")
    return constant(FIXED, call.output.ndim)


@rule("sign", "sgn", "signbit", "logical_not", "isnan", "isinf", "isfinite", "nonzero", "count_nonzero", "any", "all")
def unchanging(call: Call) -> IntArray:
    """f(c x) = f(x) for c > 0: functions of the sign, or of what is zero, infinite or no number."""
    return constant(FIXED, call.output.ndim)


@rule("heaviside")
def step(call: Call) -> IntArray:
    """Zero or one by the sign of x, and ``values`` where x is zero, which must not change."""
    call.hold_fixed("values")
    return constant(FIXED, call.output.ndim)


def all_equal(call: Call, *names: str) -> Value:
    """The label that all arguments must have; a parameter among zeros stays a parameter view."""
    values = [call.factored(name) for name in names]
    others = [value for value in values if isinstance(value, Product | ParameterView) or not (value == ZERO).all()]
    if len(others) == 1:
        return map_value(others[0], lambda ids: align(ids, call.output.ndim))
    label, *rest = (map_value(call.label(name), lambda ids: align(ids, call.output.ndim)) for name in names)
    for other in rest:
        label = call.equations.match(label, other)
    return label


def multiply(call: Call, first: Value, second: Value, ndim: int) -> Value:
    """The label of ``x * y``, with ``ndim`` axes. A matrix of parameters stays a parameter view, with a factor."""
    for view, number in ((first, second), (second, first)):
        if _is_number(number) and isinstance(view, ParameterView) and view.ndim == ndim:
            return view
    if isinstance(first, ParameterView) and (not isinstance(second, ParameterView) or first.is_matrix):
        first, second = second, first
    if isinstance(first, ParameterView):
        first = call.equations.materialise(first)
    label = map_value(first, lambda ids: align(ids, ndim))
    second = map_value(second, lambda ids: align(ids, ndim))
    if not isinstance(second, ParameterView):
        return call.equations.product(label, second)
    if second.is_matrix:
        return call.equations.multiply(second, 1, call.equations.whole(label))
    return _gain(call, label, second)


def _is_number(label: Value) -> bool:
    """Whether this is the label of a number, other than zero, that does not change."""
    kinds = Product | ParameterView
    return not isinstance(label, kinds) and label.ndim == 0 and bool((label == FIXED).all())


def _gain(call: Call, label: Label, vector: ParameterView) -> Label:
    """The label of ``y = x * g`` for a vector of parameters: new scales, and g scales by label(y) / label(x).

    If x changes along axes on which g does not, then g gets a label of its own, and the label of y is the product.
    """
    axes, zero = vector.varying(), [bool(zero) for ids in factors_of(label) for zero in np.unique(ids == ZERO)]
    if varying(*factors_of(label)) - axes or len(set(zero)) > 1:
        return call.equations.product(label, call.equations.materialise(vector))
    output = call.equations.fresh([max(a.shape[k] for a in vector.axes) if k in axes else 1 for k in range(label.ndim)])
    call.equations.assign(vector, output, call.equations.whole(label), additive=False)
    return output


def divide(call: Call, numerator: Value, denominator: IntArray, ndim: int) -> Value:
    """The label of ``x / y``, with ``ndim`` axes. A matrix of parameters stays a parameter view, with a factor."""
    if _is_number(denominator) and isinstance(numerator, ParameterView) and numerator.ndim == ndim:
        return numerator
    denominator = align(denominator, ndim)
    if isinstance(numerator, ParameterView):
        numerator = numerator.map(lambda axis: align(axis, ndim))
        if numerator.is_matrix:
            return call.equations.multiply(numerator, -1, denominator)
        numerator = call.equations.materialise(numerator)
    if isinstance(numerator, Product):
        return call.equations.product(numerator, call.equations.combine((-1, denominator)))
    return call.equations.combine((1, align(numerator, ndim)), (-1, denominator))


def add(call: Call, first: Value, second: Value, ndim: int) -> Value:
    """The label of ``x + b``: a parameter that is added takes the label of what it is added to.

    The sum of two matrices of parameters, as of a frozen and a low-rank weight, stays a parameter view.
    """
    if isinstance(first, ParameterView):
        first, second = second, first
    if isinstance(first, ParameterView) and isinstance(second, ParameterView):
        if first.ndim == ndim and first.shows_same(second):  # a parameter and a copy of it, of which neither is used
            return first
        if first.is_matrix and second.is_matrix:
            first, second = (view.map(lambda axis: align(axis, ndim)) for view in (first, second))
            return replace(first, added=(*first.added, second))
    if isinstance(first, ParameterView):
        first = call.equations.materialise(first)
    return add_to(call, first, second, ndim)


def add_to(call: Call, label: Label, other: Value, ndim: int) -> Label:
    """The label of ``x + b`` for ``x`` with the given label."""
    label = map_value(label, lambda ids: align(ids, ndim))
    other = map_value(other, lambda ids: align(ids, ndim))
    if not isinstance(other, ParameterView):
        return call.equations.match(label, other)
    ids = call.equations.whole(call.equations.match_along(label, set(range(ndim)) - other.varying()))
    if (ids == ZERO).any():
        return call.equations.equate(ids, call.equations.materialise(other))
    call.equations.assign(other, ids, constant(FIXED, 0), additive=True)
    return ids
