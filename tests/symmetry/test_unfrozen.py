"""Targets that nobody has frozen and that an optimizer has, too."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ecopt import ec_adamw, ec_sgd, scaling_group


def mlp(*widths: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


class Distilled(nn.Module):
    """A network, its copy, and a predictor that is to map the outputs of the one to those of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = mlp(4, 8, 6), mlp(6, 8, 6)
        scaling_group(self.online, torch.randn(5, 4).double()).act_(torch.randn(8).double())
        self.target = copy.deepcopy(self.online)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.predictor(self.online(x)), self.aim(x))

    def aim(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.target(x)

    def follow(self) -> None:
        with torch.no_grad():
            for t, p in zip(self.target.parameters(), self.online.parameters(), strict=True):
                t.lerp_(p, 0.1)


class Detached(Distilled):
    def aim(self, x: Tensor) -> Tensor:
        return self.target(x).detach()


class OfTwo(Distilled):
    """Two networks and their copies, each pair in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleDict({"student": mlp(4, 8, 6), "head": mlp(6, 6)})
        self.teacher = copy.deepcopy(self.more)

    def forward(self, x: Tensor) -> Tensor:
        def run(part: nn.Module) -> Tensor:
            return part["head"](part["student"](x))  # type: ignore[index]

        return super().forward(x) + F.mse_loss(run(self.more), run(self.teacher).detach() + 1)

    def follow(self) -> None:
        super().follow()
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self.more.parameters(), strict=True):
                t.copy_(p)


class Unlike(Distilled):
    """The target has weights of its own, so that it is none, and what it computes is all that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.target = mlp(4, 8, 6)

    def follow(self) -> None:
        pass


def train(module: Distilled, make=ec_sgd, steps: int = 12) -> tuple[float, list[str], int]:
    """How far the function of the target has moved, what warnings said, and how many units are left."""
    x = torch.randn(16, 4).double()
    before = module.target(x).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(module, lr=1e-14, refresh_interval=3)
        for _ in range(steps):
            optimizer.zero_grad()
            module(x).backward()
            optimizer.step()
            module.follow()
    moved = float((module.target(x).detach() - before).norm() / before.norm())
    assert optimizer.group is not None
    return moved, [str(one.message) for one in caught], optimizer.group.num_units


@pytest.mark.parametrize("make", [ec_sgd, ec_adamw])
@pytest.mark.parametrize("kind", [Distilled, Detached, OfTwo])
def test_what_looks_like_a_target_and_is_trained_is_held_fixed_with_what_it_follows(kind, make) -> None:
    torch.manual_seed(0)
    moved, said, _ = train(kind(), make)
    assert moved < 1e-9
    assert any("target looks like a copy that follows online" in text for text in said)


def test_a_target_that_is_frozen_follows() -> None:
    torch.manual_seed(0)
    module = Distilled()
    module.target.requires_grad_(False)
    moved, said, units = train(module)
    assert moved < 1e-9
    assert not any("looks like" in text for text in said)
    assert units == 8 + 8  # hidden ones of online and predictor; the target's outputs are compared


def test_a_network_of_its_own_is_no_copy() -> None:
    torch.manual_seed(0)
    _, said, units = train(Unlike())
    assert not any("looks like" in text for text in said)
    assert units >= 16
