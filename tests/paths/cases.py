"""Networks with inputs, and coordinates at a point of them, that the tests of path coordinates share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_ecopt import ScalingGroup, scaling_group
from lightning_ecopt.steps.coordinates import PathCoordinates
from lightning_ecopt.steps.skeleton import Skeleton, choose_skeleton
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, norm_cnn, plain_cnn

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 7, 9, 4, activation=nn.PReLU), (6,)),
    "deep_mlp": (lambda: mlp(4, 5, 5, 5, 5, 3), (4,)),
    "cnn": (plain_cnn, (1, 8, 8)),
    "residual": (ResidualMLP, (3,)),
    "batch_norm": (norm_cnn, (1, 6, 6)),
    "resnet": (ResNet, (1, 6, 6)),
    "dense": (DenseNet, (1, 5, 5)),
}


@dataclass
class Point:
    """A network, somewhere on the way from one refresh to the next."""

    module: nn.Module
    x: Tensor
    target: Tensor
    group: ScalingGroup
    weights: dict[str, Tensor]
    skeleton: Skeleton
    coordinates: PathCoordinates

    def loss(self) -> Tensor:
        return (self.module(self.x) - self.target).square().mean()

    def gradients(self) -> dict[str, Tensor]:
        tensors = dict(self.module.named_parameters())
        return dict(zip(tensors, torch.autograd.grad(self.loss(), list(tensors.values())), strict=True))

    def path_gradients(self) -> dict[str, Tensor]:
        """dL/dv for all parameters."""
        gradients = self.gradients()
        self.coordinates.transform_gradients_(gradients, self.coordinates.free_weights(self.weights, gradients))
        return gradients


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network in float64 with all parameters in general position, and a batch."""
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    module = build().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module, torch.randn(8, *shape, dtype=torch.float64)


def point(
    name: str, seed: int = 0, *, random_beta: bool = False, some_inactive: bool = False, free_start: float = 1.0
) -> Point:
    """Path coordinates of a random member of a random class."""
    module, x = make(name, seed)
    group = scaling_group(module, x)
    group.act_(0.3 * torch.randn(group.num_units, dtype=torch.float64))
    weights = {key: p.detach() for key, p in module.named_parameters()}
    active = group.alive()
    assert bool(active.all())
    if some_inactive:
        active[torch.randperm(len(active))[: max(1, len(active) // 4)]] = False
    skeleton = choose_skeleton([c.restricted(active) for c in group.couplings], weights, active)
    coordinates = PathCoordinates(group.couplings, weights, skeleton, free_start)
    if random_beta:
        random = torch.rand(len(active), dtype=torch.float64) + 0.5
        coordinates.paths.beta[:-1] = torch.where(active, random[skeleton.root], 1.0)
    return Point(module, x, torch.randn_like(module(x)), group, weights, skeleton, coordinates)
