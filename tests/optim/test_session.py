"""The stages of an optimizer's life: what leads from one to the next, and what stays when something fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.optim.stages import Idle, Ready, Running, Waiting
from lightning_ecopt.symmetry import GroupFromNextCall
from tests.optim.training import RULES, problem, train, weights_of


def made(module: torch.nn.Module, group: object, rule: str, **options: object) -> EquivalentClassOptimizer:
    return EquivalentClassOptimizer(SGD(module.parameters(), lr=0.05, momentum=0.9), group, rule=rule, **options)


@RULES
def test_the_stages_follow_each_other(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, GroupFromNextCall(module, "forward"), rule, refresh_interval=2)
    session = optimizer._session
    assert type(session.stage) is Waiting
    train(module, optimizer, x, y, range(1))
    assert type(session.stage) is Running
    first = session.stage
    train(module, optimizer, x, y, range(1, 2))
    assert session.stage is first
    train(module, optimizer, x, y, range(2, 3))  # refreshes
    assert type(session.stage) is Running
    assert session.stage is not first
    optimizer.bind(scaling_group(module, x))
    assert type(session.stage) is Ready
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert type(session.stage) is Ready


@RULES
def test_without_freedoms_the_base_steps_by_itself(rule: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).double()
    _, x, y = problem(4, 6, 3)
    with pytest.warns(UserWarning, match="no scaling freedoms"):
        optimizer = made(module, scaling_group(module, x), rule)
    plain = copy.deepcopy(module)
    train(module, optimizer, x, y, range(3))
    train(plain, SGD(plain.parameters(), lr=0.05, momentum=0.9), x, y, range(3))
    assert type(optimizer._session.stage) is Idle
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


def test_a_refresh_that_fails_is_tried_again_at_the_next_step() -> None:
    module, x, y = problem(4, 6, 3)
    with torch.no_grad():
        module[0].weight.fill_diagonal_(0.0)  # the paper's choice needs a diagonal without zeros
    optimizer = made(module, scaling_group(module, x), "path", skeleton="diagonal")
    for _ in range(2):
        with pytest.raises(ValueError, match="No path leads through"):
            train(module, optimizer, x, y, range(1))
    assert type(optimizer._session.stage) is Ready
    optimizer.skeleton = "max"
    before = weights_of(module)
    train(module, optimizer, x, y, range(1))
    assert type(optimizer._session.stage) is Running
    assert any(not torch.equal(before[name], p) for name, p in module.named_parameters())


@RULES
def test_a_state_of_another_network_is_refused_and_changes_nothing(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, scaling_group(module, x), rule)
    train(module, optimizer, x, y, range(2))
    other, x2, y2 = problem(5, 6, 2)
    foreign = made(other, scaling_group(other, x2), rule)
    train(other, foreign, x2, y2, range(2))
    stage, twin = optimizer._session.stage, copy.deepcopy((module, optimizer))
    with pytest.raises(ValueError, match=r"load it into the network"):
        optimizer.load_state_dict(copy.deepcopy(foreign.state_dict()))
    assert optimizer._session.stage is stage
    train(module, optimizer, x, y, range(2, 5))
    train(*twin, x, y, range(2, 5))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin[0].parameters(), strict=True))


@RULES
def test_a_group_that_does_not_fit_leaves_the_present_one(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, scaling_group(module, x), rule)
    train(module, optimizer, x, y, range(2))
    stage = optimizer._session.stage
    other, _, _ = problem(4, 6, 3)
    with pytest.raises(ValueError, match="traced from another module"):
        optimizer.bind(scaling_group(other, x))
    assert optimizer._session.stage is stage
    train(module, optimizer, x, y, range(2, 4))
    assert optimizer.group is stage.network.group


def test_a_group_that_does_not_fit_leaves_one_that_is_waited_for() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, GroupFromNextCall(module, "forward"), "unit")
    other, _, _ = problem(4, 6, 3)
    with pytest.raises(ValueError, match="traced from another module"):
        optimizer.bind(scaling_group(other, x))
    train(module, optimizer, x, y, range(2))
    assert optimizer.group is not None


def test_a_step_after_too_small_a_call_may_be_tried_again_after_the_right_one() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, None, "unit")
    module[:2](x).sum().backward()
    with pytest.warns(UserWarning, match=r"No traced call has used these parameters.*: parameter 2, parameter 3\."):
        optimizer.step()
    train(module, optimizer, x, y, range(2))
    assert optimizer.group is not None
    assert not optimizer.group.unseen


def test_the_same_group_may_be_used_anew() -> None:
    module, x, y = problem(4, 6, 3)
    group = scaling_group(module, x)
    optimizer = made(module, group, "path")
    train(module, optimizer, x, y, range(2))
    optimizer.bind(group)
    assert type(optimizer._session.stage) is Ready
    assert optimizer.rule_state() is None


@RULES
def test_a_shorter_refresh_interval_counts_at_once(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = made(module, scaling_group(module, x), rule, refresh_interval=100)
    train(module, optimizer, x, y, range(10))
    assert optimizer._session.steps_since_refresh == 10
    optimizer.refresh_interval = 5
    train(module, optimizer, x, y, range(10, 11))
    assert optimizer._session.steps_since_refresh == 1


@RULES
def test_a_shorter_refresh_interval_counts_after_a_resume(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    first = made(module, scaling_group(module, x), rule, refresh_interval=100)
    train(module, first, x, y, range(10))
    second = made(module, scaling_group(module, x), rule, refresh_interval=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(module, second, x, y, range(10, 11))
    assert second._session.steps_since_refresh == 1


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_an_optimizer_all_of_whose_weights_are_zero_trains(base: type[torch.optim.Optimizer]) -> None:
    module, x, y = problem(4, 6, 5, 3)
    torch.nn.init.zeros_(module[-1].weight)
    torch.nn.init.zeros_(module[-1].bias)
    group = scaling_group(module, x)
    optimizers = [EquivalentClassOptimizer(base(m.parameters(), lr=0.05), group) for m in (module[:-1], module[-1])]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(p.isfinite().all() for p in module.parameters())
    assert module[-1].weight.abs().max() > 0
