"""Rules for sums, means, extremes and norms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

ops = torch.ops.aten

OPS = [
    Op("sum", lambda m, h: h.sum(2), spatial=1),
    Op("sum", lambda m, h: h.sum(1, keepdim=True), 1),
    Op("sum", lambda m, h: h.sum() + 0 * h[:, :1], 1, 1),
    Op("sum", lambda m, h: out_of(torch.sum)(h.detach(), (1, 2)), 1, 1),
    Op("mean", lambda m, h: h.mean((-1, -2)), spatial=2),
    Op("mean", lambda m, h: h.mean(0) + 0 * h),
    Op("mean", lambda m, h: h.mean(1), 1),
    Op("amax", lambda m, h: h.amax(-1), spatial=1),
    Op("amax", lambda m, h: h.amax((0, 1)) + 0 * h[:, :1], 1),
    Op("amin", lambda m, h: h.amin(1), 1),
    Op("nansum", lambda m, h: h.nansum(2), spatial=1),
    Op("nansum", lambda m, h: h.nansum(1), 1),
    Op("nanmean", lambda m, h: h.nanmean(2), spatial=1, inference=True),
    Op("max", lambda m, h: h.max(2).values, spatial=1),
    Op("max", lambda m, h: h.max(1, keepdim=True).values, 1),
    Op("max", lambda m, h: h.max() + 0 * h[:, :1], 1),
    Op("max", lambda m, h: torch.cat([h, h.max(2, keepdim=True).indices.expand(8, 4, 2).double()], 2), spatial=1),
    Op("max", lambda m, h: h.max(h.roll(1, 1)), 1, inference=True),
    Op("min", lambda m, h: h.min(2).values, spatial=1),
    Op("min", lambda m, h: h.min(0).values + 0 * h),
    Op("min", lambda m, h: h.min(0.5 * h), inference=True),
    Op("cumsum", lambda m, h: h.cumsum(2), spatial=1),
    Op("cumsum", lambda m, h: h.cumsum_(1), 1),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
