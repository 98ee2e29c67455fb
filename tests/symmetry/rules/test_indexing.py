"""Rules for elements that data picks out or puts in place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

ops = torch.ops.aten

OPS = [
    Op("index_select", lambda m, h: h.index_select(2, torch.tensor([2, 0])), spatial=1),
    Op("index_select", lambda m, h: h.index_select(1, torch.tensor([2, 0])), 1),
    Op("index", lambda m, h: h[:, :, torch.tensor([2, 0])], spatial=1),
    Op("index", lambda m, h: h[:, torch.tensor([2, 0])], 1),
    Op("index", lambda m, h: h[torch.arange(7, -1, -1)]),
    Op("index", lambda m, h: h[:, :, torch.tensor([[0], [1]]), torch.tensor([1, 2, 3])], spatial=2),
    Op("index", lambda m, h: h[torch.arange(8)[:, None], :, torch.tensor([1, 2, 3])].transpose(1, 2), spatial=1),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
