"""Networks and optimizers that the tests of steps and checkpoints share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.steps.skeleton import choose_skeleton
from tests.optim.training import ec_sgd, loss_of, weights_of
from tests.paths.explicit import ExplicitPaths

SGD = torch.optim.SGD


def balanced(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy at the balanced member of the class."""
    other = copy.deepcopy(module)
    scaling_group(other, x).balance_()
    return other


def paths_of(module: nn.Module, x: Tensor) -> ExplicitPaths:
    """The path coordinates, by their definition, that start at the weights of a balanced module."""
    group = scaling_group(module, x)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return ExplicitPaths(group, choose_skeleton(group.couplings, weights, group.alive()), weights)


def path_sgd(
    module: nn.Module, x: Tensor, *, wrapper: dict[str, Any] | None = None, **options: Any
) -> EquivalentClassOptimizer:
    """SGD with ``options`` on those coordinates."""
    return ec_sgd(module, x, rule="path", wrapper={"free_start": 1.0, **(wrapper or {})}, **options)


def gradients_of(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    tensors = dict(module.named_parameters())
    return dict(zip(tensors, torch.autograd.grad(loss_of(module, x, y), list(tensors.values())), strict=True))


def coordinates_of(module: nn.Module, paths: ExplicitPaths, rule: str) -> dict[str, Tensor]:
    """What the base optimizer moves."""
    return paths.paths(weights_of(module)) if rule == "path" else weights_of(module)
