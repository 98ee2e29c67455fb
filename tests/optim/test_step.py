"""One step of the optimizer, its guard, and values that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.steps.coordinates import PathCoordinates
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.skeleton import Skeleton
from tests.optim.optimizer_runs import SGD, balanced, coordinates_of, gradients_of, path_sgd, paths_of
from tests.optim.training import (
    RULES,
    distance,
    ec_sgd,
    loss_of,
    problem,
    put_back,
    rescaled,
    same_bits,
    train,
    weights_of,
)
from tests.paths.explicit import place_of

# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True}])
def test_the_first_step_is_that_of_the_base_optimizer_at_the_balanced_weights(options: dict[str, Any]) -> None:
    module, x, y = problem(4, 6, 5, 3)
    plain = balanced(module, x)
    paths = paths_of(plain, x)
    train(module, path_sgd(module, x, lr=0.05, **options), x, y, range(1))
    train(plain, SGD(plain.parameters(), lr=0.05, **options), x, y, range(1))
    ordinary = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in module.named_parameters()}
    for name, index in [*paths.fixed.values(), *paths.out.values()]:
        ordinary[name][index] = False
    moved = []
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        ratio = (p / q).detach()
        for unit in paths.into[name].unique().tolist():
            # In path coordinates w times beta: one factor for all that leads into a unit, and none into an output.
            own = ratio[(paths.into[name] == unit) & ordinary[name]]
            expected = 1.0 if unit == -1 else float(own[0])
            torch.testing.assert_close(own, torch.full_like(own, expected), rtol=1e-12, atol=0)
            moved.append(abs(expected - 1))
    assert max(moved) > 1e-4


@RULES
def test_gradients_are_put_back_bit_for_bit(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.05, momentum=0.9)
    train(module, optimizer, x, y, range(3))
    optimizer.zero_grad()
    loss_of(module, x, y).backward()
    tensors = {name: p.grad for name, p in module.named_parameters()}
    values = {name: gradient.clone() for name, gradient in tensors.items() if gradient is not None}
    optimizer.step()
    for name, p in module.named_parameters():
        assert p.grad is tensors[name]
        assert torch.equal(p.grad, values[name])


@RULES
def test_gradients_after_a_refresh_are_those_at_the_balanced_weights(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    expected = gradients_of(balanced(rescaled(module, x), x), x, y)
    other = rescaled(module, x)
    optimizer = ec_sgd(other, x, rule=rule, lr=0.05)
    loss_of(other, x, y).backward()
    optimizer.step()
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


class Failing(SGD):
    """Fails in the middle of a step when told so."""

    fail = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.fail:
            raise MemoryError("no room for the momentum")
        return super().step(closure)


def failing_step(module: nn.Module, x: Tensor, y: Tensor, rule: str) -> tuple[EquivalentClassOptimizer, Failing]:
    """A few good steps, gradients, and a step that fails."""
    base = Failing(module.parameters(), lr=0.05, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(3))
    optimizer.zero_grad()
    loss_of(module, x, y).backward()
    base.fail = True
    return optimizer, base


@RULES
def test_gradients_are_put_back_when_the_base_step_fails(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer, _ = failing_step(module, x, y, rule)
    values = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(put_back(p.grad, values[name]) for name, p in module.named_parameters() if p.grad is not None)


@RULES
def test_nothing_has_moved_when_the_base_step_fails(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    twin = copy.deepcopy(module)
    optimizer, base = failing_step(module, x, y, rule)
    before = weights_of(module)
    with pytest.raises(MemoryError):
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-14, atol=0)
    base.fail = False
    optimizer.step()
    other, other_base = failing_step(twin, x, y, rule)
    other_base.fail = False
    other.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@RULES
def test_coordinates_without_a_gradient_stay(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = balanced(module, x)
    paths = paths_of(start, x)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.05)
    loss_of(module, x, y).backward()
    module[2].weight.grad = None
    module[0].bias.grad = None
    optimizer.step()
    before, now = coordinates_of(start, paths, rule), coordinates_of(module, paths, rule)
    for name, value in now.items():
        stayed = name in ("2.weight", "0.bias")
        assert torch.allclose(value, before[name], rtol=1e-12, atol=1e-14) == stayed, name
    if rule == "path":  # the weights themselves take part in the move of the units that they lead into
        assert not torch.allclose(module[0].bias, start[0].bias, rtol=1e-9)
    assert module[2].weight.grad is None


@RULES
def test_a_step_without_any_gradient_only_balances(rule: str) -> None:
    module, x, _ = problem(4, 6, 5, 3)
    expected = balanced(module, x)
    ec_sgd(module, x, rule=rule, lr=0.05, weight_decay=0.1).step()
    if rule == "path":
        assert same_bits(module, expected)
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0)


def test_weight_decay_does_not_move_the_fixed_skeleton_weights() -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = balanced(module, x)
    paths = paths_of(start, x)
    train(module, path_sgd(module, x, lr=0.05, momentum=0.9, weight_decay=0.5), x, y, range(20))
    now, before = weights_of(module), weights_of(start)
    for name, index in paths.fixed.values():
        assert torch.equal(now[name][index], before[name][index])
    assert all(not torch.equal(now[name], before[name]) for name in now)


# Guard and non-finite values ------------------------------------------------------------------------------------------


HUGE = 1e3  # a learning rate at which every path wants to move by far more than the guard allows


def test_the_guard_limits_how_far_a_path_moves_in_one_step() -> None:
    module, x, y = problem(4, 6, 3)
    free = copy.deepcopy(module)
    optimizer = path_sgd(module, x, lr=HUGE)
    train(module, optimizer, x, y, range(1))
    statistics = optimizer.statistics()
    assert statistics is not None
    assert statistics.min_path_value == 0.5
    assert statistics.max_path_value == 2.0
    assert statistics.guarded_paths == 6
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().min_path_value >= 0.25
    assert optimizer.statistics().max_path_value <= 4.0
    assert optimizer.statistics().guarded_paths > 6

    optimizer = path_sgd(free, x, lr=HUGE, wrapper={"max_path_ratio": None})
    train(free, optimizer, x, y, range(1))
    assert optimizer.statistics().max_path_value > 2.0
    assert optimizer.statistics().min_path_value < 0  # the paper's rule lets a path change its sign
    assert optimizer.statistics().guarded_paths == 0


def test_the_guard_lets_no_skeleton_weight_change_its_sign() -> None:
    for limit, same in ((2.0, True), (None, False)):
        module, x, y = problem(4, 6, 3)
        paths = paths_of(balanced(module, x), x)
        optimizer = path_sgd(module, x, lr=HUGE, wrapper={"max_path_ratio": limit})
        train(module, optimizer, x, y, range(1))
        now = weights_of(module)
        signs = [bool(now[name][index].sign() == paths.start[name][index].sign()) for name, index in paths.out.values()]
        assert all(signs) == same


def test_counts_start_over_at_a_refresh() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = path_sgd(module, x, lr=HUGE)
    assert optimizer.statistics() is None
    train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().guarded_paths > 0
    optimizer.refresh()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.statistics().guarded_paths == 0
    assert optimizer.statistics().min_path_value == optimizer.statistics().max_path_value == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_skeleton_that_takes_over_the_rows_of_the_last_one_moves_the_same_bits(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first refreshes meet dormant units, which come to life."""
    runs, made = [], []
    make = Rows.__init__

    def counted(self: Rows, *args: Any) -> None:
        made.append(self)
        make(self, *args)

    monkeypatch.setattr(Rows, "__init__", counted)
    for keeps in (True, False):
        module, x, y = problem(4, 6, 5, 3)
        with torch.no_grad():
            module[2].weight[:, :2] = 0
        if not keeps:
            monkeypatch.setattr(PathCoordinates, "_has_rows_of", lambda *args: False)
        optimizer = path_sgd(module, x, lr=0.05, momentum=momentum, wrapper={"refresh_interval": 3})
        train(module, optimizer, x, y, range(12))
        runs.append((module, len(made)))
    assert runs[0][1] == 2  # one with, one without dormant units
    assert runs[1][1] - runs[0][1] == 4  # one for each refresh
    assert same_bits(runs[0][0], runs[1][0])


@RULES
def test_dormant_units_are_counted(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    with torch.no_grad():
        module[2].weight[:, :2] = 0
    optimizer = ec_sgd(module, x, rule=rule, lr=0.01)
    train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 2
    # The gradient has brought them to life; a refresh finds them.
    optimizer.refresh()
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().dormant_units == 0


@pytest.mark.parametrize("side", ["in", "out"])
def test_no_path_leads_through_a_dormant_unit(side: str) -> None:
    module, x, y = problem(4, 5, 6, 3)
    with torch.no_grad():
        if side == "in":  # its outgoing weights carry nothing
            module[0].weight[3] = 0
            module[0].bias[3] = 0
            own = "2.weight", {(row, 3) for row in range(6)}
        else:  # nothing comes of its incoming weights
            module[4].weight[:, 3] = 0
            own = "2.weight", {(3, column) for column in range(5)}
    optimizer = path_sgd(module, x, lr=0.01)
    train(module, optimizer, x, y, range(1))
    skeleton = Skeleton.from_state_dict(optimizer.state_dict()["equivalent_class"]["skeleton"])
    assert int(skeleton.active.sum()) == 10
    for coupling, index in (
        (skeleton.fixed_coupling, skeleton.fixed_index),
        (skeleton.out_coupling, skeleton.out_index),
    ):
        for unit in skeleton.active.nonzero().flatten():
            name, place = place_of(optimizer.group, int(coupling[unit]), int(index[unit]))
            assert name != own[0] or place not in own[1]


def with_a_zero_last_layer() -> tuple[nn.Module, Tensor, Tensor]:
    module, x, y = problem(4, 6, 3)
    with torch.no_grad():
        module[2].weight.zero_()
    return module, x, y


def test_a_zero_initialised_last_layer_trains_as_with_the_base_optimizer_until_a_refresh() -> None:
    module, x, y = with_a_zero_last_layer()
    plain = copy.deepcopy(module)
    optimizer = ec_sgd(module, x, rule="path", lr=0.05, momentum=0.9)
    train(module, optimizer, x, y, range(5))
    train(plain, SGD(plain.parameters(), lr=0.05, momentum=0.9), x, y, range(5))
    assert same_bits(module, plain)
    assert optimizer.statistics().dormant_units == 6
    before = distance(module, plain, x)
    optimizer.refresh()
    train(module, optimizer, x, y, range(5, 6))
    assert optimizer.statistics().dormant_units == 0
    assert before == 0
    assert not same_bits(module, plain)


def test_unit_steps_are_relative_before_any_unit_is_alive() -> None:
    module, x, y = with_a_zero_last_layer()
    hidden = module[0].weight.detach().square().mean().sqrt()
    optimizer = ec_sgd(module, x, lr=0.05)
    train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 6
    lengths = module[2].weight.detach().square().mean(1).sqrt()
    # Rows of zeros are as large as a typical one, here a hidden one.
    torch.testing.assert_close(lengths, (0.05 * hidden).expand(3), rtol=1e-10, atol=0)
    optimizer.refresh()
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().dormant_units == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_path_ratio", [2.0, None])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_that_are_not_finite_spoil_weights_as_with_the_base_optimizer(
    bad: float, max_path_ratio: float | None, momentum: float
) -> None:
    module, x, y = problem(4, 6, 5, 3)
    wrapper = {"max_path_ratio": max_path_ratio, "refresh_interval": 2}
    optimizer = path_sgd(module, x, lr=0.05, momentum=momentum, wrapper=wrapper)
    train(module, optimizer, x, y, range(1))
    paths = paths_of(balanced(problem(4, 6, 5, 3)[0], x), x)
    for p in module.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.step()
    statistics = optimizer.statistics()
    assert math.isfinite(statistics.min_path_value)
    assert math.isfinite(statistics.max_path_value)
    assert statistics.min_path_value > 0 or max_path_ratio is None
    skeleton = {*paths.fixed.values(), *paths.out.values()}
    for name, p in module.named_parameters():
        for index in map(tuple, p.isfinite().nonzero().tolist()):
            assert (name, index) in skeleton
    assert not bool(module(x).isfinite().any())
    for step in range(2, 6):  # through a refresh
        train(module, optimizer, x, y, range(step, step + 1))
        assert math.isfinite(optimizer.statistics().min_path_value)
        assert math.isfinite(optimizer.statistics().max_path_value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_that_are_not_finite_spoil_weights_with_unit_steps_too(bad: float, momentum: float) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule="unit", lr=0.05, momentum=momentum, wrapper={"refresh_interval": 2})
    train(module, optimizer, x, y, range(1))
    for p in module.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.step()
    assert not any(bool(p.isfinite().any()) for p in module.parameters())
    for step in range(2, 6):  # through a refresh
        assert math.isfinite(optimizer.statistics().clipped_share)
        train(module, optimizer, x, y, range(step, step + 1))


@pytest.mark.parametrize("kind", ["ordinary", "free"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_gradient_that_is_not_finite_spoils_its_own_weight(bad: float, kind: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    paths = paths_of(balanced(module, x), x)
    optimizer = path_sgd(module, x, lr=0.05)
    loss_of(module, x, y).backward()
    skeleton = {*paths.fixed.values(), *paths.out.values()}
    # An element that leads into an output, which no other coordinate depends on, or a free skeleton weight.
    ordinary = next(("4.weight", (0, k)) for k in range(5) if ("4.weight", (0, k)) not in skeleton)
    name, index = ordinary if kind == "ordinary" else paths.out[paths.free[0]]
    module.get_parameter(name).grad[index] = bad
    optimizer.step()
    assert not bool(module.get_parameter(name)[index].isfinite())
    spoilt = {(key, tuple(at)) for key, p in module.named_parameters() for at in (~p.isfinite()).nonzero().tolist()}
    # The path gradients of free skeleton weights further out depend on it.
    assert spoilt - {(name, index)} <= (set() if kind == "ordinary" else {paths.out[unit] for unit in paths.free})
    assert math.isfinite(optimizer.statistics().min_path_value)
    assert math.isfinite(optimizer.statistics().max_path_value)
