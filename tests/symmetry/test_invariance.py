"""Acting with any group element changes no output; every class has one balanced member."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from tests.selection import few
from tests.symmetry.helpers import assert_same, assert_same_weights, copies, draw_, evaluate, log_scales, put_, squares
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import SHARED, TINY

ALL = [*SHARED, *TINY]
RESCALED = [case for case in ALL if case.units]
every_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
every_rescaled_case = pytest.mark.parametrize("case", RESCALED, ids=lambda case: case.name)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def prepared(case: Case, generator: torch.Generator) -> tuple[nn.Module, tuple[Tensor, ...], ScalingGroup]:
    module = case.build()
    draw_(module, generator)
    inputs = case.inputs(generator)
    return module, inputs, scaling_group(module, *inputs)


def sum_of_squares(group: ScalingGroup) -> float:
    return sum(float(p.detach().square().sum()) for p in group.parameters.values())


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_shared_networks_have_the_expected_number_of_units(case: Case, generator: torch.Generator) -> None:
    assert prepared(case, generator)[2].num_units == case.units


@every_rescaled_case
@pytest.mark.parametrize("training", few([False, True], [True]), ids=["eval", "train"])
def test_acting_changes_no_output_and_no_running_statistic(
    case: Case, training: bool, generator: torch.Generator
) -> None:
    module, inputs, group = prepared(case, generator)
    module.train(training)
    rescaled = deepcopy(module)
    before, weights = evaluate(module, inputs), copies(group)
    own = scaling_group(rescaled, *inputs)
    scale = log_scales(own, generator)
    assert own.act_(scale) is own
    assert any(bool((rescaled.get_parameter(name) != weight).any()) for name, weight in weights.items())
    assert_same(evaluate(rescaled, inputs), before)
    for (name, expected), (_, actual) in zip(module.named_buffers(), rescaled.named_buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=name)


@every_case
def test_the_mode_does_not_decide_which_units_there_are(case: Case, generator: torch.Generator) -> None:
    module, inputs, group = prepared(case, generator)
    other = scaling_group(module.eval(), *inputs)
    assert other.num_units == group.num_units
    for first, second in zip(group.couplings, other.couplings, strict=True):
        assert (first.parameter, first.region) == (second.parameter, second.region)
        assert torch.equal(first.incoming, second.incoming)
        assert torch.equal(first.outgoing, second.outgoing)


@every_rescaled_case
def test_acting_is_a_group_action(case: Case, generator: torch.Generator) -> None:
    _, _, group = prepared(case, generator)
    start = copies(group)
    first, second = log_scales(group, generator), log_scales(group, generator)
    together = copies(group.act_(first + second))
    put_(group, start)
    assert_same_weights(together, copies(group.act_(first).act_(second)), 1e-12)
    group.act_(-first - second)
    assert_same_weights(start, copies(group), 1e-12)


@every_rescaled_case
def test_balancing_changes_no_output_and_equalises_squares(case: Case, generator: torch.Generator) -> None:
    module, inputs, group = prepared(case, generator)
    module.eval()
    before, start = evaluate(module, inputs), copies(group)
    applied = group.balance_()
    assert_same(evaluate(module, inputs), before)
    incoming, outgoing = squares(group)
    torch.testing.assert_close(incoming, outgoing, rtol=1e-10, atol=0.0)
    balanced = copies(group)
    put_(group, start)
    assert_same_weights(balanced, copies(group.act_(applied)), 1e-12)


@every_rescaled_case
def test_balancing_is_idempotent(case: Case, generator: torch.Generator) -> None:
    _, _, group = prepared(case, generator)
    group.balance_()
    once = copies(group)
    assert float(group.balance_().abs().max()) < 1e-10
    assert_same_weights(once, copies(group), 1e-10)


@every_rescaled_case
@pytest.mark.parametrize("size", few([1.0, 8.0], [8.0]))
def test_balanced_weights_depend_on_the_class_alone(case: Case, size: float, generator: torch.Generator) -> None:
    _, _, group = prepared(case, generator)
    start = copies(group)
    group.balance_()
    expected = copies(group)
    put_(group, start)
    group.act_(log_scales(group, generator, size)).balance_()
    assert_same_weights(expected, copies(group))


@every_rescaled_case
def test_balanced_weights_have_the_least_sum_of_squares(case: Case, generator: torch.Generator) -> None:
    _, _, group = prepared(case, generator)
    group.balance_()
    least, balanced = sum_of_squares(group), copies(group)
    for _ in range(20):
        put_(group, balanced)
        group.act_(log_scales(group, generator, 0.1))
        assert sum_of_squares(group) > least


def test_balancing_leaves_dormant_units_alone(generator: torch.Generator) -> None:
    case = next(case for case in TINY if case.name == "unequal widths")
    module, inputs, group = prepared(case, generator)
    with torch.no_grad():
        module[2].weight[:, 1] = 0.0  # all that leads out of unit 1 of the first layer
        module[4].weight[3] = 0.0  # all that leads into unit 3 of the third, its bias too
        module[4].bias[3] = 0.0
    before = evaluate(module, inputs)
    dormant = torch.zeros(13, dtype=torch.bool)
    dormant[[1, 6 + 2 + 3]] = True
    assert torch.equal(group.alive(), ~dormant)
    start = copies(group)
    applied = group.balance_()
    assert (applied[dormant] == 0).all()
    assert (applied[~dormant] != 0).all()
    assert torch.equal(module[0].weight[1], start["0.weight"][1])
    assert torch.equal(module[6].weight[:, 3], start["6.weight"][:, 3])
    incoming, outgoing = squares(group)
    torch.testing.assert_close(incoming[~dormant], outgoing[~dormant], rtol=1e-10, atol=0.0)
    assert_same(evaluate(module, inputs), before)


def test_a_unit_is_dormant_if_all_of_its_paths_end_in_dormant_units(generator: torch.Generator) -> None:
    case = next(case for case in TINY if case.name == "residual mlp")
    module, _, group = prepared(case, generator)
    with torch.no_grad():
        module.down.weight.zero_()
    assert group.alive().tolist() == [True] * 4 + [False] * 5
    up = module.up.bias.clone()
    group.balance_()
    assert torch.equal(module.up.bias, up)


def test_balancing_moves_only_the_units_it_is_told_to(generator: torch.Generator) -> None:
    case = next(case for case in TINY if case.name == "unequal widths")
    _, _, group = prepared(case, generator)
    active = torch.arange(13) % 2 == 0
    applied = group.balance_(active)
    assert (applied[~active] == 0).all()
    incoming, outgoing = squares(group)
    torch.testing.assert_close(incoming[active], outgoing[active], rtol=1e-10, atol=0.0)
    assert not torch.allclose(incoming[~active], outgoing[~active], rtol=1e-3)


def test_balancing_a_network_without_freedoms_changes_nothing(generator: torch.Generator) -> None:
    case = next(case for case in TINY if case.name == "gelu")
    _, _, group = prepared(case, generator)
    start = copies(group)
    assert group.balance_().shape == (0,)
    for name, weight in copies(group.act_(torch.zeros(0))).items():
        assert torch.equal(weight, start[name])


@pytest.mark.parametrize(
    "scale", [torch.zeros(1), torch.full((4,), float("nan")), torch.tensor([0.0, 0.0, float("inf"), 0.0])]
)
def test_acting_refuses_what_is_not_a_group_element(scale: Tensor) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    group = scaling_group(module, torch.zeros(1, 2))
    start = copies(group)
    with pytest.raises(ValueError, match="log_scale"):
        group.act_(scale)
    for name, weight in copies(group).items():
        assert torch.equal(weight, start[name])


def test_covectors_are_divided_by_what_weights_are_multiplied_with(generator: torch.Generator) -> None:
    case = next(case for case in TINY if case.name == "resnet")
    module, inputs, group = prepared(case, generator)

    def gradients() -> dict[str, Tensor]:
        names, parameters = zip(*group.parameters.items(), strict=True)
        return dict(zip(names, torch.autograd.grad(module(*inputs).square().sum(), parameters), strict=True))

    carried = gradients()
    scale = log_scales(group, generator)
    group.rescale_(carried, scale, power=-1)
    group.act_(scale)
    for name, gradient in gradients().items():
        torch.testing.assert_close(carried[name], gradient, rtol=1e-8, atol=1e-10)
