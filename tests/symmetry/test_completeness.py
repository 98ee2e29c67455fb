"""As many freedoms are found as there are, by a count that knows nothing of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ecopt.symmetry import scaling_group
from tests.networks import mlp
from tests.symmetry.helpers import BATCH_NORM, assert_complete, count_freedoms, normal, nullity
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import TINY


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_as_many_units_as_were_counted_by_hand(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    group = scaling_group(case.build().eval(), *case.inputs(generator))
    assert group.num_units == case.units
    assert group.dimension == group.num_parameters - case.units


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_units_span_the_null_space_in_evaluation_mode(case: Case) -> None:
    assert_complete(case.build().eval(), case.inputs)


@pytest.mark.parametrize(
    "case",
    [case for case in TINY if any(isinstance(part, BATCH_NORM) for part in case.make().modules())],
    ids=lambda case: case.name,
)
def test_units_span_the_null_space_in_training_mode(case: Case) -> None:
    assert_complete(case.build().train(), case.inputs)


@pytest.mark.parametrize("case", [case for case in TINY if case.frozen], ids=lambda case: case.name)
def test_parameters_left_out_count_as_frozen(case: Case) -> None:
    module = case.build()
    inputs = case.inputs(torch.Generator().manual_seed(0))
    group = scaling_group(module, *inputs)
    kept = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(True)
    assert scaling_group(module, *inputs, parameters=kept).num_units == group.num_units == case.units


def test_the_count_itself_tells_a_freedom_from_its_absence() -> None:
    generator = torch.Generator().manual_seed(0)
    for activation, expected in ((nn.ReLU, 4), (nn.Softplus, 0)):
        module = mlp(2, 4, 2, activation=activation).double()
        rows, living = count_freedoms(module, normal((8, 2)), generator)
        assert living.all()
        assert nullity(rows) == expected


def test_elements_that_never_matter_are_left_out_of_both_counts() -> None:
    # With padding on all sides and a single pixel, only the centre of the second kernel ever sees data.
    module = nn.Sequential(nn.Conv1d(1, 3, 1), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1)).double()
    generator = torch.Generator().manual_seed(0)
    _, living = count_freedoms(module, normal((8, 1, 1)), generator)
    assert int((~living).sum()) == 2 * 3 * 2
    assert_complete(module, normal((8, 1, 1)))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: _Times("scalar"), id="scalar gain on channels"),
        pytest.param(lambda: _Times("square"), id="square of a relu"),
        pytest.param(lambda: _Times("product"), id="product of two layers"),
    ],
)
def test_products_of_scales(make: object) -> None:
    assert_complete(make().double(), normal((8, 3)))  # type: ignore[operator]


class _Times(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
        if kind == "scalar":
            self.gain = nn.Parameter(torch.ones(()))
        if kind == "product":
            self.other = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x).relu()
        factor = {"scalar": lambda: self.gain, "square": lambda: h, "product": lambda: self.other(x)}[self.kind]()
        return self.two(h * factor)


def test_shared_weight_without_bias_applied_twice_in_a_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.same(self.same(x).relu()).relu())

    assert_complete(Twice().double(), normal((8, 3)))
