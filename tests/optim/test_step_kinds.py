"""Which steps of an optimizer are linear in gradients, of a size of their own, or made of a parameter as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adagrad, AdamW, Optimizer

from lightning_ecopt.optim.bases import step_kinds
from tests.optim.other_optimizers import Bare, Lookahead


class NewMuon(Optimizer):
    """Named as a Muon; takes matrices and vectors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


class Renamed(NewMuon):
    """Derived from one."""


class MuonSGD(SGD):
    """Derived from SGD, and made for matrices."""


class Several(Optimizer):
    """Runs others; its parameter groups are theirs, or copies."""

    def __init__(self, *optimizers: Optimizer, copied: bool = False) -> None:
        self.optimizers = optimizers
        self.param_groups = [{**group} if copied else group for one in optimizers for group in one.param_groups]


class Acquainted(SGD):
    """Knows another optimizer, as that of a discriminator, and does not run it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.other = AdamW([nn.Parameter(torch.ones(2))])


def kinds(
    make: Any, matrix: Mapping[str, Any] | None = None, vector: Mapping[str, Any] | None = None
) -> tuple[str, str, str]:
    """Of the steps in a matrix, a convolution's weight and a vector; options of their groups can be given."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3, 2, 2, 2), (3,))]
    groups = [{"params": parameters[:2], **(matrix or {})}, {"params": parameters[2:], **(vector or {})}]
    found = step_kinds(make(groups))
    assert found.keys() == set(map(id, parameters))
    return tuple(found[id(p)] for p in parameters)


@pytest.mark.parametrize("make", [lambda groups: SGD(groups, lr=0.1), ASGD, Acquainted])
def test_steps_of_sgd_are_linear(make: Any) -> None:
    assert kinds(make) == ("linear", "linear", "linear")


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: Bare(SGD(groups, lr=0.1)),
        lambda groups: Lookahead(Bare(ASGD(groups))),
        lambda groups: Several(SGD(groups[:1], lr=0.1), Bare(ASGD(groups[1:]))),
    ],
)
def test_steps_of_what_runs_sgd_alone_in_its_own_groups_are_linear(make: Any) -> None:
    assert kinds(make) == ("linear", "linear", "linear")


def test_what_runs_sgd_and_others_has_the_steps_of_each_in_its_groups() -> None:
    assert kinds(lambda groups: Several(SGD(groups[:1], lr=0.1), AdamW(groups[1:]))) == ("linear", "linear", "own size")
    assert kinds(lambda groups: Several(NewMuon(groups[:1]), SGD(groups[1:], lr=0.1))) == ("whole", "whole", "linear")


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: Several(SGD(groups, lr=0.1), copied=True),  # which rates and momenta SGD has is not known
        lambda groups: Several(SGD(groups, lr=0.1), AdamW(groups)),
        lambda groups: Several(SGD(groups, lr=0.1), Lookahead(AdamW(groups))),
    ],
)
def test_steps_of_what_runs_sgd_in_other_groups_or_beside_another_are_not_linear(make: Any) -> None:
    assert kinds(make) == ("own size", "own size", "own size")


@pytest.mark.parametrize("make", [AdamW, Adagrad, lambda groups: Lookahead(AdamW(groups))])
def test_steps_of_most_others_have_a_size_of_their_own(make: Any) -> None:
    assert kinds(make) == ("own size", "own size", "own size")


@pytest.mark.parametrize("make", [NewMuon, Renamed, lambda groups: Bare(NewMuon(groups))])
def test_steps_of_a_muon_are_made_of_whole_matrices(make: Any) -> None:
    assert kinds(make) == ("whole", "whole", "own size")


@pytest.mark.parametrize("flag", [{"use_muon": False}, {"use_fallback": True}])
def test_a_group_says_that_muon_does_not_step_it(flag: dict[str, Any]) -> None:
    assert kinds(NewMuon, flag, flag) == ("own size", "own size", "own size")


def test_a_group_of_any_optimizer_says_that_its_parameters_are_treated_whole() -> None:
    assert kinds(Adagrad, {"use_muon": True}) == ("whole", "whole", "own size")
    assert kinds(MuonSGD, vector={"use_muon": False}) == ("whole", "whole", "linear")
    assert kinds(lambda groups: Bare(MuonSGD(groups))) == ("whole", "whole", "linear")
