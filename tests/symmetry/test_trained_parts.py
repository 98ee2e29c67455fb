"""One trace of all parameters gives the group of any part of them that is trained; several calls join."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import GroupFromModuleCalls, GroupFromNextCall, ScalingGroup, scaling_group
from lightning_ecopt.symmetry.trace import select_parameters, solved, trace
from tests.networks import mlp
from tests.selection import few
from tests.symmetry.helpers import assert_same, draw_, evaluate
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case


def chosen(module: nn.Module, generator: torch.Generator) -> set[str]:
    return {name for name, _ in module.named_parameters() if torch.rand((), generator=generator) < 0.6}


@pytest.mark.parametrize("case", few(ZOO, FAST), ids=lambda case: case.name)
def test_what_is_frozen_after_a_trace_is_held_fixed_as_if_it_had_been_frozen_before(case: Case) -> None:
    generator = torch.Generator().manual_seed(3)
    module, inputs = case.build().eval(), case.inputs(torch.Generator().manual_seed(0))
    parameters = select_parameters(module)
    equations = trace(module, parameters, *inputs)
    for _ in range(3):
        names = chosen(module, generator)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
        late, early = solved(parameters, equations, names), scaling_group(module, *inputs)
        assert late.num_units == early.num_units
        assert late.parameters.keys() == early.parameters.keys() == {n for n in parameters if n in names}
        assert late.unseen == early.unseen
        draw_(module, generator)
        before = evaluate(module, inputs)
        late.act_(torch.randn(late.num_units, generator=generator, dtype=torch.float64))
        assert_same(evaluate(module, inputs), before)


class HalfZeros(nn.Module):
    """Its second layer reads zeros beside what the first has given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([torch.zeros(len(x), 1, dtype=x.dtype), self.first(x).relu()], 1)
        return self.last(self.second(h).relu())


def test_a_frozen_weight_that_reads_zeros_in_part_ties_what_it_reads_to_what_it_gives() -> None:
    module, x = HalfZeros().double(), torch.randn(3, 4).double()
    parameters = select_parameters(module)
    equations = trace(module, parameters, x)
    module.second.requires_grad_(False)
    group = solved(parameters, equations, set(parameters) - {"second.weight"})
    assert group.num_units == scaling_group(module, x).num_units == 1
    before = module(x)
    group.act_(torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(module(x), before)


class Gated(nn.Module):
    """A product in the first call; one of its factors goes another way in the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.out, self.other = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.goes_on = False

    def forward(self, x: Tensor) -> Tensor:
        product = self.left(x) * self.right(x)
        return self.other(product) if self.goes_on else self.out(product)


def test_products_of_an_earlier_call_are_kept() -> None:
    module, x = Gated().double(), torch.randn(3, 4).double()
    pending = GroupFromNextCall(module, "forward")
    for module.goes_on in (False, True):
        pending.look_again()
        module(x)
        group = pending.settle()
    assert group is not None
    assert group.num_units == 8
    before = [module(x) for module.goes_on in (False, True)]
    group.act_(torch.randn(8).double())
    after = [module(x) for module.goes_on in (False, True)]
    torch.testing.assert_close(after, before)


def sum_of(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return first(x) + second(x)


class TwoParts(nn.Module):
    """Calls one part or the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.left, self.right = mlp(4, 6, 5)[:2], nn.Linear(6, 3), nn.Linear(6, 3)
        self.goes_left = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        return self.left(h) if self.goes_left else self.right(h.sigmoid())


def found_by(module: TwoParts, pending: GroupFromNextCall | GroupFromModuleCalls, *ways: bool) -> list[ScalingGroup]:
    groups = []
    for module.goes_left in ways:
        pending.look_again()
        module(torch.randn(2, 4))
        group = pending.settle()
        assert group is not None
        groups.append(group)
    return groups


KINDS = {
    "next call": lambda module: GroupFromNextCall(module, "forward"),
    "module calls": lambda module: GroupFromModuleCalls(module.parameters()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_adds_what_it_demands_and_what_it_uses(kind: str) -> None:
    module = TwoParts()
    pending = KINDS[kind](module)
    first, second = found_by(module, pending, True, False)
    assert (first.num_units, first.unseen) == (6, ("right.weight", "right.bias"))
    assert (second.num_units, second.unseen) == (0, ())  # the sigmoid
    assert pending.settle() is second


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_again_changes_nothing(kind: str) -> None:
    module = TwoParts()
    pending = KINDS[kind](module)
    first, second = found_by(module, pending, True, True)
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_what_thaws_is_solved_for_without_another_call(kind: str) -> None:
    module = mlp(4, 6, 5, 3)
    module[2].requires_grad_(False)
    pending = KINDS[kind](module)
    module(torch.randn(2, 4))
    frozen = pending.settle()
    assert frozen is not None
    assert set(frozen.parameters) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    module[2].requires_grad_(True)
    whole = pending.settle()
    assert whole is not None
    assert whole.fingerprint() == scaling_group(module, torch.randn(2, 4)).fingerprint()
    module[2].requires_grad_(False)  # it stays in the group, as something that may come back
    assert pending.settle() is whole
    assert pending.take_back(frozen.parameters) is frozen
    assert pending.take_back(["nothing"]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_pickle_know_what_was_found(kind: str) -> None:
    module = TwoParts()
    pending = KINDS[kind](module)
    (found,) = found_by(module, pending, True)
    for other, twin in (copy.deepcopy((module, pending)), pickle.loads(pickle.dumps((module, pending)))):
        group = twin.settle()
        assert group.fingerprint() == found.fingerprint()
        assert group.parameters["left.weight"] is other.left.weight
        twin.look_again()
        other.goes_left = False
        other(torch.randn(2, 4))
        assert twin.settle().unseen == ()
        assert not vars(other).get("forward")
        twin.cancel()
    assert pending.settle() is found
    pending.cancel()


def test_nobody_waits_for_ever_for_a_parameter_that_no_call_uses() -> None:
    module = nn.ModuleDict({"used": mlp(4, 6, 3), "spare": nn.Linear(2, 2)})
    pending = GroupFromModuleCalls(module.parameters())
    calls = []
    trace_call = pending.trace_call
    pending.trace_call = lambda *args, **kwargs: (calls.append(1), trace_call(*args, **kwargs))[1]  # type: ignore[method-assign]
    for _ in range(40):
        module["used"](torch.randn(2, 4))
    assert len(calls) == 17
    assert pending.group is not None
    assert len(pending.group.unseen) == 2
