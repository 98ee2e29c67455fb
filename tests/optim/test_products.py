"""Whole training runs of networks whose scales are products of units: attention, gates, powers, tied weights, norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.selection import few
from tests.symmetry.helpers import flat_output
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Case, Use

CASES = [case for case in ZOO if Use.PRODUCTS in case.good_for]


def start_of(case: Case) -> tuple[torch.nn.Module, tuple[object, ...], torch.Tensor]:
    """A network at random weights, a batch, and targets not far away."""
    generator = torch.Generator().manual_seed(1)
    module = case.build().eval()
    inputs = case.inputs(generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        target = flat_output(module(*inputs)) + 0.3
    return module, inputs, target


def test_the_cases_are_there() -> None:
    assert len(CASES) == 15


@pytest.mark.parametrize(
    "case",
    few(CASES, ["pre-norm self-attention", "relu gate", "tied embedding", "batch ensemble", "weight norm"]),
    ids=lambda case: case.name,
)
@pytest.mark.parametrize(
    ("rule", "base"), few([("unit", SGD), ("path", SGD), ("unit", AdamW)], [("unit", AdamW), ("path", SGD)])
)
def test_training_depends_on_the_class_alone(case: Case, rule: str, base: type[torch.optim.Optimizer]) -> None:
    module, inputs, target = start_of(case)
    other = copy.deepcopy(module)
    group = scaling_group(other, *inputs)
    assert not (group.monomials.simple & ~group.scale_invariant).all()
    group.act_(0.5 * torch.randn(group.num_units, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    outputs = []
    for one in (module, other):
        options = {"lr": 0.01, "momentum": 0.9} if base is SGD else {"lr": 1e-3}
        optimizer = EquivalentClassOptimizer(
            base(one.parameters(), **options), scaling_group(one, *inputs), rule=rule, refresh_interval=7
        )
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = (flat_output(one(*inputs)) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            outputs.append(flat_output(one(*inputs)))
    assert float((outputs[0] - outputs[1]).norm()) < 1e-10 * float(outputs[0].norm())


def test_units_in_products_have_no_paths() -> None:
    module, inputs, _ = start_of(next(case for case in CASES if case.name == "pre-norm self-attention"))
    group = scaling_group(module, *inputs)
    optimizers = {
        rule: EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), group, rule=rule) for rule in ("unit", "path")
    }
    assert optimizers["unit"].usable_units().all()
    assert torch.equal(optimizers["path"].usable_units(), group.monomials.simple)
    assert int(group.monomials.simple.sum()) == 12 - 4  # four channels of queries and keys
