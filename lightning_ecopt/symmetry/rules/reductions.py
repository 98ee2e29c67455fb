"""Sums, means, extremes, norms: what is combined must have one scale, ``sum(c x) = c sum(x)``, and ``var`` has c**2."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

from lightning_ecopt.symmetry.labels import FIXED, IntArray, constant
from lightning_ecopt.symmetry.rules.pointwise import add
from lightning_ecopt.symmetry.rules.registry import Call, rule


def _reduced(call: Call, output: Any, power: int | Fraction = 1) -> IntArray:
    """The label of ``output`` after demanding one scale along the axes ``dim``, raised to ``power``."""
    axes = call.axes("dim")
    ids = call.uniform("self", axes)
    if power != 1:
        ids = call.equations.combine((power, ids))
    return ids if output.ndim == ids.ndim else ids.squeeze(axes)


@rule("sum", "mean", "amax", "amin", "nansum", "nanmean", "std", "linalg_vector_norm", "norm", "aminmax")
def reduced(call: Call) -> IntArray | list[IntArray]:
    """f(c x) = c f(x) for c > 0; the zeroth norm counts elements, and does not change."""
    if isinstance(call.output, tuple | list):
        return [_reduced(call, output) for output in call.output]
    order = call.arguments.get("ord", call.arguments.get("p"))
    return _reduced(call, call.output, 0 if isinstance(order, int | float) and order == 0 else 1)


@rule("var")
def variance(call: Call) -> IntArray:
    return _reduced(call, call.output, 2)


@rule("var_mean")
def variance_and_mean(call: Call) -> list[IntArray]:
    return [_reduced(call, call.output[0], 2), _reduced(call, call.output[1])]


@rule("std_mean")
def deviation_and_mean(call: Call) -> list[IntArray]:
    return [_reduced(call, output) for output in call.output]


@rule("prod")
def product(call: Call) -> IntArray:
    shape = call.shape("self")
    return _reduced(call, call.output, prod(shape[axis] for axis in call.axes("dim")))


@rule("argmax", "argmin", "argsort")
def position(call: Call) -> IntArray:
    """A position does not change if all elements are multiplied by one factor."""
    call.uniform("self", call.axes("dim"))
    return constant(FIXED, call.output.ndim)


@rule("max", "min", "median", "nanmedian")
def extreme(call: Call) -> Any:
    """The extremes of two tensors, or of all of one, or values and indices along an axis."""
    if "other" in call.arguments:
        return add(call, call.value("self"), call.value("other"), call.output.ndim)
    if "dim" not in call.arguments:
        return _reduced(call, call.output)
    values = _reduced(call, call.output[0])
    return [values, constant(FIXED, values.ndim)]


@rule("sort", "topk", "kthvalue", "mode", "cummax", "cummin")
def ordered(call: Call) -> list[IntArray]:
    """Values and indices, in an order along an axis."""
    axes = call.axes("dim")
    values = call.uniform("self", axes)
    values = values if call.output[0].ndim == values.ndim else values.squeeze(axes)
    return [values, constant(FIXED, values.ndim)]


@rule("trace")
def trace(call: Call) -> IntArray:
    return call.uniform("self", [0, 1]).reshape(())


@rule("cumsum")
def accumulated(call: Call) -> IntArray:
    return call.uniform("self", call.axes("dim"))
