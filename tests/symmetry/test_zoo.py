"""Networks as people write them: acting keeps their outputs, and no freedom is missed."""

from __future__ import annotations

import pytest
import torch

from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from tests.selection import few
from tests.symmetry.helpers import assert_complete, assert_same, copies, draw_, evaluate, put_
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case

every_case = pytest.mark.parametrize("case", few(ZOO, FAST), ids=lambda case: case.name)


def test_the_zoo_is_large_and_its_names_are_unique() -> None:
    assert len(ZOO) >= 60
    assert len({case.name for case in ZOO}) == len(ZOO)


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_acting_changes_no_output(case: Case, training: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    module = case.build().train(training)
    draw_(module, generator)
    inputs = case.inputs(generator)
    group = scaling_group(module, *inputs)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    before = evaluate(module, inputs)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    group.act_(torch.randn(group.num_units, generator=generator, dtype=torch.float64))
    assert_same(evaluate(module, inputs), before)


@every_case
def test_as_many_units_as_a_count_that_knows_nothing_of_layers(case: Case) -> None:
    module = case.build().eval()
    group = scaling_group(module, *case.inputs(torch.Generator().manual_seed(0)))
    assert group.num_units == case.units
    assert_complete(module, case.inputs)


@pytest.mark.parametrize("case", few([case for case in ZOO if case.units], FAST), ids=lambda case: case.name)
def test_the_balanced_member_depends_on_the_class_alone(case: Case) -> None:
    generator = torch.Generator().manual_seed(2)
    module = case.build().eval()
    draw_(module, generator)
    inputs = case.inputs(generator)
    group = scaling_group(module, *inputs)
    before, start = evaluate(module, inputs), copies(group)
    assert group.alive().all()
    group.balance_()
    balanced = copies(group)
    assert_same(evaluate(module, inputs), before)

    def size() -> torch.Tensor:
        """What balancing makes least: the squares, less what keeps the length of scale-invariant weights."""
        squares = sum(weight.square().sum() for weight in copies(group).values())
        return squares - 2 * (rows * moved * group.scale_invariant).sum()

    put_(group, start)
    group.act_(torch.randn(group.num_units, generator=generator, dtype=torch.float64)).balance_()
    for name, weight in copies(group).items():
        torch.testing.assert_close(weight, balanced[name], rtol=1e-9, atol=0.0, msg=name)

    rows = _rows(group)
    moved = torch.zeros(group.num_units, dtype=torch.float64)
    least = size()
    for _ in range(5):
        put_(group, balanced)
        moved = 0.1 * torch.randn(group.num_units, generator=generator, dtype=torch.float64)
        group.act_(moved)
        assert size() > least


def _rows(group: ScalingGroup) -> torch.Tensor:
    """How many rows of weights each unit leads into, counted one by one."""
    rows = torch.zeros(group.num_units, dtype=torch.float64)
    for coupling in group.couplings:
        weight = coupling.view(group.parameters[coupling.parameter])
        incoming = coupling.incoming.expand(weight.shape)
        for row in incoming:
            for unit in row.unique().tolist():
                if 0 <= unit < group.num_units:
                    rows[unit] += (row == unit).sum() / row.numel()
    return rows


def test_lengths_of_normalised_weights_are_scale_invariant() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4).double())
    group = scaling_group(
        torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(4, 1).double()), torch.randn(2, 3).double()
    )
    assert group.num_units == 4 + 4
    assert int(group.scale_invariant.sum()) == 4
    group.balance_()
    direction = group.parameters["0.parametrizations.weight.original1"]
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(4, dtype=torch.float64))
