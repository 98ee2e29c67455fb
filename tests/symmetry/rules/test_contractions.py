"""Rules for linear maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

ops = torch.ops.aten

OPS = [
    Op("mm", lambda m, h: h @ m.w, 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: (m.w @ h.t()).t(), 4 + 5, shapes={"w": (5, 4)}),
    Op("mm", lambda m, h: out_of(torch.mm)(h.detach(), m.w.detach()), 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: h @ m.matrix, 1),
    Op("mm", lambda m, h: m.matrix.repeat(2, 2) @ h),
    Op("mm", lambda m, h: h @ h.t(), 0),
    Op("mm", lambda m, h: torch.zeros(8, 4, dtype=h.dtype) @ m.w + h, 4, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w, h.relu() @ m.w], 1), 8, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :2], h @ m.w[:, 2:]], 1), 8, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :3], h @ m.w[:, 2:]], 1), 0, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: torch.addmm(m.b, h, m.w), 4 + 5, shapes={"w": (4, 5), "b": (5,)}),
    Op("addmm", lambda m, h: torch.addmm(m.known, h, m.w), 4, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: h.clone().addmm_(h, m.w), 4, shapes={"w": (4, 4)}),
    Op("bmm", lambda m, h: torch.bmm(h, m.w.expand(8, 4, 5)), 1 + 5, 1, shapes={"w": (4, 5)}),
    Op("bmm", lambda m, h: torch.bmm(m.w.expand(8, 5, 4), h), 4 + 5, 1, shapes={"w": (5, 4)}),
    Op(
        "bmm",
        lambda m, h: torch.bmm(h.reshape(8, 2, 2).transpose(0, 1), m.w).transpose(0, 1),
        4 + 6,
        shapes={"w": (2, 2, 3)},
    ),
    Op("bmm", lambda m, h: torch.bmm(h, h.transpose(1, 2)), 0, 1),
    Op("baddbmm", lambda m, h: torch.baddbmm(m.b, m.w.expand(8, 5, 4), h), 4 + 5, 1, {"w": (5, 4), "b": (5, 1)}),
    Op("mv", lambda m, h: torch.mv(h, m.w), 4 + 1, shapes={"w": (4,)}),
    Op("mv", lambda m, h: torch.mv(m.w, h[0]) + 0 * h[:, :1], 4 + 5, shapes={"w": (5, 4)}),
    Op("addmv", lambda m, h: torch.addmv(m.b, h, m.w), 4 + 1, shapes={"w": (4,), "b": (1,)}),
    Op("linear", lambda m, h: F.linear(h, m.w, m.b), 4 + 5, shapes={"w": (5, 4), "b": (5,)}, inference=True),
    Op("linear", lambda m, h: F.linear(h, m.w), 1 + 5, 1, shapes={"w": (5, 4)}, inference=True),
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.b), 4 + 6, 1, {"w": (6, 4, 2), "b": (6,)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, None, 2, 1, 2), 4 + 3, 2, {"w": (3, 4, 2, 2)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, groups=2), 4 + 6, 2, {"w": (6, 2, 2, 2)}),
    Op("convolution", lambda m, h: F.conv3d(h, m.w, m.b, groups=4), 4 + 4, 3, {"w": (4, 1, 2, 2, 2), "b": (4,)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(h, m.w, m.b), 4 + 3, 1, {"w": (4, 3, 2), "b": (3,)}),
    Op("convolution", lambda m, h: F.conv_transpose2d(h, m.w, groups=2), 4 + 6, 2, {"w": (4, 3, 2, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :, None]), 1, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :2, None], groups=2), 2, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.known), 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h.roll(1, 1), m.w) + h[:, :, 1:], 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: h + F.conv1d(torch.zeros_like(h), m.w, m.b), 4, 1, {"w": (4, 4, 1), "b": (4,)}),
    Op("_convolution", lambda m, h: torch._convolution(
        h, m.w, None, [1], [0], [1], False, [0], 1, False, False, False, False), 4 + 3, 1, {"w": (3, 4, 2)}, True),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
