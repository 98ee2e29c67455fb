"""Rules for backward formulas: the gradient of something in h, with another function of h as what comes from above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import FIXED, constant
from lightning_ecopt.symmetry.scales import Relations
from tests.symmetry.rules.ops import Op, check, directly, every

EPS = 1.0  # so large that a freedom which only it breaks cannot be missed
GAIN, KERNEL, SLOPE = {"w": (4,)}, {"w": (3, 4, 2)}, {"s": (4,)}


def same(h: Tensor) -> Tensor:
    return h


def moved(h: Tensor) -> Tensor:
    """The gradient of each channel has the scale of another one."""
    return h.roll(1, 1)


def _gradient(of: Callable[[Tensor], Tensor], h: Tensor, above: Callable[[Tensor], Tensor] = moved) -> Tensor:
    with torch.enable_grad():
        h = h if h.requires_grad else h.detach().requires_grad_()
        y = of(h)
        return torch.autograd.grad(y, h, above(y), create_graph=True)[0]


def _of_weight(of: Callable[..., Tensor], h: Tensor, *weights: Tensor, above: Tensor | None = None) -> Tensor:
    """Gradients of parameters, as features of all rows."""
    with torch.enable_grad():
        h = h if h.requires_grad else h.detach().requires_grad_()
        weights = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in weights)
        y = of(h, *weights)
        found = torch.autograd.grad(y, weights, y if above is None else above, create_graph=True)
        return torch.cat([g.flatten() for g in found]).expand(8, -1)


def _table(m: Any, h: Tensor) -> Tensor:
    """The gradient of an embedding: sums of rows of h."""
    with torch.enable_grad():
        table = torch.ones(3, 4, dtype=h.dtype, requires_grad=True)
        y = F.embedding(torch.arange(8) % 3, table)
        return h.relu() + torch.autograd.grad(y, table, h, create_graph=True)[0].sum(0)


def _sampled(h: Tensor, other: Tensor, to_grid: bool = False) -> Tensor:
    spatial = h.ndim - 2
    with torch.enable_grad():
        h = h if h.requires_grad else h.detach().requires_grad_()
        grid = F.affine_grid(torch.eye(spatial, spatial + 1, dtype=h.dtype).expand(8, -1, -1) * 0.8, h.shape, False)
        grid.requires_grad_(to_grid)
        y = F.grid_sample(h, grid, align_corners=False)
        return torch.autograd.grad(y, grid if to_grid else h, other, create_graph=True)[0]


def _tangent(of: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """The derivative at h in the direction of h."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(of(forward_ad.make_dual(h, h.abs()))).tangent


def _convolved(m: Any, h: Tensor, **options: Any) -> Tensor:
    return _gradient(lambda t: F.conv1d(t, m.w, **options).relu(), h, torch.ones_like)


def _normed(norm: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Of inputs that are fixed; g has the labels of h."""
    with torch.enable_grad():
        t = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view(h.shape).requires_grad_()
        return torch.autograd.grad(norm(t), t, h, create_graph=True)[0]


def _group_norm(h: Tensor, groups: int, gain: Tensor | None = None) -> Tensor:
    t = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view(h.shape)
    _, mean, rstd = torch.native_group_norm(t, gain, None, 8, 4, 4, groups, EPS)
    return torch.ops.aten.native_group_norm_backward(h, t, mean, rstd, gain, 8, 4, 4, groups, [True, False, False])[0]


def _batch_norm(m: Any, t: Tensor, w: Tensor | None, training: bool = True) -> Tensor:
    return F.batch_norm(t, m.known * 0, m.known * 1, w, None, training, eps=EPS)


def _smooth(name: str, of: Callable[[Tensor], Tensor]) -> list[Op]:
    """The gradient with respect to inputs that are fixed; g has the labels of h."""

    def call(m: Any, h: Tensor) -> Tensor:
        with torch.enable_grad():
            t = (h.detach() * 0 + m.known).requires_grad_()
            y = of(t)
            return torch.autograd.grad(y, t, h.abs().reshape(y.shape), create_graph=True)[0]

    return [
        Op(f"{name}_backward", call),
        Op(f"{name}_backward", lambda m, h: _gradient(of, h, lambda y: torch.ones_like(y)), 0),
    ]


def _loss(name: str, of: Callable[..., Tensor]) -> list[Op]:
    def call(m: Any, h: Tensor, inner: bool) -> Tensor:
        with torch.enable_grad():
            t = (torch.full_like(h, 0.3) if not inner else h.sigmoid()).detach().requires_grad_()
            y = of(t, m.known.expand(8, 4))
            return torch.autograd.grad(y, t, h.abs().sum(), create_graph=True)[0] * h

    return [Op(f"{name}_backward", lambda m, h: call(m, h, False), 1)]


OPS = [
    # By the sign
    Op("leaky_relu_backward", lambda m, h: _gradient(lambda t: F.leaky_relu(t, 0.1), h)),
    Op("leaky_relu_backward", lambda m, h: _gradient(lambda t: F.leaky_relu(t, 0.1).roll(1, 1), h, same)),
    Op("leaky_relu_backward", lambda m, h: _gradient(lambda t: F.leaky_relu_(t.roll(1, 1)), h, torch.ones_like)),
    Op("threshold_backward", lambda m, h: _gradient(torch.relu, h)),
    Op("threshold_backward", lambda m, h: _gradient(lambda t: F.threshold(t, 0.5, 0.0), h, torch.ones_like), 0),
    Op("_prelu_kernel_backward", lambda m, h: _gradient(lambda t: F.prelu(t, m.s), h), 4, 0, SLOPE),
    Op("_prelu_kernel_backward", lambda m, h: _of_weight(F.prelu, h, m.s, above=h), 4, 0, SLOPE),
    Op("rrelu_with_noise_backward", lambda m, h: _gradient(lambda t: F.rrelu(t), h)),
    Op("hardtanh_backward", lambda m, h: _gradient(F.hardtanh, h, torch.ones_like), 0),
    Op("native_dropout_backward", lambda m, h: torch.ops.aten.native_dropout_backward(h, h > 0, 2.0)),
    # By values
    *_smooth("elu", F.elu),
    *_smooth("gelu", F.gelu),
    *_smooth("hardshrink", F.hardshrink),
    Op("hardsigmoid_backward", lambda m, h: torch.ops.aten.hardsigmoid_backward(
        h, m.known.expand(8, 4)), counted=False),
    *_smooth("hardswish", F.hardswish),
    *_smooth("log_sigmoid", F.logsigmoid),
    *_smooth("sigmoid", torch.sigmoid),
    *_smooth("softplus", F.softplus),
    *_smooth("softshrink", F.softshrink),
    *_smooth("tanh", torch.tanh),
    *_loss("mse_loss", F.mse_loss),
    *_loss("smooth_l1_loss", F.smooth_l1_loss),
    *_loss("huber_loss", F.huber_loss),
    *_loss("binary_cross_entropy", F.binary_cross_entropy),
    Op("silu_backward", lambda m, h: torch.ops.aten.silu_backward(h, m.known.expand(8, 4)), counted=False),
    Op("mish_backward", lambda m, h: torch.ops.aten.mish_backward(h, m.known.expand(8, 4)), counted=False),
    Op("glu_backward", lambda m, h: _gradient(lambda t: F.glu(t, 1), h, torch.ones_like), 2),
    Op("glu_backward", lambda m, h: _gradient(lambda t: F.glu(t, 1), h, same), 2),
    Op("_softmax_backward_data", lambda m, h: torch.ops.aten._softmax_backward_data(
        h, m.known.expand(8, 4).softmax(1), 1, h.dtype), 1),
    Op("_softmax_backward_data", lambda m, h: _gradient(lambda t: t.softmax(1), h, moved), 0),
    Op("_log_softmax_backward_data", lambda m, h: torch.ops.aten._log_softmax_backward_data(
        h, m.known.expand(8, 4).log_softmax(1), 1, h.dtype), 1),
    # Moved, picked and pooled
    Op("slice_backward", lambda m, h: _gradient(lambda t: t[:, 1:3].relu(), h) + h, 3),
    Op("slice_backward", lambda m, h: _gradient(lambda t: t[:, ::2], h, lambda y: h[:, 1::2]) + 0 * h, 4),
    Op("slice_backward", lambda m, h: _gradient(lambda t: t[:, :, -3:], h, same), spatial=1),
    Op("select_backward", lambda m, h: _gradient(lambda t: t[:, -2], h, lambda y: h[:, 1]) + h, 3),
    Op("select_backward", lambda m, h: _gradient(lambda t: t[:, :, -1], h, same) + h, spatial=1),
    Op("diagonal_backward", lambda m, h: _gradient(lambda t: t.diagonal(-1, 2, 3), h, same), spatial=2),
    Op("diagonal_backward", lambda m, h: _gradient(lambda t: t.diagonal(0, 0, 2), h, moved), 4, 1),
    Op("unfold_backward", lambda m, h: _gradient(lambda t: t.unfold(2, 3, 1), h, same), spatial=1),
    Op("unfold_backward", lambda m, h: _gradient(lambda t: t.unfold(1, 2, 2), h, same), 1, complete=False),
    Op("embedding_dense_backward", _table),
    Op("reflection_pad1d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1, 2), "reflect"), h), 4, 1),
    Op("reflection_pad2d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1, 2, 1, 1), "reflect"), h), 4, 2),
    Op("reflection_pad3d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1,) * 6, "reflect"), h), 4, 3),
    Op("replication_pad1d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1, 2), "replicate"), h), 4, 1),
    Op("replication_pad2d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1, 2, 1, 1), "replicate"), h), 4, 2),
    Op("replication_pad3d_backward", lambda m, h: _gradient(lambda t: F.pad(t, (1,) * 6, "replicate"), h), 4, 3),
    Op("avg_pool2d_backward", lambda m, h: _gradient(lambda t: F.avg_pool2d(t, 2), h), 4, 2),
    Op("avg_pool3d_backward", lambda m, h: _gradient(lambda t: F.avg_pool3d(t, 2), h), 4, 3),
    Op("_adaptive_avg_pool2d_backward", lambda m, h: _gradient(lambda t: F.adaptive_avg_pool2d(t, 2), h), 4, 2),
    Op("_adaptive_avg_pool3d_backward", lambda m, h: _gradient(lambda t: F.adaptive_avg_pool3d(t, (2, 1, 2)), h), 4, 3),
    Op("max_pool2d_with_indices_backward", lambda m, h: _gradient(lambda t: F.max_pool2d(t, 2), h), 4, 2),
    Op("max_pool2d_with_indices_backward", lambda m, h: _gradient(
        lambda t: F.max_pool1d(t, 2), h, torch.ones_like), 4, 1),
    Op("max_pool3d_with_indices_backward", lambda m, h: _gradient(lambda t: F.max_pool3d(t, 2), h), 4, 3),
    Op("adaptive_max_pool2d_backward", lambda m, h: _gradient(lambda t: F.adaptive_max_pool2d(t, 2), h), 4, 2),
    Op("adaptive_max_pool3d_backward", lambda m, h: _gradient(lambda t: F.adaptive_max_pool3d(t, (2, 1, 2)), h), 4, 3),
    *(
        Op(f"{name}_backward" if "2d" in name else f"{name}{n}d_backward", lambda m, h, mode=mode, o=o: _gradient(
            lambda t: F.interpolate(t, scale_factor=2, mode=mode, **o), h), 4, n)
        for name, mode, sizes, o in (
            ("upsample_nearest", "nearest", (1, 2, 3), {}),
            ("_upsample_nearest_exact", "nearest-exact", (1, 2, 3), {}),
            ("upsample_linear", "linear", (1,), {}),
            ("upsample_bilinear", "bilinear", (2,), {}),
            ("upsample_bicubic", "bicubic", (2,), {}),
            ("upsample_trilinear", "trilinear", (3,), {}),
            ("_upsample_bilinear2d_aa", "bilinear", (2,), {"antialias": True}),
            ("_upsample_bicubic2d_aa", "bicubic", (2,), {"antialias": True}),
        )
        for n in sizes
    ),
    Op("grid_sampler_2d_backward", lambda m, h: _sampled(h, moved(h)), 4, 2),
    Op("grid_sampler_2d_backward", lambda m, h: _sampled(h, h, to_grid=True), 1, 2),
    Op("grid_sampler_3d_backward", lambda m, h: _sampled(h, moved(h)), 4, 3),
    # Convolutions and normalisations
    Op("convolution_backward", _convolved, 4 + 1, 1, KERNEL),
    Op("convolution_backward", lambda m, h: _convolved(m, h, groups=2), 4 + 2, 1, {"w": (4, 2, 2)}),
    Op("convolution_backward", lambda m, h: _gradient(
        lambda t: F.conv_transpose1d(t, m.w, groups=2), h, same), 4 + 2, 1, {"w": (4, 3, 2)}),
    Op("convolution_backward", lambda m, h: _gradient(lambda t: F.conv1d(t, h[:3, :, :2]), h, same), 1, 1),
    Op("convolution_backward", lambda m, h: _of_weight(F.conv1d, h, m.w, m.b), 4 + 3, 1, {**KERNEL, "b": (3,)}),
    Op("convolution_backward", lambda m, h: _of_weight(
        lambda h, w: F.conv1d(h, w, groups=2), h, m.w), 4 + 6, 1, {"w": (6, 2, 2)}),
    Op("convolution_backward", lambda m, h: _of_weight(
        lambda h, w: F.conv_transpose1d(h, w, groups=2), h, m.w), 4 + 6, 1, {"w": (4, 3, 2)}),
    Op("native_layer_norm_backward", lambda m, h: _normed(
        lambda t: F.layer_norm(t, (4,), m.w, eps=EPS), h), 1 + 4, 0, GAIN),
    Op("native_layer_norm_backward", lambda m, h: _gradient(
        lambda t: F.layer_norm(t, (4,), m.w, eps=EPS), h, same), 1, 0, GAIN),
    Op("native_layer_norm_backward", lambda m, h: _of_weight(
        lambda h, w: F.layer_norm(h, (4,), w, eps=EPS), h, m.w, above=h), 1, 0, GAIN),
    Op("native_group_norm_backward", lambda m, h: _group_norm(h, 2), 2, 1, counted=False),
    Op("native_group_norm_backward", lambda m, h: _group_norm(h, 2, m.w), 6, 1, GAIN, counted=False),
    Op("native_batch_norm_backward", lambda m, h: _normed(lambda t: _batch_norm(m, t, m.w), h), 4 + 4, 0, GAIN),
    Op("native_batch_norm_backward", lambda m, h: _gradient(lambda t: _batch_norm(m, t, m.w), h, same), 4, 0, GAIN),
    Op("native_batch_norm_backward", lambda m, h: _gradient(
        lambda t: _batch_norm(m, t, None, False), h, same), 0, complete=False),  # linear, as eps is all that divides
    # Forward mode
    Op("_efficientzerotensor", lambda m, h: _tangent(
        lambda t: F.linear(t, m.w, m.b), h), 4 + 3, 0, {"w": (3, 4), "b": (3,)}),
    Op("prims::add", lambda m, h: _tangent(lambda t: (t + m.b).relu().roll(1, 1) + t, h), 1, 0, {"b": (4,)}),
    Op("prims::add", lambda m, h: _tangent(lambda t: (t + m.known).relu(), h), 0, complete=False),  # known is not zero
    Op("prims::mul", lambda m, h: _tangent(lambda t: t * m.b, h), 4 + 4, 0, {"b": (4,)}),
    Op("prims::mul", lambda m, h: _tangent(lambda t: t / m.b + t, h), 4, 0, {"b": (4,)}),
    Op("is_same_size", lambda m, h: _tangent(lambda t: t.relu().square(), h)),
    Op("_has_same_storage_numel", lambda m, h: _tangent(lambda t: F.leaky_relu(t.roll(1, 1)), h)),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


@pytest.mark.parametrize("name", ["cudnn_batch_norm_backward", "miopen_batch_norm_backward", "batch_norm_backward"])
def test_batch_norm_of_other_devices(name: str) -> None:
    equations = Equations({})
    above, gain = equations.fresh((1, 4, 1)), equations.fresh((4,))
    x, w = torch.randn(8, 4, 3), torch.randn(4)
    given = "grad_out" if name == "batch_norm_backward" else "grad_output"
    tensors = {given: (x.clone(), above), "input": (x, constant(FIXED, 3)), "weight": (w, gain)}
    to_input, to_gain, to_bias = directly(name, equations, (x, w, w), tensors)
    assert (to_gain == above.ravel()).all()
    assert (to_bias == above.ravel()).all()
    product = Relations(np.stack([to_input.ravel(), above.ravel(), gain], 1), (1, -1, -1))
    assert (equations.relations[0].scales == product.scales).all()
    assert equations.relations[0].coefficients == product.coefficients


def test_rms_norm_of_other_devices() -> None:
    equations = Equations({})
    above, gain = equations.fresh((1, 4)), equations.fresh((4,))
    x, w = torch.randn(8, 4), torch.randn(4)
    tensors = {"grad_out": (x.clone(), above), "input": (x, constant(FIXED, 2)), "weight": (w, gain)}
    to_input, to_gain = directly("_fused_rms_norm_backward", equations, (x, w), tensors, normalized_shape=[4])
    assert to_input.shape == (1, 1)  # a mean of the products is subtracted
    assert (to_gain == above.ravel()).all()
