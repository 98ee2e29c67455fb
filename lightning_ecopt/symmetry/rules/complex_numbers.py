"""Complex numbers and Fourier transforms: a scale multiplies the real and the imaginary part alike.

A transform sums over all positions of its axes, which must have one scale; the other axes keep theirs.
"""

from __future__ import annotations

from lightning_ecopt.symmetry.labels import FIXED, IntArray, Value, constant, map_value
from lightning_ecopt.symmetry.rules.indexing import chosen
from lightning_ecopt.symmetry.rules.registry import Call, rule
from lightning_ecopt.symmetry.rules.views import view


@view("_conj", "_conj_physical", "conj_physical", "resolve_conj", "resolve_neg", "_neg_view")
def conjugate(call: Call, ids: IntArray) -> IntArray:
    return ids


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def transformed(call: Call) -> IntArray:
    return call.uniform("self", call.axes("dim"))


@view("view_as_real")
def as_real(call: Call, ids: IntArray) -> IntArray:
    return ids[..., None]


@rule("view_as_complex")
def as_complex(call: Call) -> Value:
    """A parameter stays one: each number is a pair of its elements, with one scale."""
    return map_value(chosen(call, "self", [call.output.ndim]), lambda ids: ids[..., 0])


@rule("complex")
def from_real_and_imaginary_part(call: Call) -> IntArray:
    return call.equations.equate(call.broadcast("real"), call.broadcast("imag"))


@rule("polar")
def from_magnitude_and_angle(call: Call) -> IntArray:
    call.hold_fixed("angle")
    return call.broadcast("abs")


@rule("angle")
def angle(call: Call) -> IntArray:
    """The angle of c z is that of z, for c > 0."""
    return constant(FIXED, call.output.ndim)
