"""Networks whose parameters are cut in any way are balanced, judged and trained as whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer
from lightning_ecopt.common.parts import Cut, FlatPiece, Grid, Layout
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one
from tests.networks import mlp
from tests.selection import examples, few
from tests.sharding.simulated import Simulated, cut, put_together
from tests.symmetry.helpers import draw_, flat_output
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Use
from tests.symmetry.zoo.tiny import SHARED, TINY

STEPS = 4
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def _normed() -> nn.Module:
    """Weights of which only the direction matters."""
    return nn.Sequential(
        weight_norm(nn.Linear(3, 6)), nn.ReLU(), weight_norm(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2)
    )


def _grouped() -> nn.Module:
    """A convolution, transposed and in groups, in which one row has several places."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "mlp": lambda: (mlp(3, 7, 5, 2).double(), (torch.randn(8, 3, dtype=torch.float64),)),
    "weight norm": lambda: (_normed().double(), (torch.randn(8, 3, dtype=torch.float64),)),
    "transposed": lambda: (_grouped().double(), (torch.randn(2, 2, 5, 5, dtype=torch.float64),)),
} | {
    case.name: lambda case=case: (case.build().eval(), case.inputs(torch.Generator().manual_seed(1)))  # type: ignore[misc]
    for case in [*TINY, *SHARED, *ZOO]
    if Use.SHARDS in case.good_for
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    module, inputs = NETWORKS[name]()
    draw_(module, torch.Generator().manual_seed(1))
    return module, inputs


@dataclass
class Run:
    """The training of a whole network.

    Args:
        group: of the weights at the end.
        start: the weights of the start, by name.
        gradients: of each step.
        weights: after each step.
        state: of the optimizer at the end, by name and entry.
        facts: what the group tells at the start.
    """

    group: ScalingGroup
    start: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    state: dict[tuple[str, str], Tensor]
    facts: dict[str, Tensor]


def facts(group: ScalingGroup, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a group tells of its weights."""
    alive, found = group.alive(), group.derivatives(gradients, roundoff=2.0**-22)
    to_gains = scale_to_gains_of_one(group, alive)
    return {
        "alive": alive,
        "imbalance": group.imbalance(),
        "total": found.total,
        "size": found.size,
        "rounding": found.rounding,
        "places": found.places,
        "gains": torch.zeros(0) if to_gains is None else to_gains,
    }


def optimizer_of(group: ScalingGroup, base: str, implementation: Any) -> EquivalentClassOptimizer:
    return EquivalentClassOptimizer(
        BASES[base](list(group.parameters.values())), group, refresh_interval=2, implementation=implementation
    )


def state_of(optimizer: EquivalentClassOptimizer, group: ScalingGroup) -> dict[tuple[str, str], Tensor]:
    return {
        (name, entry): value
        for name, p in group.parameters.items()
        for entry, value in optimizer.state[p].items()
        if isinstance(value, Tensor) and value.shape == p.shape
    }


def run_whole(name: str, base: str) -> Run:
    module, inputs = build(name)
    group = scaling_group(module, *inputs)
    start = {key: p.detach().clone() for key, p in group.parameters.items()}
    optimizer, gradients, weights, told = optimizer_of(group, base, "eager"), [], [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        flat_output(module(*inputs)).square().mean().backward()
        own = group.parameters.items()
        gradients.append({key: (torch.zeros_like(p) if p.grad is None else p.grad.clone()) for key, p in own})
        for key, p in own:
            p.grad = gradients[-1][key].clone()
        told = told or facts(group, gradients[-1])
        optimizer.step()
        weights.append({key: p.detach().clone() for key, p in own})
    return Run(group, start, gradients, weights, state_of(optimizer, group), told)


Layouts = dict[str, Sequence[Layout | None]]


@st.composite
def layouts(draw: st.DrawFn, weights: dict[str, Tensor], size: int) -> Layouts:
    """What each rank holds of each parameter: all, some positions along an axis or two, or a flat piece."""
    found: Layouts = {}
    for name, weight in weights.items():
        shape = tuple(weight.shape)
        way = draw(st.sampled_from(["axis", "axes", "flat", "copy"] if shape else ["flat", "copy"]))
        if way == "copy":
            found[name] = [None] * size
        elif way == "flat":
            count = prod(shape)
            ends = [0, *sorted(draw(st.lists(st.integers(0, count), min_size=size - 1, max_size=size - 1))), count]
            found[name] = [FlatPiece(shape, *ends[rank : rank + 2]) for rank in range(size)]
        else:
            inner = 2 if way == "axes" and size == 4 else 1  # dimensions of a mesh
            axes = [draw(st.integers(0, len(shape) - 1)) for _ in range(2)]
            stride = draw(st.integers(1, 2))
            found[name] = [
                Grid.of(
                    shape,
                    [Cut(axes[0], size // inner, rank // inner, stride), Cut(axes[1], inner, rank % inner)],
                )
                for rank in range(size)
            ]
    return found


def run_in_parts(run: Run, how: Layouts, ranks: Simulated, base: str, implementation: str) -> list[Run]:
    """The same training of what ranks hold, with the gradients of the whole one."""

    def train(rank: int) -> Run:
        own = {key: nn.Parameter(cut(weight, how[key][rank])) for key, weight in run.start.items()}
        for key, p in own.items():
            ranks.lay_out(p, how[key][rank])
        group = replace(run.group, parameters=own)
        start = {key: p.detach().clone() for key, p in own.items()}
        told = facts(group, {key: cut(gradient, how[key][rank]) for key, gradient in run.gradients[0].items()})
        optimizer, weights = optimizer_of(group, base, implementation), []
        for gradients in run.gradients:
            for key, p in own.items():
                p.grad = cut(gradients[key], how[key][rank])
            optimizer.step()
            weights.append({key: p.detach().clone() for key, p in own.items()})
        return Run(group, start, [], weights, state_of(optimizer, group), told)

    return ranks.run(train)


WHOLE: dict[tuple[str, str], Run] = {}


@pytest.mark.parametrize("implementation", few(["eager", "auto", "wrapped"], ["auto"]))
@examples(20, phases=[Phase.explicit, Phase.generate])  # a smaller case would take minutes to find
@given(data=st.data())
def test_parts_are_trained_as_the_whole(implementation: str, data: st.DataObject) -> None:
    name, base = data.draw(st.sampled_from(list(NETWORKS))), data.draw(st.sampled_from(list(BASES)))
    size = data.draw(st.sampled_from([2, 3, 4]))
    if (name, base) not in WHOLE:
        WHOLE[name, base] = run_whole(name, base)
    run = copy.copy(WHOLE[name, base])
    how, ranks = data.draw(layouts(run.start, size)), Simulated(size)
    found = run_in_parts(run, how, ranks, base, implementation)
    for fact, value in run.facts.items():
        assert all(torch.equal(own.facts[fact], found[0].facts[fact]) for own in found)  # the same bits
        tolerance = 1e-6 if fact == "rounding" else 1e-12  # an estimate, which is made in single precision
        largest = _size(run.facts["size"] if fact == "total" else value)  # a total is a sum that cancels
        torch.testing.assert_close(found[0].facts[fact], value, rtol=0, atol=tolerance * largest)
    for step, weights in enumerate(run.weights):
        _assert_same([own.weights[step] for own in found], weights, how)
    states = [{f"{key} {entry}": value for (key, entry), value in own.state.items()} for own in found]
    wanted = {f"{key} {entry}": value for (key, entry), value in run.state.items()}
    _assert_same(states, wanted, {key: how[key.rpartition(" ")[0]] for key in wanted})
    numbers = 4 * (run.group.monomials.num_scales + 1), 2 * len(Rows(run.group.couplings, run.start))
    assert max(ranks.sums) <= max(numbers)  # of units and of rows, and not of weights


def _size(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    finite = tensor.double()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _assert_same(found: Sequence[dict[str, Tensor]], wanted: dict[str, Tensor], how: Layouts) -> None:
    """All elements are those of the whole tensors, relative to the largest of each."""
    for key, tensor in wanted.items():
        whole = put_together([own[key] for own in found], how[key], tensor)
        assert float((whole - tensor).abs().max()) <= 1e-12 * _size(tensor), key
