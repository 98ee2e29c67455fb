"""Steps of the base optimizer that pass by the one that wraps it, in plain PyTorch."""

from __future__ import annotations

import gc
import warnings
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.selection import few

X, Y = torch.linspace(-9, 9, 40).sin().view(5, 8), torch.arange(5) % 3


class TwoPhases(SGD):
    """SAM without an optimizer of its own: up, and then down from where it was."""

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for options in self.param_groups for p in options["params"]):
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for options in self.param_groups for p in options["params"]):
            p.copy_(self.state[p].pop("old")).sub_(p.grad, alpha=0.1)

    def restore(self) -> None:
        for p in (p for options in self.param_groups for p in options["params"]):
            p.data = self.state[p].pop("old")

    def count_steps(self) -> int:
        return 7


class Pair:
    """A network, and an optimizer that wraps another."""

    def __init__(self, kind: Any = SGD, rule: str = "unit", **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        self.base = kind(self.net.parameters(), lr=0.1, **options)
        self.optimizer = EquivalentClassOptimizer(self.base, scaling_group(self.net, X), rule=rule)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.net(X), Y).backward()

    def step(self, *calls: Any) -> list[str]:
        """Call something for each backward pass; what warnings say."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for call in calls:
                self.backward()
                call()
        return [str(each.message) for each in said]


def test_a_step_of_the_base_itself_is_told_once_and_names_both() -> None:
    pair = Pair(AdamW)
    (message,) = pair.step(pair.base.step, pair.base.step)
    assert message.startswith("The step of AdamW was called directly, past the EquivalentClassOptimizer")
    assert "self.optimizers()" in message
    assert not pair.step(pair.base.step, pair.optimizer.step)


def test_methods_that_move_weights_by_themselves() -> None:
    pair = Pair(TwoPhases)
    optimizer: Any = pair.optimizer
    assert not pair.step(optimizer.first_step, optimizer.second_step)
    (message,) = pair.step(optimizer.first_step, optimizer.second_step, optimizer.first_step, optimizer.second_step)
    assert message.startswith("first_step of TwoPhases moves weights by itself")
    assert "base_optimizer=ECSGD" in message


def test_methods_beside_steps_are_called_as_ever() -> None:
    pair = Pair(TwoPhases)
    optimizer: Any = pair.optimizer
    assert not pair.step(*3 * [optimizer.count_steps])
    assert optimizer.count_steps() == 7
    for _ in range(3):  # up, and a step of ours from where it was
        assert not pair.step(optimizer.first_step)
        assert not pair.step(lambda: (optimizer.restore(), optimizer.step()))


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("kind", [TwoPhases, AdamW])
def test_no_false_word(kind: Any, rule: str) -> None:
    pair = Pair(kind, rule)
    optimizer, base = pair.optimizer, pair.base
    assert not pair.step(optimizer.step, lambda: None, optimizer.step)
    optimizer.rest()  # after a fit
    assert not pair.step(base.step, base.step, optimizer.step, optimizer.step)
    for options in base.param_groups:  # as when a checkpoint makes a state
        options["lr"] = 0.0
    assert not pair.step(base.step)
    for options in base.param_groups:
        options["lr"] = 0.1
    base.zero_grad()
    base.step()  # nothing moves
    other = EquivalentClassOptimizer(base, scaling_group(pair.net, X))  # another takes its place
    assert not pair.step(other.step, optimizer.step)
    assert len([hook for hook in base._optimizer_step_pre_hooks.values() if "_StepHook" in repr(hook)]) == 1


def test_a_base_whose_wrapper_is_gone_is_free() -> None:
    pair = Pair()
    session = ref(pair.optimizer._session)
    base, pair.optimizer = pair.base, pair.base  # type: ignore[assignment]
    gc.collect()
    assert session() is None
    assert not pair.step(base.step)


@pytest.mark.parametrize("direct", few(["base", "first and second"], 2))
def test_the_path_rule_goes_on_from_where_a_direct_step_has_led(direct: str) -> None:
    """Its momentum is that of weights when the base steps by itself."""
    pair = Pair(TwoPhases, "path", momentum=0.9)
    pair.step(pair.optimizer.step, pair.optimizer.step)
    expected = Pair(TwoPhases, "path", momentum=0.9)
    expected.step(expected.optimizer.step, expected.optimizer.step)
    expected.optimizer.rest()
    if direct == "base":
        pair.step(pair.base.step)
        expected.step(expected.base.step)
    else:
        optimizer: Any = pair.optimizer
        pair.step(*2 * [optimizer.first_step, optimizer.second_step])
        expected.step(*2 * [expected.base.first_step, expected.base.second_step])
        pair.step(pair.base.step)
        expected.step(expected.base.step)
    for p, q in zip(pair.net.parameters(), expected.net.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not pair.step(pair.optimizer.step, pair.optimizer.step)
    assert all(bool(p.isfinite().all()) for p in pair.net.parameters())
