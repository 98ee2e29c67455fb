"""New tensors: ``zeros_like(x)`` has the label ZERO and ``ones_like(x)`` is FIXED, whatever the label of ``x``."""

from __future__ import annotations

from torch import Tensor

from lightning_ecopt.symmetry.labels import FIXED, ZERO, IntArray, align, constant
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("zeros", "zeros_like", "new_zeros", "zero")
def zeros(call: Call) -> IntArray:
    return constant(ZERO, call.output.ndim)


@rule("full", "full_like", "new_full", "fill", "scalar_tensor")
def filled(call: Call) -> IntArray:
    number = call.arguments.get("fill_value", call.arguments.get("value", call.arguments.get("s")))
    if isinstance(number, Tensor):
        return align(call.ids(number), call.output.ndim)
    return constant(ZERO if isinstance(number, int | float) and number == 0 else FIXED, call.output.ndim)


@rule(
    "ones",
    "ones_like",
    "new_ones",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "arange",
    "linspace",
    "eye",
)
def constants(call: Call) -> IntArray:
    for name, argument in call.arguments.items():
        if isinstance(argument, Tensor) and name != "self":  # a bound, not the tensor that gives the shape
            call.equations.hold_fixed(call.value(argument))
    return constant(FIXED, call.output.ndim)
