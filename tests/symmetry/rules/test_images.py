"""Rules for the pixels of images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

ops = torch.ops.aten
upsample = {"mode": "nearest", "scale_factor": 2}

OPS = [
    Op("avg_pool1d", lambda m, h: F.avg_pool1d(h, 2, padding=1), spatial=1, inference=True),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h, 2, ceil_mode=True), spatial=2),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h.transpose(1, 3), 2), 1, 2),
    Op("avg_pool3d", lambda m, h: F.avg_pool3d(h, 2), spatial=3),
    Op("max_pool1d", lambda m, h: F.max_pool1d(h, 2), spatial=1, inference=True),
    Op("max_pool1d_with_indices", lambda m, h: F.max_pool1d(h, 2, return_indices=True)[0], spatial=1, inference=True),
    Op("max_pool2d", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2, inference=True),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h.permute(0, 2, 1, 3), 2), 1, 2),
    Op("max_pool3d", lambda m, h: F.max_pool3d(h, 2), spatial=3, inference=True),
    Op("max_pool3d_with_indices", lambda m, h: F.max_pool3d(h, 2), spatial=3),
    Op("adaptive_avg_pool1d", lambda m, h: F.adaptive_avg_pool1d(h, 3), spatial=1, inference=True),
    Op("_adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2),
    Op("adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2, inference=True),
    Op("_adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3),
    Op("adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3, inference=True),
    Op("adaptive_max_pool1d", lambda m, h: F.adaptive_max_pool1d(h, 3), spatial=1, inference=True),
    Op("adaptive_max_pool2d", lambda m, h: F.adaptive_max_pool2d(h, 3), spatial=2),
    Op("adaptive_max_pool3d", lambda m, h: F.adaptive_max_pool3d(h, 3), spatial=3),
    Op("upsample_nearest1d", lambda m, h: F.interpolate(h, **upsample), spatial=1),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h, **upsample), spatial=2),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h.transpose(1, 2), **upsample), 1, 2),
    Op("upsample_nearest3d", lambda m, h: F.interpolate(h, **upsample), spatial=3),
    Op("_upsample_nearest_exact1d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=1),
    Op("_upsample_nearest_exact2d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=2),
    Op("_upsample_nearest_exact3d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=3),
    Op("upsample_linear1d", lambda m, h: F.interpolate(h, 7, mode="linear"), spatial=1),
    Op("upsample_bilinear2d", lambda m, h: F.interpolate(h, 7, mode="bilinear"), spatial=2),
    Op("_upsample_bilinear2d_aa", lambda m, h: F.interpolate(h, 3, mode="bilinear", antialias=True), spatial=2),
    Op("upsample_bicubic2d", lambda m, h: F.interpolate(h, 7, mode="bicubic"), spatial=2),
    Op("upsample_trilinear3d", lambda m, h: F.interpolate(h, 3, mode="trilinear"), spatial=3),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
