"""Rules for the pixels of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ecopt.symmetry.equations import Equations
from tests.symmetry.rules.ops import Op, check, directly, every, traced

CONV = {"w": (3, 4, 1, 1)}
upsample = {"mode": "nearest", "scale_factor": 2}


def _unpooled(h: Tensor, spatial: int) -> Tensor:
    """Maxima put back where they came from."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
    unpool = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)[spatial - 1]
    values, indices = pool(h, 2, return_indices=True)
    return unpool(values, indices, 2)


def _placed(h: Tensor) -> Tensor:
    """Pixels put somewhere in an image of twice the size."""
    pool, unpool = (F.max_pool2d, F.max_unpool2d) if h.ndim == 4 else (F.max_pool3d, F.max_unpool3d)
    _, indices = pool(torch.rand(*h.shape[:2], *(2 * size for size in h.shape[2:])), 2, return_indices=True)
    return unpool(h, indices, 2)


def _sampled(h: Tensor, mode: str = "bilinear", padding: str = "zeros", moved: Any = 0) -> Tensor:
    spatial = h.ndim - 2
    matrix = torch.eye(spatial, spatial + 1, dtype=h.dtype).expand(8, -1, -1) * 0.8
    grid = F.affine_grid(matrix, (8, h.shape[1], *(2,) * spatial), align_corners=False)
    return F.grid_sample(h, grid + moved, mode, padding, align_corners=False)


def _shuffled(h: Tensor, groups: int) -> Tensor:
    return (
        torch.native_channel_shuffle(h, groups) if traced() else F.channel_shuffle(h, groups)
    )  # the one has no gradient


MIXED: dict[tuple[str, int, bool], Callable[[Tensor], Tensor]] = {
    ("avg_pool1d", 1, True): lambda h: F.avg_pool1d(h, 2),
    ("avg_pool2d", 2, False): lambda h: F.avg_pool2d(h, 2),
    ("avg_pool3d", 3, False): lambda h: F.avg_pool3d(h, (1, 1, 2)),
    ("max_pool1d", 1, True): lambda h: F.max_pool1d(h, 2),
    ("max_pool1d_with_indices", 1, True): lambda h: F.max_pool1d(h, 2, return_indices=True)[0],
    ("max_pool2d", 2, True): lambda h: F.max_pool2d(h, 2),
    ("max_pool2d_with_indices", 2, False): lambda h: F.max_pool2d(h, 2),
    ("max_pool3d", 3, True): lambda h: F.max_pool3d(h, (1, 1, 2)),
    ("max_pool3d_with_indices", 3, False): lambda h: F.max_pool3d(h, (1, 1, 2)),
    ("adaptive_avg_pool1d", 1, True): lambda h: F.adaptive_avg_pool1d(h, 3),
    ("adaptive_avg_pool2d", 2, True): lambda h: F.adaptive_avg_pool2d(h, 3),
    ("_adaptive_avg_pool2d", 2, False): lambda h: F.adaptive_avg_pool2d(h, 3),
    ("adaptive_avg_pool3d", 3, True): lambda h: F.adaptive_avg_pool3d(h, 3),
    ("_adaptive_avg_pool3d", 3, False): lambda h: F.adaptive_avg_pool3d(h, 3),
    ("adaptive_max_pool1d", 1, True): lambda h: F.adaptive_max_pool1d(h, 3),
    ("adaptive_max_pool2d", 2, False): lambda h: F.adaptive_max_pool2d(h, 3),
    ("adaptive_max_pool3d", 3, False): lambda h: F.adaptive_max_pool3d(h, 2),
    ("fractional_max_pool2d", 2, False): lambda h: F.fractional_max_pool2d(h, 2, 3),
    ("fractional_max_pool3d", 3, False): lambda h: F.fractional_max_pool3d(h, (1, 1, 2), (1, 1, 2)),
    ("max_unpool2d", 2, False): lambda h: _placed(h),
    ("max_unpool3d", 3, False): lambda h: _placed(h),
    ("upsample_nearest1d", 1, False): lambda h: F.interpolate(h, 5),
    ("upsample_nearest2d", 2, False): lambda h: F.interpolate(h, 5),
    ("upsample_nearest3d", 3, False): lambda h: F.interpolate(h, (2, 2, 5)),
    ("_upsample_nearest_exact1d", 1, False): lambda h: F.interpolate(h, 5, mode="nearest-exact"),
    ("_upsample_nearest_exact2d", 2, False): lambda h: F.interpolate(h, 5, mode="nearest-exact"),
    ("_upsample_nearest_exact3d", 3, False): lambda h: F.interpolate(h, (2, 2, 5), mode="nearest-exact"),
    ("upsample_linear1d", 1, False): lambda h: F.interpolate(h, 5, mode="linear"),
    ("upsample_bilinear2d", 2, False): lambda h: F.interpolate(h, 5, mode="bilinear"),
    ("_upsample_bilinear2d_aa", 2, False): lambda h: F.interpolate(h, 5, mode="bilinear", antialias=True),
    ("upsample_bicubic2d", 2, False): lambda h: F.interpolate(h, 5, mode="bicubic"),
    ("_upsample_bicubic2d_aa", 2, False): lambda h: F.interpolate(h, 5, mode="bicubic", antialias=True),
    ("upsample_trilinear3d", 3, False): lambda h: F.interpolate(h, (2, 2, 5), mode="trilinear"),
    ("grid_sampler_2d", 2, False): lambda h: _sampled(h),
    ("grid_sampler_3d", 3, False): lambda h: _sampled(h),
    ("pixel_unshuffle", 2, False): lambda h: F.pixel_unshuffle(h, 2).sum(1),
    ("im2col", 2, False): lambda h: F.unfold(h, 2),
    ("col2im", 1, False): lambda h: F.fold(h, (3, 3), 2),
}  # fmt: skip

OPS = [
    # All pixels of a channel have one label, and it may be that channels lie among the pixels
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h.transpose(1, 3), 2), 1, 2, complete=False),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h.flatten(2), 2), 1, 2, complete=False),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h.permute(0, 2, 1, 3), 2), 1, 2, complete=False),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h.transpose(1, 2), **upsample), 1, 2, complete=False),
    Op("grid_sampler_2d", lambda m, h: _sampled(h.transpose(1, 3)), 1, 2, complete=False),
    Op("pixel_shuffle", lambda m, h: F.pixel_shuffle(h, 2), 1, 2, complete=False),
    Op("pixel_shuffle", lambda m, h: F.pixel_shuffle(h.mean((2, 3), keepdim=True), 2).mean(3), 1, 2, complete=False),
    Op("col2im", lambda m, h: F.fold(h, (4, 4), 2, stride=2), 1, 1, complete=False),
    # Pooling
    Op("avg_pool1d", lambda m, h: F.avg_pool1d(h, 2, padding=1), spatial=1, inference=True),
    Op("avg_pool1d", lambda m, h: F.avg_pool1d(h, 3, 1) + h.roll(1, 1)[..., 1:3], 1, spatial=1, inference=True),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h, 2, ceil_mode=True), spatial=2),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h.transpose(1, 3), 3, 1), 1, 2),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(
        h[0, None], 3, 2, 1, count_include_pad=False) + 0 * h[:, :, :1, :2], spatial=2),
    Op("avg_pool3d", lambda m, h: F.avg_pool3d(h, 2), spatial=3),
    Op("max_pool1d", lambda m, h: F.max_pool1d(h, 2), spatial=1, inference=True),
    Op("max_pool1d_with_indices", lambda m, h: F.max_pool1d(h, 2, return_indices=True)[0], spatial=1, inference=True),
    Op("max_pool2d", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2, inference=True),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(
        h, 2) * (F.max_pool2d(h, 2, return_indices=True)[1] + 1), spatial=2),
    Op("max_pool3d", lambda m, h: F.max_pool3d(h, 2), spatial=3, inference=True),
    Op("max_pool3d_with_indices", lambda m, h: F.max_pool3d(h, 2), spatial=3),
    Op("max_unpool2d", lambda m, h: _unpooled(h, 1), spatial=1),
    Op("max_unpool2d", lambda m, h: _unpooled(h, 2), spatial=2),
    Op("max_unpool2d", lambda m, h: _unpooled(h, 2) + h.roll(1, 1), 1, 2),
    Op("max_unpool3d", lambda m, h: _unpooled(h, 3), spatial=3),
    Op("fractional_max_pool2d", lambda m, h: F.fractional_max_pool2d(h, 2, 3), spatial=2),
    Op("fractional_max_pool2d", lambda m, h: F.fractional_max_pool2d(
        h, 2, output_ratio=(0.5, 0.5)) + h.roll(1, 1)[..., :2, :2], 1, 2),
    Op("fractional_max_pool3d", lambda m, h: F.fractional_max_pool3d(h, 1, 1), spatial=3),
    Op("adaptive_avg_pool1d", lambda m, h: F.adaptive_avg_pool1d(h, 3), spatial=1, inference=True),
    Op("_adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2),
    Op("_adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3) + h.roll(1, 1)[..., 1:, 1:], 1, spatial=2),
    Op("adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2, inference=True),
    Op("_adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3),
    Op("adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3, inference=True),
    Op("adaptive_max_pool1d", lambda m, h: F.adaptive_max_pool1d(h, 3), spatial=1, inference=True),
    Op("adaptive_max_pool2d", lambda m, h: F.adaptive_max_pool2d(h, 3), spatial=2),
    Op("adaptive_max_pool3d", lambda m, h: F.adaptive_max_pool3d(h, 3), spatial=3),
    # Resizing
    Op("upsample_nearest1d", lambda m, h: F.interpolate(h, **upsample), spatial=1),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h, **upsample), spatial=2),
    Op("upsample_nearest3d", lambda m, h: F.interpolate(h, **upsample), spatial=3),
    Op("_upsample_nearest_exact1d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=1),
    Op("_upsample_nearest_exact2d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=2),
    Op("_upsample_nearest_exact3d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=3),
    Op("upsample_linear1d", lambda m, h: F.interpolate(h, 7, mode="linear"), spatial=1),
    Op("upsample_linear1d", lambda m, h: F.interpolate(h.mT, 7, mode="linear"), 1, spatial=1),
    Op("upsample_bilinear2d", lambda m, h: F.interpolate(h, 5, mode="bilinear"), spatial=2),
    Op("upsample_bilinear2d", lambda m, h: F.interpolate(h.mT, 3, mode="bilinear", align_corners=True), spatial=2),
    Op("_upsample_bilinear2d_aa", lambda m, h: F.interpolate(h, 3, mode="bilinear", antialias=True), spatial=2),
    Op("upsample_bicubic2d", lambda m, h: F.interpolate(h, 5, mode="bicubic"), spatial=2),
    Op("_upsample_bicubic2d_aa", lambda m, h: F.interpolate(h, 3, mode="bicubic", antialias=True), spatial=2),
    Op("_upsample_bicubic2d_aa", lambda m, h: F.interpolate(
        h.transpose(1, 2), 3, mode="bicubic", antialias=True), 1, spatial=2),
    Op("upsample_trilinear3d", lambda m, h: F.interpolate(h, 3, mode="trilinear"), spatial=3),
    # Where is decided by a grid
    Op("grid_sampler_2d", lambda m, h: _sampled(h), spatial=2),
    Op("grid_sampler_2d", lambda m, h: _sampled(h, "nearest", "border"), spatial=2),
    Op("grid_sampler_2d", lambda m, h: _sampled(h, "bicubic", "reflection") + h.roll(1, 1)[..., :2, :2], 1, spatial=2),
    Op("grid_sampler_2d", lambda m, h: _sampled(h, moved=h[:, :2, :2, :2].movedim(1, 3) / 9), 2, 2),
    Op("grid_sampler_2d", lambda m, h: _sampled(h, moved=m.w), 4, 2, {"w": (2,)}),
    Op("grid_sampler_2d", lambda m, h: _sampled(m.w.expand(8, 4, 4, 4)) + h[..., :2, :2], 4, 2, {"w": (4, 4, 4)}),
    Op("grid_sampler_3d", lambda m, h: _sampled(h), spatial=3),
    Op("grid_sampler_3d", lambda m, h: _sampled(h, moved=h[:, :3].movedim(1, 4) / 9), 1, 3),
    Op("pixel_shuffle", lambda m, h: F.pixel_shuffle(h, 2).mean((2, 3)), 1, 2),
    Op("pixel_shuffle", lambda m, h: F.pixel_shuffle(torch.cat([h, h.roll(1, 1)], 1), 2).mean((2, 3)), 1, 2),
    Op("pixel_shuffle", lambda m, h: F.conv2d(
        F.pixel_shuffle(F.conv2d(h, m.v), 2), m.w), 4 + 2 + 3, 2, {"v": (8, 4, 1, 1), "w": (3, 2, 2, 2)}),
    Op("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h, 2), spatial=2),
    Op("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h, 2)[:, :4] + h[:, :, ::2, ::2], 1, spatial=2),
    Op("pixel_unshuffle", lambda m, h: F.conv2d(F.pixel_unshuffle(h, 2), m.w), 4 + 3, 2, {"w": (3, 16, 1, 1)}),
    Op("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h[:, 0], 2) + F.pixel_unshuffle(h[:, 1], 2), 3, 2),
    Op("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h.sum(1, keepdim=True), 2), 1, 2),
    Op("channel_shuffle", lambda m, h: F.channel_shuffle(h, 2) + h, 3, 2, inference=True),
    Op("channel_shuffle", lambda m, h: F.channel_shuffle(
        h.mean(1, keepdim=True).expand_as(h), 2), 1, 2, inference=True),
    Op("native_channel_shuffle", lambda m, h: _shuffled(h, 2) + h, 3, 2),
    Op("native_channel_shuffle", lambda m, h: _shuffled(torch.cat([h, h[:, :2]], 1), 3)[:, :4] + h, 1, 2),
    Op("im2col", lambda m, h: F.unfold(h, 2), spatial=2),
    Op("im2col", lambda m, h: F.unfold(h, (2, 3), padding=1, stride=2, dilation=1), spatial=2),
    Op("im2col", lambda m, h: F.unfold(h, 2, stride=2)[:, :4] + h[:, :, 0], 1, spatial=2),
    Op("im2col", lambda m, h: F.linear(F.unfold(h, 2, stride=2).mT, m.w), 4 + 3, 2, {"w": (3, 16)}),
    Op("im2col", lambda m, h: F.unfold(h[0], 2, stride=2).expand(8, 16, 4) + 0 * F.unfold(h, 2, stride=2), spatial=2),
    Op("im2col", lambda m, h: F.unfold(h.sum(1, keepdim=True), 2, stride=2), 1, spatial=2),
    Op("col2im", lambda m, h: F.fold(h, (3, 3), 2), 1, 1),
    Op("col2im", lambda m, h: F.fold(h, (5, 1), (2, 1)), 2, 1),
    Op("col2im", lambda m, h: F.fold(h.sum(1, keepdim=True).expand(8, 4, 4), (3, 3), 2), 1, 1),
    Op("col2im", lambda m, h: F.fold(torch.cat([h, h.relu()], 1), (3, 3), 2).sum((2, 3)), 1, 1),
    Op("col2im", lambda m, h: F.fold(F.unfold(h, 3, padding=1), (4, 4), 3, padding=1), 4, 2),

    # Other labels among the pixels
    *(Op(name, lambda m, h, f=f: f(h.transpose(1, -1)).mean(-1), 1, spatial, inference=inference)
      for (name, spatial, inference), f in MIXED.items()),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


def test_one_dimensional_average_wants_one_label_along_its_axis() -> None:
    equations = Equations({})
    image = torch.zeros(2, 4, 3)
    output = directly(
        "_adaptive_avg_pool1d", equations, torch.zeros(2, 4, 1), {"self": (image, equations.fresh((1, 4, 3)))}
    )
    assert output.shape == (1, 4, 1)
    assert {tuple(pair) for pair in np.concatenate(equations.equalities)} == {
        (3 * row + k + 1, 3 * row + 3) for row in range(4) for k in range(2)
    }
