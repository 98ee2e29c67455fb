"""Normalisations, ``y = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta``: x is fixed, y has the label of gamma.

A rescaling of x would change y, because of eps; with x fixed the running statistics need no rescaling either, and the
freedoms are the same in training and in evaluation mode. Without gamma, y is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_ecopt.symmetry.labels import FIXED, IntArray, Label, Value, align, along_channels, constant, map_value
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
def batch_norm(call: Call) -> list[Label]:
    return _normalized(call, along_channels)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Label]:
    return _normalized(call, align)


@rule("native_group_norm")
def group_norm(call: Call) -> list[Label]:
    return _normalized(call, along_channels)


def _normalized(call: Call, place: Callable[[IntArray, int], IntArray]) -> list[Label]:
    """Labels of the output and of saved statistics; ``place`` gives gamma and beta the axes of the output."""
    call.hold_fixed("input", "running_mean", "running_var", "mean", "invstd")
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    ndim = outputs[0].ndim
    label: Label = constant(FIXED, ndim)
    if call["weight"] is not None:
        label = place(call.ids("weight"), ndim)
    if call.arguments.get("bias") is not None:
        label = add_to(call, label, map_value(call.value("bias"), lambda axis: place(axis, ndim)), ndim)
    return [label, *(constant(FIXED, output.ndim) for output in outputs[1:])]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[Value]:
    """``g * v / |v|``, norms over all axes but ``dim``; there is no eps, so that the rows of v may be rescaled."""
    v, ndim = call.value("v"), call.output[0].ndim
    others = [axis for axis in range(ndim) if axis != call["dim"] % ndim]
    norms = call.uniform("v", others)
    gains = call.equations.combine((1, call.ids("g", others)), (-1, norms))
    return [multiply(call, gains, v, ndim), norms]
