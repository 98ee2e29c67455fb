"""A network whose freedoms are counted, and what its tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import nn

Sample = Callable[[torch.Generator, float], tuple[Any, ...]]


class Use(Flag):
    """What a case is good for, besides being one of many."""

    FAST = auto()
    """The default run has it: few cases stand for all of their family."""
    PATHS = auto()
    """Outputs are sums over paths; the others have a softmax, a sigmoid, a norm of activations or the like."""
    PRODUCTS = auto()
    """Monomials are products of units: attention, gates, powers, tied weights, norms."""
    SHARDS = auto()
    """Rows lead into a unit on one rank or on several, or weights are shared, normalised or frozen."""
    FOUR_SHARDS = auto()
    """Of these with four processes."""


NOTHING_MORE = Use(0)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, its number of freedoms, and what is frozen in it.

    Args:
        name: for people.
        make: builds the network.
        shapes: of the inputs (with the batch), if these are normally distributed numbers.
        units: how many freedoms there are.
        frozen: names of parameters that require no gradient.
        sample: draws the inputs, if they are something else: from a generator and the size of what is drawn.
        good_for: which tests take it.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    units: int
    frozen: tuple[str, ...] = ()
    sample: Sample | None = None
    good_for: Use = NOTHING_MORE

    def build(self) -> nn.Module:
        """The network in float64; its epsilons are so large that a freedom which only they break cannot be missed."""
        module = self.make().double()
        for name in self.frozen:
            module.get_parameter(name).requires_grad_(False)
        for part in module.modules():
            if isinstance(getattr(part, "eps", None), float):
                part.eps = 0.1
        return module

    def inputs(self, generator: torch.Generator, size: float = 1.0) -> tuple[Any, ...]:
        """Inputs of one call, in float64 or whatever ``sample`` draws."""
        if self.sample is not None:
            return self.sample(generator, size)
        return tuple(size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes)
