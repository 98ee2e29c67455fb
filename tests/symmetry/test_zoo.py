"""Networks as people write them: acting keeps their outputs, and no freedom is missed."""

from __future__ import annotations

import pytest
import torch

from lightning_ecopt.symmetry import scaling_group
from tests.symmetry.helpers import assert_complete, assert_same, draw_, evaluate
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Case

every_case = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


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
