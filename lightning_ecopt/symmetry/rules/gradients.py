"""Backward formulas, of networks that differentiate themselves: forces, gradient penalties, losses of PINNs.

The gradient of ``f(x)`` is linear in the gradient ``g`` that comes from above, and looks at x in some way. That of
``leaky_relu`` looks at the sign only: its label is that of g, and x is free. That of ``tanh`` looks at values, which
must not change; that of a convolution is a convolution of g with the same weight. Formulas that autograd makes of
ordinary operations, as for ``matmul`` or ``sqrt``, need no rule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from torch import Tensor

from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    IntArray,
    Label,
    Value,
    align,
    along_channels,
    constant,
    stretch,
)
from lightning_ecopt.symmetry.rules.contractions import convolution
from lightning_ecopt.symmetry.rules.indexing import put_into
from lightning_ecopt.symmetry.rules.pointwise import add, all_equal, multiply
from lightning_ecopt.symmetry.rules.registry import Call, rule

_NAMES = ("grad_output", "grad_out", "grad", "grad_in")


def _name(call: Call) -> str:
    """The name of the gradient that comes from above."""
    return next(name for name in _NAMES if name in call.arguments)


# Element by element ---------------------------------------------------------------------------------------------------


@rule("leaky_relu_backward")
def gradient_by_sign(call: Call) -> IntArray:
    """The slope depends on the sign of x only."""
    return call.ids("grad_output")


@rule("rrelu_with_noise_backward")
def gradient_by_noise(call: Call) -> IntArray:
    call.hold_fixed("noise")
    return call.ids("grad_output")


@rule("_prelu_kernel_backward")
def gradients_of_prelu(call: Call) -> list[IntArray]:
    """Of x, g times the slope or one by the sign of x; of the slope, g x where x is negative. It must not change."""
    call.hold_fixed("weight")
    ids = call.ids("grad_output")
    return [ids, call.equations.combine((1, ids), (1, call.ids("self")))]


@rule("threshold_backward", "hardtanh_backward")
def gradient_within_bounds(call: Call) -> IntArray:
    """It is g where x is within bounds, and zero elsewhere: x is free if zero is the only bound."""
    all_equal(call, "self", *(name for name in ("threshold", "min_val", "max_val") if name in call.arguments))
    return call.ids("grad_output")


@rule("native_dropout_backward")
def gradient_of_dropout(call: Call) -> IntArray:
    return call.ids("grad_output")


@rule(
    "elu_backward",
    "gelu_backward",
    "hardshrink_backward",
    "hardsigmoid_backward",
    "hardswish_backward",
    "log_sigmoid_backward",
    "mish_backward",
    "sigmoid_backward",
    "silu_backward",
    "softplus_backward",
    "softshrink_backward",
    "tanh_backward",
    "binary_cross_entropy_backward",
    "huber_loss_backward",
    "mse_loss_backward",
    "smooth_l1_loss_backward",
)
def gradient_by_value(call: Call) -> IntArray:
    """The product of g and a function of tensors that must not change."""
    name = _name(call)
    call.hold_fixed(*(other for other, value in call.arguments.items() if isinstance(value, Tensor) and other != name))
    return call.broadcast(name)


@rule("glu_backward")
def gradient_of_glu(call: Call) -> IntArray:
    """``a * sigmoid(b)``: g sigmoid(b), and g a times a function of b, which must not change."""
    (axis,) = call.axes("dim")
    half = call.output.shape[axis] // 2
    ids = stretch(call.ids("self"), call.shape("self"), [axis])
    call.equations.hold_fixed(ids.take(range(half, 2 * half), axis))
    first = stretch(call.ids("grad_output"), call.shape("grad_output"), [axis])
    second = call.equations.combine((1, first), (1, ids.take(range(half), axis)))
    return np.concatenate(np.broadcast_arrays(first, stretch(second, first.shape, [axis])), axis)


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def gradient_of_softmax(call: Call) -> IntArray:
    """Sums of g along an axis, weighed by the output, which must not change."""
    call.hold_fixed("output")
    return call.uniform("grad_output", [call["dim"] % max(call.output.ndim, 1)] if call.output.ndim else [])


# Moved, picked and pooled elements ------------------------------------------------------------------------------------


@rule("slice_backward", "select_backward")
def put_into_zeros(call: Call) -> IntArray:
    """Zeros, but for the slice that was taken."""
    axis = call["dim"] % call.output.ndim
    ids = call.ids("grad_output")
    if "index" in call.arguments:
        ids = np.expand_dims(ids, axis)
        part = slice(call["index"], call["index"] + 1 or None)
    else:
        part = slice(call["start"], call["end"], call["step"])
    return put_into(call, constant(ZERO, ids.ndim), ids, (slice(None),) * axis + (part,))


@rule("diagonal_backward")
def diagonal_among_zeros(call: Call) -> IntArray:
    """Zeros fit the label of the diagonal, so that no label of a whole matrix is needed."""
    ndim = call.output.ndim
    ids = call.uniform("grad_output", [ndim - 2]).squeeze(-1)
    return np.expand_dims(ids, tuple(sorted(call[name] % ndim for name in ("dim1", "dim2"))))


@rule("unfold_backward")
def summed_windows(call: Call) -> IntArray:
    axis = call["dim"] % max(call.output.ndim, 1)
    ids = call.uniform("grad_in", {axis, len(call.shape("grad_in")) - 1})
    return ids.reshape(ids.shape[: call.output.ndim])


@rule("embedding_dense_backward")
def gradient_of_a_table(call: Call) -> IntArray:
    """Sums over all places at which a row was taken."""
    return call.uniform("grad_output", range(len(call.shape("grad_output")) - 1)).reshape(1, -1)


def _register() -> None:
    def rows(axes: int) -> list[str]:
        padding = [f"{kind}_pad{axes}d_backward" for kind in ("reflection", "replication")]
        pooling = ["avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "max_pool"] if axes > 1 else []
        ends = {"max_pool": "d_with_indices_backward"}
        linear = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}[axes]
        resizing = [f"upsample_{kind}{axes}d_backward" for kind in ("nearest", *linear)]
        resizing += [f"_upsample_{kind}{axes}d_aa_backward" for kind in ("bilinear", "bicubic") if axes == 2]
        pools = [f"{kind}{axes}{ends.get(kind, 'd_backward')}" for kind in pooling]
        return [*padding, *pools, *resizing, f"_upsample_nearest_exact{axes}d_backward"]

    for spatial in (1, 2, 3):

        def spread(call: Call, spatial: int = spatial) -> IntArray:
            """Sums over pixels, or g at one of them."""
            ndim = call.output.ndim
            return call.uniform("grad_output", range(ndim - spatial, ndim))

        rule(*rows(spatial))(spread)


_register()


@rule("grid_sampler_2d_backward", "grid_sampler_3d_backward")
def gradients_of_sampling(call: Call) -> list[IntArray]:
    """Of pixels, and of the positions, at which all channels are summed; positions must not change."""
    call.hold_fixed("grid")
    ndim = len(call.shape("input"))
    ids, pixels = (call.uniform(name, range(2, ndim)) for name in ("grad_output", "input"))
    if not call["output_mask"][1]:
        return [ids, constant(FIXED, ndim)]
    positions = call.equations.uniform(call.equations.combine((1, ids), (1, pixels)), [1])
    return [ids, np.moveaxis(positions, 1, -1)]


# Convolutions and normalisations --------------------------------------------------------------------------------------


@rule("convolution_backward", "convolution_backward_overrideable")
def gradients_of_convolution(call: Call) -> list[Label]:
    """Of the input a convolution of g, of the weight a sum of products of g and the input, of the bias a sum of g."""
    name, (to_input, to_weight, _) = _name(call), call.output
    result: list[Label] = [constant(FIXED, 0), constant(FIXED, 0)]
    if to_input is not None:
        arguments = {**call.arguments, "input": call[name], "transposed": not call["transposed"], "bias": None}
        result[0] = cast(Label, convolution(replace(call, arguments=arguments, output=to_input)))
    others = [axis for axis in range(len(call.shape("input"))) if axis != 1]
    ids = call.uniform(name, others)
    if to_weight is not None:
        sides = [stretch(ids, call.shape(name), [1]), stretch(call.uniform("input", others), call.shape("input"), [1])]
        rows, columns = (side.reshape(call["groups"], -1) for side in (sides[::-1] if call["transposed"] else sides))
        products = call.equations.combine((1, rows[:, :, None]), (1, columns[:, None]))
        products = stretch(products, (*rows.shape, columns.shape[1]), range(3))
        result[1] = products.reshape((-1, columns.shape[1]) + (1,) * (to_weight.ndim - 2))
    return [*result, ids.reshape(-1)]


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def gradients_of_layer_norm(call: Call) -> list[IntArray]:
    """With h = g gamma, that of the input subtracts means of h; that of gamma and beta are sums of g."""
    call.hold_fixed("input", "mean", "rstd")
    ndim, last = len(call.shape("input")), len(call["normalized_shape"])
    ids = call.ids("grad_out")
    scaled = ids if call["weight"] is None else call.equations.combine((1, ids), (1, align(call.ids("weight"), ndim)))
    sums = call.equations.uniform(ids, range(ndim - last)).reshape(ids.shape[ndim - last :])
    return [call.equations.uniform(scaled, range(ndim - last, ndim)), *[sums] * (len(call.output) - 1)]


@rule("native_group_norm_backward")
def gradients_of_group_norm(call: Call) -> list[IntArray]:
    """The same within groups of channels."""
    call.hold_fixed("input", "mean", "rstd")
    ids, scaled = _by_channel(call)
    groups = stretch(scaled, call.shape("input"), [1]).reshape(call["group"], -1)
    groups = np.broadcast_to(call.equations.uniform(groups, [1]), groups.shape)
    return [along_channels(groups.reshape(-1), ids.ndim), ids.reshape(-1), ids.reshape(-1)]


@rule("native_batch_norm_backward", "batch_norm_backward", "cudnn_batch_norm_backward", "miopen_batch_norm_backward")
def gradients_of_batch_norm(call: Call) -> list[IntArray]:
    """The same within channels."""
    names = ("running_mean", "running_var", "save_mean", "save_invstd", "save_var")
    call.hold_fixed("input", *names)
    ids, scaled = _by_channel(call)
    return [scaled, ids.reshape(-1), ids.reshape(-1)]


def _by_channel(call: Call) -> tuple[IntArray, IntArray]:
    """The labels of g and of g gamma, which change along channels only."""
    ndim = len(call.shape("input"))
    ids = call.uniform(_name(call), [axis for axis in range(ndim) if axis != 1])
    if call["weight"] is None:
        return ids, ids
    return ids, call.equations.combine((1, ids), (1, along_channels(call.ids("weight"), ndim)))


# Forward mode ---------------------------------------------------------------------------------------------------------


@rule("_efficientzerotensor")
def zero_tangent(call: Call) -> IntArray:
    return constant(ZERO, call.output.ndim)


@rule("prims::add")
def sum_of_tangents(call: Call) -> Value:
    return add(call, call.value("self"), call.value("other"), call.output.ndim)


@rule("prims::mul")
def product_with_a_tangent(call: Call) -> Value:
    return multiply(call, call.value("self"), call.value("other"), call.output.ndim)


@rule("is_same_size", "_has_same_storage_numel")
def asked(call: Call) -> None:
    """A question about shapes."""
