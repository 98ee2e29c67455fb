"""Descriptions of random networks, and how the bricks of real ones register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.tiny import Function

# Descriptions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brick:
    """One step of a random network; not every kind needs all of it."""

    kind: str
    width: int = 1
    activation: str = "relu"
    bias: bool = True


@dataclass(frozen=True)
class Network:
    """What a random network is made of.

    Args:
        data: what comes in: ``vectors``, ``images`` or ``tokens``.
        channels: of the input.
        entry: how inputs become the first activations.
        bricks: steps on data of this kind.
        reduction: how images and tokens become vectors.
        tail: further steps, on vectors.
        head: what is returned.
        frozen: numbers of parameters that require no gradient.
    """

    data: str
    channels: int
    entry: str = "plain"
    bricks: Sequence[Brick] = ()
    reduction: str = "mean"
    tail: Sequence[Brick] = ()
    head: str = "linear"
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """The place of a brick: the kind of data, and the shape of what comes in."""

    data: str
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """That of the channels."""
        return 2 if self.data == "tokens" else 1

    @property
    def width(self) -> int:
        return self.shape[self.axis]

    @property
    def length(self) -> int:
        """Number of positions."""
        return prod(self.shape[1:]) // self.width

    def layer(self, outputs: int, bias: bool = True) -> nn.Module:
        """A linear layer, or for images a convolution of single pixels."""
        if self.data == "images":
            return nn.Conv1d(self.width, outputs, 1, bias=bias)
        return nn.Linear(self.width, outputs, bias)

    def along(self, vector: Tensor) -> Tensor:
        """One number for each channel, such that it broadcasts."""
        return vector[:, None] if self.data == "images" else vector

    def wide(self, width: int) -> Site:
        """The same place with another number of channels."""
        return replace(self, shape=(*self.shape[: self.axis], width, *self.shape[self.axis + 1 :]))


Builder = Callable[[Site, Brick], nn.Module]
BUILDERS: dict[str, dict[str, Builder]] = {"vectors": {}, "images": {}, "tokens": {}}
EVERYWHERE = tuple(BUILDERS)


def brick(*data: str, name: str | None = None, **options: Any) -> Callable[[Callable[..., nn.Module]], Any]:
    """Register how a kind of brick is built, for these kinds of data; simple kinds come first."""

    def register(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        for kind in data or EVERYWHERE:
            BUILDERS[kind][name or function.__name__.replace("_", " ")] = partial(function, **options)
        return function

    return register


# Activations ----------------------------------------------------------------------------------------------------------


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x + 0),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "identity": lambda x: x,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0),
    "relu squared": lambda x: x.relu().square(),
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
HALVING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glu": lambda a, b: a * b.sigmoid(),
    "reglu": lambda a, b: a * b.relu(),
    "bilinear": torch.mul,
    "geglu": lambda a, b: a * F.gelu(b),
    "maxout": torch.maximum,
}
ACTIVATIONS = (*POINTWISE, "prelu", "crelu", *HALVING)


def activation(site: Site, name: str) -> nn.Module:
    """An activation of what the place has."""
    axis = site.axis
    if name == "prelu" and axis == 1:
        return nn.PReLU(site.width)
    if name == "prelu":
        return Function(lambda m, x: torch.where(x > 0, x, site.along(m.slope) * x), slope=torch.zeros(site.width))
    if name == "crelu":
        return Function(lambda m, x: torch.cat([x.relu(), (-x).relu()], axis))
    if name in HALVING:
        return Function(lambda m, x: HALVING[name](*x.chunk(2, axis)))
    return Function(lambda m, x: POINTWISE[name](x))


def neurons(site: Site, spec: Brick) -> tuple[nn.Module, int]:
    """A layer and its activation, and how many channels they have."""
    before = spec.width * (2 if spec.activation in HALVING else 1)
    after = spec.width * (2 if spec.activation == "crelu" else 1)
    layer = site.layer(before, spec.bias)
    return nn.Sequential(layer, activation(site.wide(before), spec.activation)), after
