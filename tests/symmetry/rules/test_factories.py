"""Rules for new tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.symmetry.rules.ops import Op, check, every, out_of


def _one_pixel(m: Any, h: Tensor) -> Tensor:
    y = h.clone()
    y[:, :, 1] = 0
    y[:, :, 2] = 1
    return y.relu()


def _one_column(m: Any, h: Tensor) -> Tensor:
    y = h.clone()
    y[:, 1] = m.known[0]
    return y


OPS = [
    Op("zeros", lambda m, h: h + torch.zeros(4, dtype=h.dtype)),
    Op("zeros", lambda m, h: out_of(torch.zeros)(4) + h),
    Op("zeros", lambda m, h: h + torch.zeros((), dtype=h.dtype)),
    Op("zeros_like", lambda m, h: torch.zeros_like(h).add_(h)),
    Op("zeros_like", lambda m, h: h + torch.zeros_like(m.w), 4, 0, {"w": (4,)}),
    Op("new_zeros", lambda m, h: h + h.new_zeros(4)),
    Op("zeros_like", lambda m, h: h + torch.zeros_like(h.square())),
    Op("zero", lambda m, h: h + h.clone().zero_()),
    Op("zero", lambda m, h: (h.zero_() + m.b) * 0 + m.b, 4 + 4, 0, {"b": (4,)}),
    Op("full", lambda m, h: h + torch.full((4,), 0.0, dtype=h.dtype)),
    Op("full", lambda m, h: h + torch.full((4,), 0.5, dtype=h.dtype), 0),
    Op("full", lambda m, h: h * torch.full((8, 4), 0.5, dtype=h.dtype).cumsum(1), 4),
    Op("full_like", lambda m, h: h * torch.full_like(h, 0.5) + torch.full_like(h, 0)),
    Op("full_like", lambda m, h: h + torch.full_like(h, 0.5), 0),
    Op("new_full", lambda m, h: h + h.new_full((4,), 0)),
    Op("new_full", lambda m, h: h + h.new_full((4,), 0.5), 0),
    Op("fill", lambda m, h: h + h.clone().fill_(0)),
    Op("fill", lambda m, h: h + h.clone().fill_(0.5), 0),
    Op("fill", lambda m, h: torch.zeros_like(h).fill_(m.known[0]) * h),
    Op("fill", lambda m, h: torch.zeros_like(h).fill_(h.sum()), 1),
    Op("fill", _one_pixel, 4, 1),
    Op("fill", _one_column),
    Op("fill", lambda m, h: torch.empty_like(h).fill_(m.s) * h, 4 + 1, 0, {"s": ()}),
    Op("scalar_tensor", lambda m, h: h + torch.scalar_tensor(0.0)),
    Op("scalar_tensor", lambda m, h: h + torch.scalar_tensor(0.5), 0),
    Op("ones", lambda m, h: h * torch.ones(4)),
    Op("ones", lambda m, h: h + torch.ones(4), 0),
    Op("ones_like", lambda m, h: h * torch.ones_like(h)),
    Op("ones_like", lambda m, h: h + torch.ones_like(h), 0),
    Op("new_ones", lambda m, h: h + h.new_ones(4), 0),
    Op("new_ones", lambda m, h: h * h.new_ones(4)),
    Op("new_ones", lambda m, h: h * h.square().new_ones(8, 4) + h),
    Op("empty", lambda m, h: torch.empty(4).fill_(0) + h),
    Op("empty", lambda m, h: torch.empty(8, 4, dtype=h.dtype).copy_(h) + h.roll(1, 1), 1),
    Op("empty_like", lambda m, h: torch.empty_like(h).copy_(h)),
    Op("new_empty", lambda m, h: h.new_empty(8, 4).copy_(h)),
    Op("empty_strided", lambda m, h: torch.empty_strided((8, 4), (1, 8), dtype=h.dtype).copy_(h)),
    Op("new_empty_strided", lambda m, h: h.new_empty_strided((8, 4), (1, 8)).copy_(h)),
    Op("empty_permuted", lambda m, h: torch.empty_permuted((8, 4), (1, 0), dtype=h.dtype).copy_(h)),
    Op("rand", lambda m, h: h * torch.rand(4)),
    Op("rand", lambda m, h: h + torch.rand(4), 0),
    Op("rand_like", lambda m, h: h + torch.rand_like(h), 0),
    Op("rand_like", lambda m, h: h * torch.rand_like(h)),
    Op("randn", lambda m, h: h + torch.randn(4), 0),
    Op("randn", lambda m, h: h * torch.randn(4)),
    Op("randn_like", lambda m, h: h + torch.randn_like(h), 0),
    Op("randn_like", lambda m, h: h * torch.randn_like(h)),
    Op("randint", lambda m, h: h + torch.randint(1, 4, (4,)), 0),
    Op("randint", lambda m, h: h * torch.randint(1, 4, (4,))),
    Op("randint_like", lambda m, h: h + torch.randint_like(h, 1, 4), 0),
    Op("randint_like", lambda m, h: h * torch.randint_like(h, 1, 4)),
    Op("randperm", lambda m, h: h + torch.randperm(4), 0),
    Op("randperm", lambda m, h: h * torch.randperm(4)),
    Op("arange", lambda m, h: h + torch.arange(4), 0, complete=False),  # its zero could be known
    Op("arange", lambda m, h: h * torch.arange(4.0)),
    Op("arange", lambda m, h: h + torch.arange(1, 5), 0),
    Op("linspace", lambda m, h: torch.linspace(1.0, h.sum(), 8) * torch.linspace(h.sum(), 1.0, 8), 0),
    Op("linspace", lambda m, h: h * torch.linspace(1, 2, 4)),
    Op("linspace", lambda m, h: torch.linspace(h.sum(), 1.0, 8), 0),
    Op("linspace", lambda m, h: h + torch.linspace(1, 2, 4), 0),
    Op("linspace", lambda m, h: h * torch.linspace(1, 2, 4).new_ones(4)),
    Op("eye", lambda m, h: h @ torch.eye(4, dtype=h.dtype), 1, complete=False),  # its zeros could be known
    Op("eye", lambda m, h: h + torch.eye(4, dtype=h.dtype)[0], 0, complete=False),  # its zeros could be known
    Op("eye", lambda m, h: h * torch.eye(8, 4, dtype=h.dtype)),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
