"""The member of a class where gains are one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import ScalingGroup, scaling_group
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one
from tests.networks import mlp


class Block(nn.Module):
    """Attention and a feed-forward layer behind RMSNorm, as in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(8), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).view(*x.shape[:-1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(F.relu(self.up(self.second(x))))


def block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block().double(), torch.randn(3, 5, 8, dtype=torch.float64)


def at_gains_of_one(net: nn.Module, x: Tensor) -> tuple[nn.Module, ScalingGroup, Tensor]:
    """A copy of the network there, its group, and the units into which gains lead."""
    net = copy.deepcopy(net)
    group = scaling_group(net, x)
    log_scale = scale_to_gains_of_one(group, group.alive())
    assert log_scale is not None
    group.act_(log_scale)
    by_gain = torch.zeros(group.num_units, dtype=torch.bool)
    for coupling in group.couplings:
        if len(coupling.region) == 1 and not coupling.additive:
            by_gain[coupling.incoming[coupling.incoming >= 0]] = True
    return net, group, by_gain


def test_a_network_as_it_is_made_has_its_gains_already() -> None:
    """There only what gains do not lead into is balanced: each norm's unit stays where it is."""
    net, x = block()
    there, _, by_gain = at_gains_of_one(net, x)
    assert int(by_gain.sum()) == 16
    for name in ("first", "second"):
        torch.testing.assert_close(there.get_parameter(f"{name}.weight"), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(there(x), net(x))
    qkv, before = (one.qkv.weight.detach().view(3, -1) for one in (there, net))
    torch.testing.assert_close(qkv[:2].norm(), before[:2].norm(), rtol=0.2, atol=0)  # but for q against k


def test_all_other_units_are_balanced() -> None:
    """So that no move of theirs makes the sum of squares smaller."""
    net, x = block()
    with torch.no_grad():
        net.first.weight.mul_(torch.linspace(0.1, 3.0, 8))
    there, group, by_gain = at_gains_of_one(net, x)
    least = sum(float(p.detach().square().sum()) for p in there.parameters())
    for unit in range(group.num_units):
        for step in (-1e-3, 1e-3):
            moved = {name: p.detach().clone() for name, p in group.parameters.items()}
            group.rescale_(moved, step * F.one_hot(torch.tensor(unit), group.num_units))
            total = sum(float(p.square().sum()) for p in moved.values())
            assert bool(by_gain[unit]) or total > least
    torch.testing.assert_close(there.first.weight, torch.ones(8, dtype=torch.float64))


def test_the_member_depends_on_the_class_alone() -> None:
    net, x = block()
    with torch.no_grad():
        net.second.weight.uniform_(-2, 2)
    other = copy.deepcopy(net)
    group = scaling_group(other, x)
    group.act_(torch.randn(group.num_units, dtype=torch.float64))
    one, two = (dict(at_gains_of_one(each, x)[0].named_parameters()) for each in (net, other))
    for name, p in one.items():
        torch.testing.assert_close(p, two[name], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(one["second.weight"].abs(), torch.ones(8, dtype=torch.float64))  # signs are the class's


def test_several_gains_of_one_unit_have_the_geometric_mean_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.out = nn.RMSNorm(4), nn.RMSNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.one(x) + self.other(x.exp()))

    torch.manual_seed(0)
    net = Twice().double()
    with torch.no_grad():
        net.one.weight.copy_(torch.tensor([4.0, 1.0, 2.0, 0.0]))
    there, _, _ = at_gains_of_one(net, torch.randn(3, 4, dtype=torch.float64))
    products = there.one.weight * there.other.weight
    torch.testing.assert_close(products[:3], torch.ones(3, dtype=torch.float64))
    assert there.other.weight[3] == 1  # a gain of zero does not count
    assert there.one.weight[3] == 0


class Scaled(nn.Module):
    """A scale between two layers, in a product, of a layer in a stream, or a vector that is contracted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.RMSNorm(4)
        self.a, self.c, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.g = nn.Parameter(0.01 * torch.rand(4) + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.kind == "stream":
            h = F.relu(self.c(x))
            return self.b(F.relu(h + self.a(h) * self.g))
        h = F.relu(self.a(x))
        if self.kind == "contracted":
            return self.b(F.relu(self.c(x))) + (h @ self.g)[..., None]
        return self.b(h * self.g * (F.relu(self.c(x)) if self.kind == "product" else 1))


@pytest.mark.parametrize("kind", ["between", "product", "stream", "contracted"])
def test_a_vector_that_leads_out_of_units_is_balanced(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Scaled(kind).double(), torch.randn(3, 4, dtype=torch.float64)
    others = [copy.deepcopy(net) for _ in range(2)]
    for other in others:
        group = scaling_group(other, x)
        group.act_(torch.randn(group.num_units, dtype=torch.float64))
    first, *rest = (dict(at_gains_of_one(each, x)[0].named_parameters()) for each in (net, *others))
    torch.testing.assert_close(first["norm.weight"], torch.ones(4, dtype=torch.float64))
    for parameters in rest:
        for name, p in first.items():
            torch.testing.assert_close(parameters[name], p, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("held", [False, True])
def test_there_is_none_without_gains_that_may_move(held: bool) -> None:
    net, x = block() if held else (mlp(4, 8, 3).double(), torch.randn(2, 4, dtype=torch.float64))
    group = scaling_group(net, x)
    active = group.alive()
    if held:
        _, _, by_gain = at_gains_of_one(net, x)
        active &= ~by_gain
    assert scale_to_gains_of_one(group, active) is None
