"""Small training runs that the tests of the optimizer share."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import mlp

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")

#: For what does not depend on how a step is taken.
RULES = pytest.mark.parametrize("rule", ["unit", "path"])


def batches(x: Tensor, y: Tensor, step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The batch of a step, one after the other and over again."""
    rows = torch.arange(step * size, (step + 1) * size) % len(x)
    return x[rows], y[rows]


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy for integer targets, squares for others."""
    output = module(x)
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: range) -> list[float]:
    """Train for the given steps and return their losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(module, *batches(x, y, step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def ec_sgd(
    module: nn.Module, x: Tensor, *, rule: str = "unit", wrapper: dict[str, Any] | None = None, **options: Any
) -> EquivalentClassOptimizer:
    """SGD with ``options`` in the equivalent-class space."""
    base = torch.optim.SGD(module.parameters(), **options)
    return EquivalentClassOptimizer(base, scaling_group(module, x), **{"rule": rule, **(wrapper or {})})


def rescaled(module: nn.Module, x: Tensor, spread: float = 1.0) -> nn.Module:
    """A random other member of the module's class."""
    other = copy.deepcopy(module)
    group = scaling_group(other, x)
    group.act_(spread * torch.randn(group.num_units, dtype=torch.float64))
    return other


def distance(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    """Relative difference of the outputs in evaluation mode."""
    with torch.no_grad():
        a, b = (copy.deepcopy(module).eval()(x) for module in (first, second))
    return float((a - b).norm() / a.norm())


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def problem(*widths: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A perceptron with batches of a regression."""
    torch.manual_seed(seed)
    module = mlp(*widths).to(dtype)
    return module, torch.randn(32, widths[0], dtype=dtype), torch.randn(32, widths[-1], dtype=dtype)


def only_refresh(optimizer: EquivalentClassOptimizer) -> None:
    """Balance (and choose), and nothing else: there are no gradients."""
    optimizer.refresh()
    optimizer.zero_grad()
    optimizer.step()


def put_back(gradient: Tensor, before: Tensor) -> bool:
    """Whether a gradient is what it was, but for rounding."""
    return bool((gradient - before).abs().max() <= 8 * torch.finfo(before.dtype).eps * before.abs().max())


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)
