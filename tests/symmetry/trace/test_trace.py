"""What one traced call sees, what it grounds, and that it leaves nothing behind."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.symmetry import scaling_group
from lightning_ecopt.symmetry.rules import RULES
from lightning_ecopt.symmetry.scales import Operation
from tests.networks import mlp
from tests.symmetry.trace.networks import Net, assert_untouched, by_hand, signature, snapshot

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    logits: Tensor


# What is is_fixed, and what it cost -----------------------------------------------------------------------------------


def test_an_operation_without_a_rule_grounds_what_it_touches_and_is_charged(x: Tensor) -> None:
    class Wavy(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.erf()

    layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6), Wavy(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    group = scaling_group(nn.Sequential(*layers).double(), x)
    assert group.num_units == 4 + 5
    assert dict(group.costs) == {Operation("erf", "3"): 6, Operation("output", ""): 3}


def test_the_operation_that_comes_first_is_charged(x: Tensor) -> None:
    group = scaling_group(nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Tanh(), nn.Linear(4, 1)).double(), x)
    assert dict(group.costs) == {Operation("gelu", "1"): 4, Operation("output", ""): 1}


def test_outputs_are_charged_to_the_output(x: Tensor) -> None:
    assert dict(scaling_group(Net(), x).costs) == {Operation("output", ""): 3}


def test_an_unknown_operation_that_writes_grounds_what_it_writes_to(x: Tensor) -> None:
    group = scaling_group(Net(lambda m, h: torch.zeros_like(h).copysign_(h)), x)
    assert group.num_units == 0
    costs = {(operation.name, operation.module.partition(",")[0]): count for operation, count in group.costs.items()}
    assert costs["copysign", "forward"] == 4


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda m, h: setattr(m, "hidden", h), id="attribute"),
        pytest.param(lambda m, h: setattr(m, "hidden", {"a": [h.detach()]}), id="nested attribute"),
        pytest.param(lambda m, h: setattr(m.body, "hidden", h), id="attribute of a submodule"),
        pytest.param(lambda m, h: setattr(m, "hidden", Result(h)), id="dataclass attribute"),
        pytest.param(lambda m, h: m.state.copy_(h.detach()[0]), id="buffer"),
        pytest.param(lambda m, h: m.state.mul_(0.9).add_(h.detach().mean(0)), id="running mean"),
        pytest.param(lambda m, h: m.wide[1].copy_(h.detach()[0]), id="part of a buffer"),
        pytest.param(lambda m, h: m.wide.__setitem__((slice(0, 5)), h.detach()), id="assigned part of a buffer"),
        pytest.param(lambda m, h: setattr(m, "state", h.detach()[0]), id="rebound buffer"),
        pytest.param(lambda m, h: setattr(m, "state", m.state + h.detach().mean(0)), id="rebound running mean"),
    ],
)
@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_what_the_module_keeps_stays_as_it_is(keep: Callable[[Any, Tensor], Any], real: bool, x: Tensor) -> None:
    def between(m: Any, h: Tensor) -> None:
        keep(m, h)
        if real:
            by_hand(m, h)

    module = Net(between)
    before = snapshot(module)
    assert scaling_group(module, x).num_units == 0
    assert_untouched(module, before)


@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_lists_and_dicts_of_the_module_are_put_back(real: bool, x: Tensor) -> None:
    def between(m: Any, h: Tensor) -> None:
        m.history.append(h.detach())
        m.features["hidden"] = h
        if real:
            by_hand(m, h)

    module = Net(between)
    module.history, module.features = [], {}
    assert scaling_group(module, x).num_units == 0
    assert module.history == []
    assert module.features == {}


def test_data_that_leaves_as_a_number_is_grounded(x: Tensor) -> None:
    group = scaling_group(Net(lambda m, h: h * float(h.sum())), x)
    assert group.num_units == 0


@pytest.mark.parametrize("wrap", [
    pytest.param(lambda y: {"logits": y, "extra": [1, None]}, id="dict"),
    pytest.param(lambda y: (y, "text"), id="tuple"),
    pytest.param(lambda y: Pair(0, y), id="namedtuple"),
    pytest.param(Result, id="dataclass"),
    pytest.param(lambda y: [Result(y)], id="dataclass in a list"),
])  # fmt: skip
def test_all_tensors_of_the_output_stay_as_they_are(wrap: Callable[[Tensor], Any], x: Tensor) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 4, 3).double()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    assert scaling_group(Wrapped(), x).num_units == 4


def test_hidden_features_among_the_outputs_are_grounded(x: Tensor) -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            return {"logits": self.head(h), "hidden": {"features": [h[:, :2]]}}

    assert scaling_group(Both(), x).num_units == 2


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_may_be_given_by_keyword_and_in_any_structure(x: Tensor) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = mlp(2, 4, 3).double(), mlp(2, 5, 3).double()

        def forward(self, batch: dict[str, Tensor], *, other: Result, scale: float = 1.0) -> Tensor:
            return self.one(batch["x"]) * scale + self.two(other.logits)

    group = scaling_group(Keywords(), {"x": x}, other=Result(x), scale=2.0)
    assert group.num_units == 9


def test_inputs_are_left_as_they_are_even_if_the_module_writes_to_them(x: Tensor) -> None:
    before = x.clone()
    scaling_group(Net(), x)
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_values_of_inputs_do_not_matter(x: Tensor) -> None:
    module = Net()
    assert signature(scaling_group(module, x)) == signature(scaling_group(module, torch.full_like(x, float("nan"))))


def test_equal_unit_numbers_share_memory() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    group = scaling_group(module, torch.randn(2, 3))
    for each in (group, group.without(torch.arange(9) == 2)):
        sides = [side for coupling in each.couplings for side in (coupling.incoming, coupling.outgoing)]
        several = [side for side in sides if side.numel() > 1]
        assert len(several) == 8  # rows of three layers and their biases, columns of two
        assert len({side.untyped_storage().data_ptr() for side in several}) == 3


# Sums over segments ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 200)), max_size=8), st.randoms(use_true_random=False))
def test_segment_sums_are_those_of_index_add(sizes: list[int], random: Any) -> None:
    entries = [group for group, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(entries)
    groups = torch.tensor(entries, dtype=torch.long)
    # Whole numbers add up exactly in any order.
    values = torch.arange(1, len(entries) + 1, dtype=torch.float64)
    expected = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, values)
    assert torch.equal(SegmentSum(groups, len(sizes))(values), expected)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65, 512, 513, 5000])
def test_segment_sums_at_the_edges_of_their_levels(size: int) -> None:
    groups = torch.arange(3 * size) % 3
    values = torch.arange(3 * size, dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64).index_add_(0, groups, values)
    assert torch.equal(SegmentSum(groups, 4)(values), expected)


def test_segment_sums_are_the_same_bit_by_bit_wherever_other_groups_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator)
    alone = SegmentSum(torch.zeros(300, dtype=torch.long), 1)(values)
    groups = torch.cat([torch.zeros(300, dtype=torch.long), torch.ones(77, dtype=torch.long)])
    assert torch.equal(SegmentSum(groups, 2)(torch.cat([values, torch.ones(77)]))[0], alone[0])


def test_segment_sums_pass_gradients_on() -> None:
    values = torch.ones(40, dtype=torch.float64, requires_grad=True)
    groups = torch.arange(40) % 2
    (SegmentSum(groups, 2)(values) * torch.tensor([1.0, 3.0], dtype=torch.float64)).sum().backward()
    assert torch.equal(values.grad, 1.0 + 2.0 * groups)


def test_a_rule_that_fails_costs_freedoms_and_warns(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    def broken(call: Any) -> Any:
        raise RuntimeError("no such form")

    monkeypatch.setitem(RULES, "relu", broken)
    with pytest.warns(UserWarning, match="rule for relu failed.*no such form"):
        group = scaling_group(Net(), x)
    assert group.num_units == 0
    assert "relu" in {operation.name for operation in group.costs}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_scripted_modules_are_called_for_real(compiler: str, x: Tensor) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    scripted = torch.jit.script(module) if compiler == "script" else torch.jit.trace(module, x)
    group = scaling_group(scripted, x)
    assert (group.num_units, group.unseen) == (4, ())
    before = scripted(x)
    group.act_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    torch.testing.assert_close(scripted(x), before, rtol=1e-12, atol=1e-12)
