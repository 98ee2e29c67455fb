"""Jagged nested tensors: sequences of different lengths one after the other, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F

from lightning_ecopt.symmetry import scaling_group
from tests.networks import mlp
from tests.selection import few
from tests.symmetry.helpers import assert_complete, assert_same, evaluate, normal

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")

OFFSETS = torch.tensor([0, 3, 8])


class Jagged(nn.Module):
    """A function of its parts and of two sequences."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, values: Tensor) -> Tensor:
        return self.function(self, nested_tensor_from_jagged(values, OFFSETS))


def _residual(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.head(h + m.block(m.norm(h))).values()


def _pooled(m: Any, x: Tensor) -> Tensor:
    h = m.net(x).relu()
    return m.head(torch.cat([h.to_padded_tensor(0.0).sum(1), -h[0].mean(0).expand(2, -1)], -1))


def _gated(m: Any, x: Tensor) -> Tensor:
    gate, value = m.up(x).chunk(2, -1)
    return m.head((gate.sigmoid() * value).flatten(2)).to_padded_tensor(0.0)


def _attention(m: Any, x: Tensor) -> Tensor:
    query, key, value = (p(x).unflatten(-1, (2, 2)).transpose(1, 2) for p in (m.q, m.k, m.v))
    h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    return m.head(m.net(h)).values()


NETWORKS = {
    "mlp": (lambda: Jagged(lambda m, x: m.net(x).values(), net=mlp(3, 4, 5, 2)), 4 + 5),
    "residual": (
        lambda: Jagged(
            _residual,
            up=nn.Linear(3, 4),
            norm=nn.LayerNorm(4, eps=1.0),
            block=mlp(4, 5, 4),
            head=nn.Linear(4, 2),
        ),
        4 + 5,  # the stream is fixed by the norm
    ),
    "pooled": (lambda: Jagged(_pooled, net=mlp(3, 4, 5), head=nn.Linear(10, 2)), 4 + 5),
    "means": (lambda: Jagged(lambda m, x: m.head(m.net(x).relu().mean(1)), net=mlp(3, 4, 5), head=nn.Linear(5, 2)), 9),
    "gated": (lambda: Jagged(_gated, up=nn.Linear(3, 8), head=nn.Linear(4, 2)), 4),
}


@pytest.mark.parametrize(("make", "units"), NETWORKS.values(), ids=NETWORKS)
def test_units_are_found(make: Callable[[], nn.Module], units: int) -> None:
    module, x = make(), torch.randn(8, 3).double()
    group = scaling_group(module, x)
    assert group.num_units == units
    before = evaluate(module, (x,))
    group.act_(torch.randn(units).double())
    assert_same(evaluate(module, (x,)), before)


@pytest.mark.parametrize("make", few([NETWORKS[name][0] for name in ("mlp", "residual", "pooled", "gated")], 1))
def test_as_many_units_as_there_are_freedoms(make: Callable[[], nn.Module]) -> None:
    # Torch has no gradients of means over time.
    assert_complete(make(), normal((8, 3)), draws=8)


def test_a_jagged_input_and_a_jagged_output() -> None:
    module = mlp(3, 4, 5, 2).double()
    x = nested_tensor_from_jagged(torch.randn(8, 3).double(), OFFSETS)
    group = scaling_group(module, x)
    assert group.num_units == 4 + 5
    before = module(x).values()
    group.act_(torch.randn(9).double())
    assert_same(module(x).values().detach(), before.detach())


def test_attention_on_a_cpu_is_held_fixed_and_the_rest_is_not() -> None:
    parts = {name: nn.Linear(3, 4) for name in "qkv"}
    module = Jagged(_attention, **parts, net=mlp(4, 5, 4), head=nn.Linear(4, 2))
    x = torch.randn(8, 3).double()
    group = scaling_group(module, x)
    assert group.num_units == 5 + 4  # no activation follows the net
    before = evaluate(module, (x,))
    group.act_(torch.randn(group.num_units).double())
    assert_same(evaluate(module, (x,)), before)
