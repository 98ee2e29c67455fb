"""Networks and measurements that the tests of the metrics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt import ScalingGroup
from lightning_ecopt.metrics import EquivalentClassDistance, PathNorm, UnitImbalance
from tests.symmetry.helpers import draw_
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import SHARED, TINY

CASES = [*SHARED, *TINY, *ZOO]


def prepared(case: Case, generator: torch.Generator) -> tuple[nn.Module, tuple[Any, ...]]:
    module = case.build()
    draw_(module, generator)
    return module, case.inputs(generator)


def path_norm(model: nn.Module, inputs: Any, p: float = 1, **options: Any) -> float:
    metric = PathNorm(p)
    metric.update(model, inputs, **options)
    return float(metric.compute())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def imbalance(group: ScalingGroup) -> float:
    metric = UnitImbalance()
    metric.update(group)
    return float(metric.compute())


def distance(model: nn.Module, reference: nn.Module, group: ScalingGroup, relative: bool = False) -> float:
    metric = EquivalentClassDistance(relative)
    metric.update(model, reference, group)
    return float(metric.compute())


class Computed(nn.Module):
    """What a function does with its inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


P = torch.tensor([[[[0, 0, 3], [1, 2, 2]]] * 3])
M = (torch.arange(36).reshape(6, 6) * 7 % 5) > 1
