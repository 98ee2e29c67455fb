"""Normalisations: the input is ground, gamma and beta give the output scales of its own.

Epsilon breaks the freedom of what is normalised, so that exact means exact, in training and in evaluation mode alike;
and so the running statistics never change with a rescaling.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_ecopt.symmetry.labels import FIXED, IntArray, Value, align, along_channels, constant, map_value
from lightning_ecopt.symmetry.rules.pointwise import add_to, multiply
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_no_update",
    "batch_norm_elemt",  # the last part of SyncBatchNorm
)
def batch_norm(call: Call) -> list[IntArray]:
    return _normalized(call, along_channels)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[IntArray]:
    return _normalized(call, align)


@rule("native_group_norm")
def group_norm(call: Call) -> list[IntArray]:
    return _normalized(call, along_channels)


def _normalized(call: Call, place: Callable[[IntArray, int], IntArray]) -> list[IntArray]:
    """``place`` brings the label of the affine parameters to the number of axes of the output."""
    call.hold_fixed("input", "running_mean", "running_var", "mean", "invstd")
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    ndim = outputs[0].ndim
    ids = constant(FIXED, ndim)
    if call["weight"] is not None:
        ids = place(call.ids("weight"), ndim)
    if call.arguments.get("bias") is not None:
        ids = add_to(call, ids, map_value(call.value("bias"), lambda axis: place(axis, ndim)), ndim)
    return [ids, *(constant(FIXED, output.ndim) for output in outputs[1:])]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[Value]:
    """``v * (g / |v|)``, the norm over all axes but ``dim``; without an epsilon the scales of v's rows are free."""
    v, ndim = call.value("v"), call.output[0].ndim
    others = [axis for axis in range(ndim) if axis != call["dim"] % ndim]
    norms = call.uniform("v", others)
    gains = call.equations.combine((1, call.ids("g", others)), (-1, norms))
    return [multiply(call, gains, v, ndim), norms]
