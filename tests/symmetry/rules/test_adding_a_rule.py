"""The example that explains how a rule is added is one that works."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt import scaling_group
from lightning_ecopt.symmetry import rules
from lightning_ecopt.symmetry.rules import RULES, Call, registry


class Hypotenuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.hypot(self.first(x), self.second(x)))


def test_the_example_of_the_docstring_gives_its_operation_its_freedoms() -> None:
    module, x = Hypotenuse().double(), torch.randn(5, 4, dtype=torch.float64)
    without = scaling_group(module, x)
    assert without.num_units == 0
    assert "hypot" in {operation.name for operation in without.costs}
    code = re.search(r"^       (@rule.*?)\n\n", str(rules.__doc__), re.DOTALL | re.MULTILINE)
    assert code is not None
    names: dict[str, Any] = {"rule": registry.rule, "Call": Call, "IntArray": Any}
    try:
        exec(code[1].replace("\n       ", "\n"), names)
        group = scaling_group(module, x)
    finally:
        RULES.pop("hypot", None)
    assert group.num_units == 6
    before = module(x)
    group.act_(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
