"""Imbalance against squares written out, and distances that ignore scales."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_ecopt import ScalingGroup, scaling_group
from tests.metrics.cases import CASES, distance, imbalance, prepared, zeros
from tests.networks import ResidualMLP, mlp
from tests.selection import few
from tests.symmetry.helpers import copies, directions, draw_
from tests.symmetry.zoo.case import Case

RESCALED = [case for case in CASES if case.units]


def rescaled(module: nn.Module, group: ScalingGroup, generator: torch.Generator, size: float = 1.0) -> nn.Module:
    """Another member of the class of a module, in a module of its own."""
    other = copy.deepcopy(module)
    scale = size * torch.randn(group.num_units, generator=generator, dtype=torch.float64)
    own = dict(other.named_parameters())
    with torch.no_grad():
        group.rescale_({name: own[name] for name in group.parameters}, scale)
    return other


# Imbalance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", few(RESCALED[::4], 16), ids=lambda case: case.name)
def test_imbalance_is_the_largest_ratio_of_what_grows_and_what_shrinks_with_a_unit(
    case: Case, generator: torch.Generator
) -> None:
    module, inputs = prepared(case, generator)
    group = scaling_group(module, *inputs)
    # Element by element: by which power of the unit each is multiplied.
    exponents = directions(group)
    exponents = exponents.where(exponents.abs() > 1e-9, 0.0)
    squares = torch.cat([p.detach().flatten() for p in group.parameters.values()]).square()
    ratio = (squares @ exponents.clamp(min=0)) / (squares @ -exponents.clamp(max=0))
    sides = ratio.isfinite() & (ratio > 0)
    assert torch.equal(sides, ~group.scale_invariant)
    largest = torch.maximum(ratio, 1 / ratio)[sides].amax().sqrt() if sides.any() else torch.ones(())
    actual = imbalance(group)
    if sides.all():
        assert actual == pytest.approx(float(largest), rel=1e-11)
    assert actual >= float(largest) * (1 - 1e-11)
    group.balance_()
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_unit_off_by_a_factor_is_off_balance_by_its_square(factor: float) -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    scale = torch.zeros(5, dtype=torch.float64)
    scale[2] = math.log(factor)
    group.act_(scale)
    assert imbalance(group) == pytest.approx(9.0, rel=1e-10)


def test_directions_of_normalised_weights_are_off_balance_by_their_length() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)
    direction = net[0].parametrizations.weight.original1
    with torch.no_grad():
        direction[1] *= 5
    assert imbalance(group) == pytest.approx(5.0, rel=1e-10)
    with torch.no_grad():
        direction[1] /= 50
    assert imbalance(group) == pytest.approx(10.0, rel=1e-10)


def test_dormant_units_are_left_out_and_undefined_elements_are_not() -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[0].weight[1] *= 100
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)
    with torch.no_grad():
        net[2].weight.zero_()
    assert imbalance(group) == 1.0
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    assert math.isnan(imbalance(group))


def test_a_network_without_units_is_balanced() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    assert imbalance(scaling_group(net, zeros(1, 2))) == 1.0


# Distance -------------------------------------------------------------------------------------------------------------


def built_again(case: Case, module: nn.Module) -> nn.Module:
    other = case.build()
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("case", few(RESCALED[1::5], 14), ids=lambda case: case.name)
def test_the_distance_between_members_of_one_class_is_zero(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    group = scaling_group(module, *inputs)
    other = built_again(case, module)
    assert distance(module, other, group) == 0.0
    own = scaling_group(other, *inputs)
    own.act_(torch.randn(own.num_units, generator=generator, dtype=torch.float64))
    start, end = copies(group), copies(own)
    assert distance(module, other, group, relative=True) < 1e-10
    assert distance(other, module, own, relative=True) < 1e-10
    for name in start:
        assert torch.equal(group.parameters[name], start[name])
        assert torch.equal(own.parameters[name], end[name])


def test_the_distance_is_one_of_balanced_weights(generator: torch.Generator) -> None:
    net = ResidualMLP().double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)  # biases, too, which is a scale of no unit; the stem's side grows as the head's does
    own = scaling_group(other, zeros(1, 3))
    own.balance_()
    size = torch.cat([p.detach().flatten() for p in net.parameters()])
    moved = torch.cat([p.detach().flatten() for p in other.parameters()])
    expected = float((moved - size).norm())
    assert distance(rescaled(other, own, generator), net, group) == pytest.approx(expected, rel=1e-9)
    relative = distance(rescaled(other, own, generator), net, group, relative=True)
    assert relative == pytest.approx(expected / float(size.norm()), rel=1e-9)


def test_the_distance_is_a_metric_on_classes(generator: torch.Generator) -> None:
    nets = [ResidualMLP().double() for _ in range(3)]
    for net in nets:
        draw_(net, generator)
    group = scaling_group(nets[0], zeros(1, 3))
    apart = torch.tensor([[distance(one, two, group) for two in nets] for one in nets])
    torch.testing.assert_close(apart, apart.T, rtol=1e-12, atol=0.0)
    assert bool((apart.diagonal() == 0).all())
    assert float((apart + torch.eye(3)).min()) > 0.1
    through = apart[:, :, None] + apart[None]  # [from, through, to]
    assert bool((apart <= through.amin(1) + 1e-12).all())
    moved = [rescaled(net, group, generator) for net in nets]
    again = torch.tensor([[distance(one, two, group) for two in moved] for one in nets])
    torch.testing.assert_close(again, apart, rtol=1e-9, atol=1e-9)


def test_parameters_that_no_unit_rescales_and_that_are_frozen_count() -> None:
    net = mlp(3, 5, 2).double()
    net.offset = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    net[0].weight.requires_grad_(False)
    group = scaling_group(net, zeros(1, 3))
    assert "0.weight" not in group.parameters
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.offset.add_(torch.tensor([3.0, 0.0]))
        other[0].weight[0, 0] += 4.0
    assert distance(net, other, group) == pytest.approx(5.0, rel=1e-12)


def test_what_a_dormant_unit_makes_no_use_of_counts_as_zero(generator: torch.Generator) -> None:
    net = mlp(3, 5, 4, 2).double()
    draw_(net, generator)
    with torch.no_grad():
        net[2].weight[:, 1] = 0  # nothing leads out of one unit
        net[2].weight[3] = 0  # and nothing into another
        net[2].bias[3] = 0
    group = scaling_group(net, zeros(1, 3))
    assert int((~group.alive()).sum()) == 2
    other = rescaled(net, group, generator, 2.0)
    assert distance(net, other, group) < 1e-10
    used = copy.deepcopy(net)
    with torch.no_grad():
        used[0].weight[1] = 7
        used[4].weight[:, 3] = 7
    assert distance(net, used, group) < 1e-10
    with torch.no_grad():
        used[0].weight[0] *= 2
    assert distance(net, used, group) > 0.1


class Adapted(nn.Module):
    """Attention, whose scales are products, with an adapter of low rank that begins as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x) + self.up(self.down(x))
        return self.head(F.scaled_dot_product_attention(self.query(x), self.key(x), value))


def test_a_dormant_adapter_beside_attention_does_not_count(generator: torch.Generator) -> None:
    net = Adapted().double()
    group = scaling_group(net, zeros(1, 5, 3))
    assert not bool(group.monomials.simple.all())
    assert int((~group.alive()).sum()) == 2
    assert distance(net, rescaled(net, group, generator), group) < 1e-10
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.query.weight.add_(1.0)
    assert distance(net, other, group) > 0.1


def test_a_distance_of_nothing_is_zero_and_of_what_is_undefined_undefined() -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan
    assert math.isnan(distance(broken, net, group))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert distance(net, copy.deepcopy(net), group, relative=True) == 0.0


def test_types_may_differ() -> None:
    net = mlp(3, 5, 2).bfloat16()
    group = scaling_group(net, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert distance(net, copy.deepcopy(net).double(), group) == 0.0
    assert imbalance(group) == pytest.approx(imbalance(scaling_group(net.double(), zeros(1, 3))), rel=1e-12)


def test_models_that_do_not_match_are_refused_with_what_differs() -> None:
    net, wide, deep = mlp(3, 5, 2), mlp(3, 6, 2), mlp(3, 5, 5, 2)
    group = scaling_group(net, zeros(1, 3))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[5, 3\] in the model and \[6, 3\] in the reference"):
        distance(net, wide, group)
    with pytest.raises(ValueError, match=r"'4.weight' is in the reference only"):
        distance(net, deep, group)
    with pytest.raises(ValueError, match=r"'4.weight' is in the model only"):
        distance(deep, net, group)
    around = nn.Sequential(net)
    with pytest.raises(
        ValueError, match=r"the group is not one of the models: '0.weight' is in the group only.*part of"
    ):
        distance(around, copy.deepcopy(around), group)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[5, 3\] in the group and \[6, 3\] in the models"):
        distance(wide, copy.deepcopy(wide), group)
