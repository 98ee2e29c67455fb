from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.steps.skeleton import Skeleton, choose_skeleton
from lightning_ecopt.symmetry import GroupFromNextCall
from tests.networks import ResidualMLP, mlp, norm_cnn
from tests.optim.training import (
    RULES,
    distance,
    ec_sgd,
    loss_of,
    problem,
    put_back,
    rescaled,
    same_bits,
    through_a_file,
    train,
    weights_of,
)
from tests.paths.explicit import ExplicitPaths, ends, place_of

SGD = torch.optim.SGD


def balanced(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy at the balanced member of the class."""
    other = copy.deepcopy(module)
    scaling_group(other, x).balance_()
    return other


def paths_of(module: nn.Module, x: Tensor) -> ExplicitPaths:
    """The path coordinates, by their definition, that start at the weights of a balanced module."""
    group = scaling_group(module, x)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return ExplicitPaths(group, choose_skeleton(group.couplings, weights, group.alive()), weights)


def path_sgd(
    module: nn.Module, x: Tensor, *, wrapper: dict[str, Any] | None = None, **options: Any
) -> EquivalentClassOptimizer:
    """SGD with ``options`` on those coordinates."""
    return ec_sgd(module, x, rule="path", wrapper={"free_start": 1.0, **(wrapper or {})}, **options)


def gradients_of(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    tensors = dict(module.named_parameters())
    return dict(zip(tensors, torch.autograd.grad(loss_of(module, x, y), list(tensors.values())), strict=True))


def coordinates_of(module: nn.Module, paths: ExplicitPaths, rule: str) -> dict[str, Tensor]:
    """What the base optimizer moves."""
    return paths.paths(weights_of(module)) if rule == "path" else weights_of(module)


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


# Guard and non-finite values
# --------------------------------------------------------------------------------------------


HUGE = 1e3  # a learning rate at which every path wants to move by far more than the guard allows


def test_the_guard_limits_how_far_a_path_moves_in_one_step() -> None:
    module, x, y = problem(4, 6, 3)
    free = copy.deepcopy(module)
    optimizer = path_sgd(module, x, lr=HUGE)
    train(module, optimizer, x, y, range(1))
    statistics = optimizer.statistics()
    assert statistics is not None
    assert statistics.min_beta == 0.5
    assert statistics.max_beta == 2.0
    assert statistics.guarded_paths == 6
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().min_beta >= 0.25
    assert optimizer.statistics().max_beta <= 4.0
    assert optimizer.statistics().guarded_paths > 6

    optimizer = path_sgd(free, x, lr=HUGE, wrapper={"max_path_ratio": None})
    train(free, optimizer, x, y, range(1))
    assert optimizer.statistics().max_beta > 2.0
    assert optimizer.statistics().min_beta < 0  # the paper's rule lets a path change its sign
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
    assert optimizer.statistics().min_beta == optimizer.statistics().max_beta == 1.0


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
    # Rows of zeros are as large as the others are on average, here the hidden ones over all elements.
    elements, zeros = module[0].weight.numel(), module[2].weight.numel()
    expected = 0.05 * hidden * (elements / (elements + zeros)) ** 0.5
    torch.testing.assert_close(lengths, expected.expand(3), rtol=1e-10, atol=0)
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
    assert math.isfinite(statistics.min_beta)
    assert math.isfinite(statistics.max_beta)
    assert statistics.min_beta > 0 or max_path_ratio is None
    skeleton = {*paths.fixed.values(), *paths.out.values()}
    for name, p in module.named_parameters():
        for index in map(tuple, p.isfinite().nonzero().tolist()):
            assert (name, index) in skeleton
    assert not bool(module(x).isfinite().any())
    for step in range(2, 6):  # through a refresh
        train(module, optimizer, x, y, range(step, step + 1))
        assert math.isfinite(optimizer.statistics().min_beta)
        assert math.isfinite(optimizer.statistics().max_beta)


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
        assert math.isfinite(optimizer.statistics().clipped)
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
    assert math.isfinite(optimizer.statistics().min_beta)
    assert math.isfinite(optimizer.statistics().max_beta)


# What is shared with the base optimizer -------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


@RULES
@pytest.mark.parametrize("holder", ["base", "wrapper"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work_on_the_base_and_on_the_wrapper(name: str, holder: str, rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    base = SGD(module.parameters(), lr=0.1, momentum=0.9)
    reference = SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](optimizer if holder == "wrapper" else base)
        expected = SCHEDULERS[name](reference)
        for step in range(3):
            train(module, optimizer, x, y, range(step, step + 1))
            reference.step()
            arguments = [1.0] if name == "plateau" else []
            scheduler.step(*arguments)
            expected.step(*arguments)
            assert base.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
            assert base.param_groups[0]["momentum"] == reference.param_groups[0]["momentum"]
    assert base.param_groups[0]["lr"] != 0.1


@RULES
def test_a_scheduled_learning_rate_is_used(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    expected = balanced(module, x)
    train(module, optimizer, x, y, range(2))
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


@RULES
def test_groups_state_and_defaults_are_those_of_the_base(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    base = SGD(
        [{"params": module[0].parameters(), "lr": 0.01}, {"params": module[2].parameters()}], lr=0.1, momentum=0.9
    )
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(2))
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert [options["lr"] for options in optimizer.param_groups] == [0.01, 0.1]
    assert len(optimizer.state) == 4
    assert isinstance(optimizer, torch.optim.Optimizer)


@RULES
def test_a_parameter_group_that_does_not_learn_keeps_its_coordinates(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    start = balanced(module, x)
    paths = paths_of(start, x)
    groups = [{"params": module[0].parameters(), "lr": 0.0}, {"params": module[2].parameters()}]
    optimizer = EquivalentClassOptimizer(SGD(groups, lr=0.05, momentum=0.9), scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(5))
    before, now = coordinates_of(start, paths, rule), coordinates_of(module, paths, rule)
    for name, value in now.items():
        assert torch.allclose(value, before[name], rtol=1e-12, atol=1e-14) == name.startswith("0."), name


@RULES
def test_a_parameter_group_can_be_added_on_the_way(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    other = copy.deepcopy(module)
    group = scaling_group(other, x)
    # Before, the units behind the second layer touch a layer that nothing trains: they are left alone.
    own = ends(group, torch.ones(11, dtype=torch.bool))[0]["0.bias"]
    log_scale = torch.zeros(11, dtype=torch.float64)
    log_scale[own] = torch.randn(6, dtype=torch.float64)
    group.act_(log_scale)
    for one in (module, other):
        base = SGD([*one[0].parameters(), *one[2].parameters()], lr=0.02, momentum=0.9)
        optimizer = EquivalentClassOptimizer(base, scaling_group(one, x), rule=rule)
        last = weights_of(one[4])
        train(one, optimizer, x, y, range(5))
        assert all(torch.equal(p, last[name]) for name, p in one[4].named_parameters())
        assert optimizer.statistics().dormant_units == 0
        optimizer.add_param_group({"params": list(one[4].parameters()), "lr": 0.01})
        assert len(optimizer.param_groups) == 2
        train(one, optimizer, x, y, range(5, 15))
        assert all(not torch.equal(p, last[name]) for name, p in one[4].named_parameters())
    assert distance(module, other, x) < 1e-9


def test_adding_a_parameter_that_the_group_does_not_know_is_an_error() -> None:
    module, x, _ = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, lr=0.1)
    with pytest.raises(ValueError, match="traced from another module"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2))})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_gradients(set_to_none: bool) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, lr=0.1)
    loss_of(module, x, y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in module.parameters():
        assert p.grad is None if set_to_none else bool((p.grad == 0).all())


@RULES
def test_a_closure_is_called_once_before_anything_moves_and_its_loss_returned(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    twin = copy.deepcopy(module)
    before, calls = weights_of(module), []
    optimizer = ec_sgd(module, x, rule=rule, lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
        optimizer.zero_grad()
        loss = loss_of(module, x, y)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    other = ec_sgd(twin, x, rule=rule, lr=0.1, momentum=0.9)
    loss_of(twin, x, y).backward()
    assert other.step() is None
    assert same_bits(module, twin)


def test_the_representation_shows_base_and_group() -> None:
    module, x, _ = problem(4, 6, 3)
    text = repr(ec_sgd(module, x, lr=0.1, momentum=0.9))
    assert text.startswith("EquivalentClassOptimizer(SGD (")
    assert "momentum: 0.9" in text
    assert "ScalingGroup(num_units=6, num_parameters=51, dimension=45)" in text


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_of_parameters_train(dtype: torch.dtype, rule: str) -> None:
    module, x, y = problem(4, 16, 16, 3, dtype=dtype)
    wrapper = {"refresh_interval": 7}
    optimizer = ec_sgd(module, x, rule=rule, lr=0.02, momentum=0.9, weight_decay=1e-4, wrapper=wrapper)
    losses = train(module, optimizer, x, y, range(80))
    assert all(p.dtype == dtype for p in module.parameters())
    assert all(optimizer.state[p]["momentum_buffer"].dtype == dtype for p in module.parameters())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@RULES
def test_types_may_be_mixed(rule: str) -> None:
    module, x, y = problem(4, 6, 3, dtype=torch.float32)
    module[2].double()
    module.insert(2, Cast())
    y = y.double()
    optimizer = ec_sgd(module, x, rule=rule, lr=0.02, momentum=0.9)
    losses = train(module, optimizer, x, y, range(20))
    assert optimizer.statistics().dormant_units == 0
    assert [p.dtype for p in module.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert losses[-4:] < losses[:4]


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@RULES
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}])
def test_a_module_without_freedoms_trains_bit_for_bit_as_with_the_base_optimizer(
    options: dict[str, Any], rule: str
) -> None:
    torch.manual_seed(0)
    module = mlp(4, 6, 3, activation=nn.Tanh).double()
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    plain = copy.deepcopy(module)
    with pytest.warns(UserWarning, match="no scaling freedoms, so the base optimizer is used as it is"):
        optimizer = ec_sgd(module, x, rule=rule, lr=0.1, wrapper={"refresh_interval": 3}, **options)
    base = SGD(plain.parameters(), lr=0.1, **options)
    assert optimizer.group.num_units == 0
    assert train(module, optimizer, x, y, range(10)) == train(plain, base, x, y, range(10))
    assert same_bits(module, plain)
    assert optimizer.statistics().dormant_units == 0
    assert optimizer.state_dict()["param_groups"] == base.state_dict()["param_groups"]


@RULES
def test_two_optimizers_leave_the_units_that_touch_both_alone(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 7, 3)
    group = scaling_group(module, x)
    first_parameters = [*module[0].parameters(), *module[2].parameters()]
    second_parameters = [*module[4].parameters(), *module[6].parameters()]
    first = EquivalentClassOptimizer(SGD(first_parameters, lr=0.0), group, rule=rule)
    second = EquivalentClassOptimizer(SGD(second_parameters, lr=0.0), group, rule=rule)
    before = weights_of(module)

    def stayed(bias: Tensor) -> None:  # divided and multiplied by a scale under the rule "unit"
        torch.testing.assert_close(bias, before["2.bias"], rtol=0 if rule == "path" else 1e-15, atol=0)

    loss_of(module, x, y).backward()
    output = module(x).detach()
    first.step()
    after = weights_of(module)
    assert all(torch.equal(after[name], before[name]) for name in after if name[0] in "46")
    assert not torch.equal(after["0.weight"], before["0.weight"])
    stayed(after["2.bias"])
    second.step()
    after = weights_of(module)
    assert not torch.equal(after["4.bias"], before["4.bias"])
    stayed(after["2.bias"])
    torch.testing.assert_close(module(x), output, rtol=1e-12, atol=1e-14)
    # 18 units, 5 of them between the two optimizers.
    assert [int(one.usable_units().sum()) for one in (first, second)] == [6, 7]
    assert first.statistics().dormant_units == second.statistics().dormant_units == 0

    plain = copy.deepcopy(module)
    first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 0.05
    base = SGD(plain.parameters(), lr=0.05)
    module.zero_grad()
    loss_of(module, x, y).backward()
    loss_of(plain, x, y).backward()
    first.step()
    second.step()
    base.step()
    if rule == "path":  # these units are in weight space
        torch.testing.assert_close(module[2].bias, plain[2].bias, rtol=1e-14, atol=0)
    assert not torch.equal(module[0].bias, plain[0].bias)


# Checkpoints ----------------------------------------------------------------------------------------------------------


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: mlp(4, 6, 5, 3), (4,), 3),
    "residual": (ResidualMLP, (3,), 2),
    "norms": (norm_cnn, (1, 6, 6), 3),
}


def fresh(
    name: str, x: Tensor, rule: str, pending: bool, interval: int | None, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """A module and its optimizer, the same at every call."""
    torch.manual_seed(1)
    module = NETWORKS[name][0]().to(dtype)
    group = GroupFromNextCall(module, "forward") if pending else scaling_group(module, x)
    base = SGD(module.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
    return module, EquivalentClassOptimizer(base, group, rule=rule, refresh_interval=interval)


@RULES
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("interval", [1, 5, None])
@pytest.mark.parametrize("stop", [0, 5, 13])
def test_a_resumed_run_has_the_same_bits(name: str, pending: bool, interval: int | None, stop: int, rule: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if stop == 13 else torch.float64
    x = torch.randn(32, *NETWORKS[name][1], dtype=dtype)
    y = torch.randn(32, NETWORKS[name][2], dtype=dtype)
    reference, optimizer = fresh(name, x, rule, pending, interval, dtype)
    losses = train(reference, optimizer, x, y, range(16))

    module, optimizer = fresh(name, x, rule, pending, interval, dtype)
    train(module, optimizer, x, y, range(stop))
    state = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    again, optimizer = fresh(name, x, rule, pending, interval, dtype)
    again.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(again, optimizer, x, y, range(stop, 16)) == losses[stop:]
    assert same_bits(again, reference)


@RULES
@pytest.mark.parametrize("again", [False, True])
def test_a_state_that_was_loaded_can_be_saved_before_the_next_step(again: bool, rule: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    reference, optimizer = fresh("mlp", x, rule, False, None)
    train(reference, optimizer, x, y, range(10))
    states = through_a_file((reference.state_dict(), optimizer.state_dict()))
    for _ in range(1 + again):
        module, other = fresh("mlp", x, rule, again, None)
        module.load_state_dict(states[0])
        other.load_state_dict(states[1])
        states = through_a_file((module.state_dict(), other.state_dict()))
    train(reference, optimizer, x, y, range(10, 15))
    train(module, other, x, y, range(10, 15))
    assert same_bits(module, reference)


@RULES
def test_a_refresh_that_is_asked_for_after_loading_takes_place(rule: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    reference, optimizer = fresh("mlp", x, rule, False, None)
    train(reference, optimizer, x, y, range(10))
    module, other = fresh("mlp", x, rule, False, None)
    module.load_state_dict(reference.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, its in ((reference, optimizer), (module, other)):
        its.refresh()
        train(one, its, x, y, range(10, 15))
    assert same_bits(module, reference)


@RULES
def test_a_refresh_that_is_due_is_saved(rule: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    reference, optimizer = fresh("mlp", x, rule, False, None)
    train(reference, optimizer, x, y, range(10))
    optimizer.refresh()
    module, other = fresh("mlp", x, rule, False, None)
    module.load_state_dict(reference.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(reference, optimizer, x, y, range(10, 15))
    train(module, other, x, y, range(10, 15))
    assert same_bits(module, reference)


@RULES
def test_saving_changes_nothing(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    twin = copy.deepcopy(module)
    first, second = (ec_sgd(one, x, rule=rule, lr=0.03, momentum=0.9) for one in (module, twin))
    for step in range(6):
        train(module, first, x, y, range(step, step + 1))
        train(twin, second, x, y, range(step, step + 1))
        first.state_dict()
    assert same_bits(module, twin)


@RULES
def test_a_saved_state_does_not_move_on_with_the_run(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.03)
    train(module, optimizer, x, y, range(3))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state["equivalent_class"])
    train(module, optimizer, x, y, range(3, 6))
    own = state["equivalent_class"]
    moving = {"unit": ["second", "weight"], "path": ["beta"]}[rule]
    assert all(torch.equal(own[name], kept[name]) for name in moving)
    now = optimizer.state_dict()["equivalent_class"]
    assert not any(torch.equal(now[name], kept[name]) for name in moving)
    assert own["steps_since_refresh"] == 3


def momentum_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in module.named_parameters()}


def without_skeleton(paths: ExplicitPaths, covector: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy that is zero at the skeleton weights, where momentum starts anew."""
    result = {name: value.clone() for name, value in covector.items()}
    for name, index in [*paths.fixed.values(), *paths.out.values()]:
        result[name][index] = 0.0
    return result


def test_the_saved_momentum_of_one_gradient_is_that_gradient_but_at_skeleton_weights() -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = balanced(module, x)
    expected = without_skeleton(paths_of(start, x), gradients_of(start, x, y))
    optimizer = path_sgd(module, x, lr=0.0, momentum=0.9)
    loss_of(module, x, y).backward()
    optimizer.step()
    plain = SGD(module.parameters(), lr=0.0, momentum=0.9)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for name, value in momentum_of(plain, module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    # In its own state the free ones have the momentum of their path coordinates.
    own = momentum_of(optimizer, module)
    assert any(not torch.allclose(own[name], expected[name], rtol=1e-3) for name in own)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_saved_momentum_is_that_of_the_weights(steps: int) -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = balanced(module, x)
    paths = paths_of(start, x)
    optimizer = path_sgd(module, x, lr=0.05, momentum=0.9, wrapper={"max_path_ratio": None})
    train(module, optimizer, x, y, range(steps))
    plain = SGD(module.parameters(), lr=0.05, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())

    # The same run on explicit path coordinates, and its momentum pulled back along the path values.
    v = {name: value.clone().requires_grad_() for name, value in paths.v.items()}
    explicit = SGD(v.values(), lr=0.05, momentum=0.9)
    for step in range(steps):
        explicit.zero_grad()
        rows = torch.arange(step * 8, (step + 1) * 8) % 32
        (functional_call(start, paths.weights(v), x[rows]) - y[rows]).square().mean().backward()
        explicit.step()
    leaves = {name: weight.requires_grad_() for name, weight in weights_of(module).items()}
    values = paths.paths(leaves)
    momentum = [explicit.state[v[name]]["momentum_buffer"] for name in values]
    pulled_back = torch.autograd.grad(list(values.values()), list(leaves.values()), momentum)
    expected = without_skeleton(paths, dict(zip(leaves, pulled_back, strict=True)))
    for name, value in momentum_of(plain, module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    losses = train(module, plain, x, y, range(steps, steps + 5))
    assert all(map(math.isfinite, losses))


def test_momentum_of_the_plain_base_optimizer_is_taken_over() -> None:
    module, x, y = problem(4, 6, 5, 3)
    base = SGD(module.parameters(), lr=0.05, momentum=0.9)
    train(module, base, x, y, range(5))
    state = through_a_file(base.state_dict())

    # The momentum moves to the balanced weights as gradients do; there every beta is one, and it is that of the path
    # coordinates, but at the skeleton weights.
    start = balanced(module, x)
    paths = paths_of(start, x)
    old, new = weights_of(module), weights_of(start)
    moved = {name: value * old[name] / new[name] for name, value in momentum_of(base, module).items()}
    momentum = without_skeleton(paths, moved)
    v = {name: value.clone().requires_grad_() for name, value in paths.v.items()}
    rows = torch.arange(40, 48) % 32
    loss = (functional_call(start, paths.weights(v), x[rows]) - y[rows]).square().mean()
    gradients = torch.autograd.grad(loss, list(v.values()))
    for (name, value), g in zip(v.items(), gradients, strict=True):
        value.data.sub_(0.05 * (0.9 * momentum[name] + g))
    expected = paths.weights(v)

    optimizer = path_sgd(module, x, lr=0.05, momentum=0.9, wrapper={"max_path_ratio": None})
    optimizer.load_state_dict(state)
    train(module, optimizer, x, y, range(5, 6))
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-12)
    assert all(map(math.isfinite, train(module, optimizer, x, y, range(6, 12))))


@RULES
def test_a_refresh_carries_the_momentum_of_ordinary_weights(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.05, momentum=0.9)
    train(module, optimizer, x, y, range(4))
    saved = optimizer.state_dict()["state"].values()
    names = weights_of(module)
    kept = {name: held["momentum_buffer"].clone() for name, held in zip(names, saved, strict=True)}
    before, start = weights_of(module), balanced(module, x)
    after = weights_of(start)
    # As a gradient, it divides by what its weight is multiplied by.
    expected = {name: kept[name] * before[name] / after[name] for name in kept}
    if rule == "path":
        expected = without_skeleton(paths_of(start, x), expected)
    optimizer.refresh()
    optimizer.zero_grad()
    optimizer.step()  # without gradients SGD leaves the momentum alone
    for name, value in momentum_of(optimizer, module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@RULES
def test_loading_a_state_does_not_change_what_is_in_it(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.03, momentum=0.9)
    train(module, optimizer, x, y, range(3))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    again = ec_sgd(module, x, rule=rule, lr=0.03, momentum=0.9)
    again.load_state_dict(state)
    train(module, again, x, y, range(3, 6))
    assert state.keys() == kept.keys()
    own, before = state["equivalent_class"], kept["equivalent_class"]
    assert own.keys() == before.keys()
    tensors = [name for name, value in own.items() if isinstance(value, Tensor)]
    assert len(tensors) == {"unit": 5, "path": 2}[rule]
    assert all(torch.equal(own[name], before[name]) for name in tensors)
    if rule == "path":
        for name, value in own["moments"]["momentum_buffer"].items():
            assert torch.equal(value, before["moments"]["momentum_buffer"][name])


@RULES
@pytest.mark.parametrize("steps", [0, 4])
def test_the_state_of_another_rule_is_taken_over_as_that_of_the_base_optimizer(steps: int, rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    before = ec_sgd(module, x, rule={"unit": "path", "path": "unit"}[rule], lr=0.03, momentum=0.9)
    train(module, before, x, y, range(steps))
    state = through_a_file(before.state_dict())
    plain = {name: value for name, value in state.items() if name != "equivalent_class"}
    assert len(state) == len(plain) + (steps > 0)
    twin = copy.deepcopy(module)
    for one, its in ((module, state), (twin, plain)):
        optimizer = ec_sgd(one, x, rule=rule, lr=0.03, momentum=0.9)
        optimizer.load_state_dict(copy.deepcopy(its))
        train(one, optimizer, x, y, range(steps, steps + 5))
    assert same_bits(module, twin)


@RULES
@pytest.mark.parametrize("pending", [False, True])
def test_a_checkpoint_of_a_network_with_other_units_is_an_error(pending: bool, rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.03, momentum=0.9)
    train(module, optimizer, x, y, range(2))
    other, x, y = problem(4, 7, 3)
    group = GroupFromNextCall(other, "forward") if pending else scaling_group(other, x)
    wrapped = EquivalentClassOptimizer(SGD(other.parameters(), lr=0.03, momentum=0.9), group, rule=rule)
    state = optimizer.state_dict()
    message = "The checkpoint was made with 6 units, this network has 7"
    if pending:  # known at the first step only
        wrapped.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            train(other, wrapped, x, y, range(1))
    else:
        with pytest.raises(ValueError, match=message):
            wrapped.load_state_dict(state)
        assert not wrapped.state


@RULES
def test_a_copy_of_module_and_optimizer_trains_alike_and_apart(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = ec_sgd(module, x, rule=rule, lr=0.03, momentum=0.9)
    train(module, optimizer, x, y, range(3))
    twin, other = copy.deepcopy((module, optimizer))
    before = weights_of(module)
    train(twin, other, x, y, range(3, 6))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    train(module, optimizer, x, y, range(3, 6))
    assert same_bits(module, twin)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paths"}, "rule must be 'unit' or 'path', got 'paths'"),
        ({"skeleton": "min"}, "skeleton must be 'max' or 'diagonal', got 'min'"),
        ({"representative": "first"}, "representative must be 'balanced' or 'current', got 'first'"),
        ({"max_path_ratio": 1.0}, "max_path_ratio must be a finite number greater than 1, or None, got 1.0"),
        ({"max_path_ratio": math.inf}, "max_path_ratio must be a finite number greater than 1, or None, got inf"),
        ({"max_path_ratio": math.nan}, "max_path_ratio must be a finite number greater than 1, or None, got nan"),
        ({"refresh_interval": 0}, "refresh_interval must be a positive number of steps, or None, got 0"),
        ({"refresh_interval": 2.5}, "refresh_interval must be a positive number of steps, or None, got 2.5"),
        ({"free_start": 0.0}, "free_start must be a finite number greater than 0, got 0.0"),
        ({"free_start": math.inf}, "free_start must be a finite number greater than 0, got inf"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    module, x, _ = problem(4, 6, 3)
    with pytest.raises(ValueError, match=message):
        ec_sgd(module, x, lr=0.1, wrapper=options)


def test_wrapping_twice_is_an_error() -> None:
    module, x, _ = problem(4, 6, 3)
    with pytest.raises(TypeError, match="is an EquivalentClassOptimizer already: wrap it once"):
        EquivalentClassOptimizer(ec_sgd(module, x, lr=0.1), scaling_group(module, x))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda params: torch.optim.LBFGS(params), "LBFGS computes gradients several times in a step"),
        (lambda params: torch.optim.SGD(params, differentiable=True), "leave out differentiable=True"),
    ],
)
def test_a_base_optimizer_that_cannot_be_run_elsewhere_is_an_error(base: Any, message: str) -> None:
    module, x, _ = problem(4, 6, 3)
    with pytest.raises(TypeError, match=message):
        EquivalentClassOptimizer(base(module.parameters()), scaling_group(module, x))


class Sharded(Tensor):
    """Stands for any subclass of a tensor that means more than its values."""


def test_parameters_that_are_not_plain_and_real_are_errors() -> None:
    module, x, _ = problem(4, 6, 3)
    group = scaling_group(module, x)
    with pytest.raises(
        TypeError, match=r"needs real parameters, plain or sharded by fully_shard, got Tensor of torch.complex128"
    ):
        EquivalentClassOptimizer(SGD([nn.Parameter(torch.zeros(2, dtype=torch.complex128))], lr=0.1), group)
    sharded = nn.Parameter(torch.zeros(2).as_subclass(Sharded))
    with pytest.raises(
        TypeError, match=r"needs real parameters, plain or sharded by fully_shard, got Sharded of torch.float32"
    ):
        EquivalentClassOptimizer(SGD([sharded], lr=0.1), group)


def test_parameters_that_the_group_does_not_know_are_errors() -> None:
    module, x, _ = problem(4, 6, 3)
    other = copy.deepcopy(module)
    with pytest.raises(ValueError, match="traced from another module: it has none of the optimizer's parameters"):
        EquivalentClassOptimizer(SGD(other.parameters(), lr=0.1), scaling_group(module, x))
    extra = nn.Parameter(torch.zeros(2, 7))
    message = r"1 of the optimizer's parameters \(shapes \(2, 7\)\) are not in the scaling group"
    with pytest.raises(ValueError, match=message):
        EquivalentClassOptimizer(SGD([*module.parameters(), extra], lr=0.1), scaling_group(module, x))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = mlp(4, 6, 3)
        self.spare = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_parameters_that_the_traced_call_did_not_use_are_errors() -> None:
    module, x = Unused(), torch.randn(2, 4)
    group = scaling_group(module, x)
    names = r"spare\.0\.weight, spare\.0\.bias, spare\.1\.weight, spare\.1\.bias, spare\.2\.weight and 3 more"
    with pytest.raises(ValueError, match=rf"never used these parameters of the optimizer: {names}\."):
        EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), group)
    module.spare.requires_grad_(False)
    EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), group)


def test_a_step_before_the_network_was_traced_is_an_error() -> None:
    module, x, y = problem(4, 6, 3)
    loss_of(module, x, y).backward()
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), GroupFromNextCall(module, "forward"))
    assert optimizer.group is None
    before = weights_of(module)
    with pytest.raises(
        RuntimeError, match=r"nothing has called forward\(\) of Sequential since the optimizer was made"
    ):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@RULES
def test_a_skipped_batch_before_the_network_was_traced_does_nothing(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    twin = copy.deepcopy(module)
    optimizer = EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.1), GroupFromNextCall(module, "forward"), rule=rule
    )
    before = weights_of(module)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    train(module, optimizer, x, y, range(3))
    assert optimizer.group.num_units == 6
    train(twin, ec_sgd(twin, x, rule=rule, lr=0.1), x, y, range(3))
    assert same_bits(module, twin)


def test_the_usable_units_are_not_known_before_the_network_was_traced() -> None:
    module, x, _ = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), GroupFromNextCall(module, "forward"))
    with pytest.raises(RuntimeError, match="The scaling group is not known before the first step"):
        optimizer.usable_units()
    with torch.no_grad():
        module[2].weight[:, 1] = 0
    assert int(ec_sgd(module, x, lr=0.1).usable_units().sum()) == 5
    assert optimizer.group is None  # another trace of the module is not the call that it waits for


@RULES
def test_the_closure_of_the_first_step_may_be_what_is_traced(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.1), GroupFromNextCall(module, "forward"), rule=rule
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module, x, y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.group.num_units == 6


def test_parameters_on_several_devices_are_refused() -> None:
    module, x, _ = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, lr=0.1)
    optimizer.group.parameters["0.weight"] = nn.Parameter(module[0].weight.to("meta"))
    with pytest.raises(RuntimeError, match=r"on several devices.*put the module on one device"):
        optimizer.step()
