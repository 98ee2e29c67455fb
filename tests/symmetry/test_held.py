"""Units that are held fixed leave the group; the others do what they did."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ScalingGroup, ec_sgd, scaling_group
from lightning_ecopt.symmetry.held import HeldUnits, marks_of, units_at
from lightning_ecopt.symmetry.scales import Operation

WHY = Operation("a test", "")


class Gated(nn.Module):
    """Three factors and a square, so that products lose one factor, two, or all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 6) for _ in range(3))
        self.out, self.squared = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (part(x).relu() for part in (self.a, self.b, self.c))
        return self.out(a * b * c) + self.squared(a.square())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.conv = nn.MultiheadAttention(4, 2, batch_first=True), nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return self.conv(y.transpose(1, 2)).relu()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(("make", "shape"), [(plain, (5, 4)), (Gated, (5, 4)), (Attention, (2, 5, 4))])
@pytest.mark.parametrize("seed", range(3))
def test_the_other_units_do_what_they_did(make, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = make().double()
    group = scaling_group(module, torch.randn(shape, dtype=torch.float64))
    held = torch.rand(group.num_units, generator=generator) < 0.4
    log_scale = torch.randn(group.num_units, generator=generator, dtype=torch.float64).where(~held, 0.0)
    one, other = copy.deepcopy(module), copy.deepcopy(module)
    group.of(one).act_(log_scale)
    fewer = group.without(held)
    assert fewer.num_units == int((~held).sum())
    fewer.of(other).act_(log_scale[~held])
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=0)
    assert fewer.alive().all() or not group.alive().all()


@pytest.mark.parametrize(("make", "shape"), [(plain, (5, 4)), (Gated, (5, 4)), (Attention, (2, 5, 4))])
def test_a_mark_finds_its_unit_again(make, shape: tuple[int, ...]) -> None:
    group = scaling_group(make(), torch.randn(shape))
    for unit in range(group.num_units):
        chosen = torch.zeros(group.num_units, dtype=torch.bool)
        chosen[unit] = True
        assert torch.equal(units_at(group, marks_of(group, chosen)), chosen)


def test_what_is_held_stays_held_in_a_larger_group() -> None:
    """A layer thaws: units have other numbers, and there are more of them."""
    net, x = plain(), torch.randn(5, 4)
    net[0].requires_grad_(False)
    small = scaling_group(net, x)
    net[0].requires_grad_(True)
    large = scaling_group(net, x)
    held = HeldUnits()
    held.add(small, torch.arange(small.num_units) < 2, WHY)
    found = held.applied(large)
    assert (small.num_units, large.num_units, found.num_units) == (8, 16, 14)
    assert "4.weight[:, 0]" not in " ".join(found.describe(unit) for unit in range(14))
    assert held.applied(found) is found
    assert found.costs[WHY] == 2
    again = HeldUnits()
    again.load(held.saved())
    assert again.applied(large).fingerprint() == found.fingerprint()


def test_a_mask_of_another_shape_is_refused() -> None:
    group = scaling_group(plain(), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"\[16\].*\[3\]"):
        group.without(torch.zeros(3, dtype=torch.bool))


def _step(net: nn.Module, optimizer: EquivalentClassOptimizer, count: int = 1) -> None:
    x, y = torch.eye(4), torch.arange(4) % 2
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def _known(net: nn.Module) -> EquivalentClassOptimizer:
    return EquivalentClassOptimizer(_sgd(net), scaling_group(net, torch.eye(4)))


def _sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def _called(net: nn.Module) -> EquivalentClassOptimizer:
    return ec_sgd(net, lr=0.1, momentum=0.9)


def _watched(net: nn.Module) -> EquivalentClassOptimizer:
    return ECSGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [_known, _called, _watched])
def test_a_resumed_run_holds_what_was_held(make) -> None:
    torch.manual_seed(0)
    net = plain()
    optimizer = make(net)
    _step(net, optimizer, 3)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    optimizer._session.hold(torch.arange(16) % 3 == 0, WHY)
    assert optimizer.group.num_units == 10
    _step(net, optimizer, 3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    optimizer.refresh()
    _step(net, optimizer, 3)

    other = plain()
    other.load_state_dict(saved[0])
    resumed = make(other)
    resumed.load_state_dict(saved[1])
    resumed.refresh()
    _step(other, resumed, 3)
    assert isinstance(resumed.group, ScalingGroup)
    assert resumed.group.num_units == 10
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)

    # An earlier state of the same run knows nothing of it.
    net.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    _step(net, optimizer)
    assert optimizer.group.num_units == 16


def test_optimizers_of_one_group_hold_it_together() -> None:
    net = plain()
    group = scaling_group(net, torch.eye(4))
    first, second = (
        EquivalentClassOptimizer(torch.optim.SGD(part.parameters(), lr=0.1), group) for part in (net[:3], net[4])
    )
    _step(net, first)
    _step(net, second)
    first._session.hold(torch.arange(16) < 8, WHY)
    _step(net, second)
    assert second.group is first.group
    assert second.group.num_units == 8
