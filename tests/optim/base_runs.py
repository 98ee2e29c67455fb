"""Runs of any base optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import mlp
from tests.optim.bases import BASES, Base, Definition
from tests.optim.training import loss_of, weights_of
from tests.selection import few

#: Of each kind of kernel one base, and two without.
A_FEW = ["nesterov", "adamw", "lion", *(["muon_adamw"] if "muon_adamw" in BASES else [])]
EVERY_BASE = pytest.mark.parametrize("name", few(BASES, A_FEW))


def problem(base: Base, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that the base can train, in general position, with batches of a regression."""
    torch.manual_seed(seed)
    module = mlp(4, 6, 5, 3, activation=nn.LeakyReLU, bias=not base.matrices).double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1 + 0.3 * torch.randn_like(p))
    x = torch.randn(64, 4, dtype=torch.float64)
    return module.to(dtype), x.to(dtype), (x @ torch.randn(4, 3, dtype=torch.float64)).to(dtype)


def wrap(name: str, module: nn.Module, x: Tensor, rule: str, **options: Any) -> EquivalentClassOptimizer:
    """A base optimizer in the equivalent-class space of a module, without warnings of what it is known to have."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = BASES[name].make(list(module.parameters()))
        options = {"rule": rule, "refresh_interval": 3, **options}
        return EquivalentClassOptimizer(base, scaling_group(module, x), **options)


LIMIT = {"norm": 0.1, "value": 0.03}


#: What is left between two ways to compute the same: some tens of roundings.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


def backward(module: nn.Module, parts: list[tuple[Tensor, Tensor]], clipping: str | None) -> None:
    """Accumulate and clip as a training loop does."""
    module.zero_grad()
    for x, y in parts:
        (loss_of(module, x, y) / len(parts)).backward()
    if clipping == "norm":
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT["norm"])
    elif clipping == "value":
        nn.utils.clip_grad_value_(module.parameters(), LIMIT["value"])


def error_of(module: nn.Module, exact: Definition) -> float:
    """The largest difference of a weight, relative to the largest weight."""
    pairs = zip(weights_of(module).values(), exact.weights().values(), strict=True)
    largest = max(float(weight.abs().max()) for weight in exact.weights().values())
    return max(float((p.double() - weight).abs().max()) for p, weight in pairs) / largest
