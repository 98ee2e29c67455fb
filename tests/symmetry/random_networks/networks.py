"""A random network: its beginning, its bricks, its end; and strategies that draw it."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.helpers import draw_
from tests.symmetry.random_networks.descriptions import ACTIVATIONS, BUILDERS, EVERYWHERE, Brick, Network, Site
from tests.symmetry.zoo.tiny import Function

# Beginning and end ----------------------------------------------------------------------------------------------------


SHAPES = {"vectors": (5,), "images": (4, 5), "tokens": (4, 3)}  # batch, positions
WORDS = 5
ENTRIES = {
    "vectors": ("plain", "added", "joined", "multiplied", "shared"),
    "images": ("plain", "added", "joined"),
    "tokens": ("plain", "added", "crossed", "embedded", "embedded with positions"),
}
REDUCTIONS = {
    "vectors": ("mean",),
    "images": ("mean", "flatten", "maximum"),
    "tokens": ("mean", "flatten", "last and mean", "query"),
}
HEADS = ("linear", "none", "two", "features", "dictionary", "tied")


def entry(site: Site, name: str, channels: int) -> nn.Module:
    """From the inputs to the first activations."""
    if name == "plain":
        return Function(lambda m, x: x)
    if name.startswith("embedded"):
        if name == "embedded":
            return nn.Embedding(WORDS, channels)
        return Function(
            lambda m, x: m.words(x) + m.positions(torch.arange(x.shape[1])),
            words=nn.Embedding(WORDS, channels),
            positions=nn.Embedding(site.length, channels),
        )
    if name == "crossed":
        parts = {part: site.layer(2) for part in ("query", "key", "value")}
        return Function(lambda m, a, b: F.scaled_dot_product_attention(0.2 * m.query(a), m.key(b), m.value(b)), **parts)
    layers = {"one": site.layer(2), "two": site.layer(2)}
    if name == "shared":
        return Function(lambda m, a, b: m.one(a).relu() - m.one(b).relu(), one=layers["one"])
    join = {"added": torch.add, "multiplied": torch.mul, "joined": lambda a, b: torch.cat([a, b], site.axis)}[name]
    return Function(lambda m, a, b: join(m.one(a).relu(), m.two(b)), **layers)


def reduction(site: Site, name: str) -> nn.Module:
    """From images or tokens to vectors."""
    axis = 3 - site.axis
    if name == "query":

        def forward(m: Function, x: Tensor) -> Tensor:
            return ((0.2 * x @ m.query).softmax(1).unsqueeze(1) @ x).squeeze(1)

        return Function(forward, query=torch.zeros(site.width))
    simple = {
        "mean": lambda m, x: x.mean(axis),
        "maximum": lambda m, x: x.amax(axis),
        "last and mean": lambda m, x: torch.cat([x[:, -1], x.mean(axis)], 1),
        "flatten": lambda m, x: x.flatten(1),
    }
    return Function(simple[name])


def head(width: int, name: str) -> nn.Module:
    """From vectors to what is returned."""
    if name == "none":
        return Function(lambda m, x: x)
    if name == "two":
        return Function(lambda m, x: (m.one(x), m.two(x.relu())), one=nn.Linear(width, 1), two=nn.Linear(width, 1))
    if name == "features":
        return Function(lambda m, x: (m.one(x), x[:, :1]), one=nn.Linear(width, 2))
    if name == "dictionary":
        return Function(lambda m, x: {"logits": m.one(x), "last": x[:, -1]}, one=nn.Linear(width, 2))
    if name == "tied":
        return Function(lambda m, x: F.linear(m.one(x), m.one.weight.t()), one=nn.Linear(width, 2))
    return nn.Linear(width, 2)


class Composed(nn.Module):
    """The network of a description, in float64.

    Between the bricks there are constant factors, powers of two, so that numbers stay of ordinary size however many
    products and squares there are; without them the count of freedoms would have no clear gap.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.steps, self.factors = nn.ModuleList(), []
        generator = torch.Generator().manual_seed(0)
        batch, *positions = SHAPES[network.data]
        shape = (
            (batch, *positions, network.channels) if network.data == "tokens" else (batch, network.channels, *positions)
        )
        self.site = Site(network.data, shape)
        x = self._add(entry(self.site, network.entry, network.channels), generator, *self.sample(generator, 4.0))
        for spec in network.bricks:
            site = Site(network.data, tuple(x.shape))
            x = self._add(BUILDERS[network.data][spec.kind](site, spec), generator, x)
        if network.data != "vectors":
            x = self._add(reduction(Site(network.data, tuple(x.shape)), network.reduction), generator, x)
        for spec in network.tail:
            x = self._add(BUILDERS["vectors"][spec.kind](Site("vectors", tuple(x.shape)), spec), generator, x)
        self._add(head(x.shape[1], network.head), generator, x)
        # The biases of keys do not matter, but frozen ones hold the keys, and so the queries, as far as anyone knows.
        parameters = [p for name, p in self.named_parameters() if not name.endswith("key.bias")]
        for number in network.frozen:
            if number < len(parameters):
                parameters[number].requires_grad_(False)

    @torch.no_grad()
    def _add(self, module: nn.Module, generator: torch.Generator, *inputs: Tensor) -> Tensor:
        """Append a step; returns what it makes of an example."""
        draw_(module.double(), generator)
        size = float(torch.stack([x.double().square().mean() for x in inputs]).mean().sqrt())
        exact = inputs[0].is_floating_point() and not 1.0 < size < 4.0 and size > 0
        self.factors.append(2.0 ** (1 - round(log2(size))) if exact else None)
        self.steps.append(module)
        return module.eval()(*self._scaled(inputs, self.factors[-1]))

    @staticmethod
    def _scaled(inputs: Sequence[Tensor], factor: float | None) -> list[Tensor]:
        return [x if factor is None else x * factor for x in inputs]

    def forward(self, *inputs: Tensor) -> Any:
        x: Any = inputs
        for step, factor in zip(self.steps, self.factors, strict=True):
            x = step(*self._scaled(x if isinstance(x, tuple) else (x,), factor))
        return x

    def sample(self, generator: torch.Generator, size: float) -> tuple[Tensor, ...]:
        """Inputs of one call."""
        if self.network.entry.startswith("embedded"):
            return (torch.randint(0, WORDS, self.site.shape[:2], generator=generator),)
        count = 1 if self.network.entry == "plain" else 2
        return tuple(
            size * torch.randn(self.site.shape, generator=generator, dtype=torch.float64) for _ in range(count)
        )


# Strategies -----------------------------------------------------------------------------------------------------------


OWN = {data: [kind for kind in kinds if kind not in BUILDERS["vectors"]] for data, kinds in BUILDERS.items()}


def bricks(data: str, most: int, least: int = 0) -> st.SearchStrategy[list[Brick]]:
    """A few bricks; those for this kind of data alone are as frequent as all others together."""
    kinds = st.sampled_from(list(BUILDERS[data]))
    kinds = kinds | st.sampled_from(OWN[data]) if OWN[data] else kinds
    one = st.builds(Brick, kinds, st.integers(1, 3), st.sampled_from(ACTIVATIONS), st.booleans())
    return st.lists(one, min_size=least, max_size=most)


def networks(data: str) -> st.SearchStrategy[Network]:
    described = st.builds(
        Network,
        data=st.just(data),
        channels=st.integers(1, 3),
        entry=st.sampled_from(ENTRIES[data]),
        bricks=bricks(data, 4, least=1),
        reduction=st.sampled_from(REDUCTIONS[data]),
        tail=st.just([]) if data == "vectors" else bricks("vectors", 1),
        head=st.sampled_from(HEADS),
        frozen=st.just(()) | st.tuples(st.integers(0, 9)),
    )
    return described.filter(fits)


def fits(network: Network) -> bool:
    """Small enough for a count, and something in it can be rescaled."""
    module = Composed(network)
    return 0 < sum(p.numel() for p in module.parameters() if p.requires_grad) <= 90


every_kind_of_data = pytest.mark.parametrize("data", EVERYWHERE)
seeds = st.integers(0, 1000)
