"""The optimizer shares groups, schedules and closures with its base, and refuses what it cannot run."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.symmetry import GroupFromNextCall
from tests.networks import mlp
from tests.optim.optimizer_runs import SGD, balanced, coordinates_of, paths_of
from tests.optim.training import RULES, distance, ec_sgd, loss_of, problem, same_bits, train, weights_of
from tests.paths.explicit import ends

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


def test_a_parameter_that_a_given_group_does_not_know_is_stepped_in_weight_space() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer, extra = ec_sgd(module, x, lr=0.1), nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": extra, "lr": 0.5})
    (loss_of(module, x, y) + extra.sum()).backward()
    with pytest.warns(UserWarning, match=r"No traced call has used these parameters.*one of shape \[2\]"):
        optimizer.step()
    optimizer.step()
    assert extra.tolist() == [0.0, 0.0]


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


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paths"}, "rule must be 'unit', 'path' or 'paper', got 'paths'"),
        ({"skeleton": "min"}, "skeleton must be 'max' or 'diagonal', got 'min'"),
        ({"representative": "first"}, "representative must be 'balanced' or 'current', got 'first'"),
        ({"max_path_ratio": 1.0}, "max_path_ratio must be a finite number greater than 1, or None, got 1.0"),
        ({"max_path_ratio": math.inf}, "max_path_ratio must be a finite number greater than 1, or None, got inf"),
        ({"max_path_ratio": math.nan}, "max_path_ratio must be a finite number greater than 1, or None, got nan"),
        ({"refresh_interval": 0}, "refresh_interval must be 'auto', 'epoch', a positive number .* got 0"),
        ({"refresh_interval": 2.5}, "refresh_interval must be 'auto', 'epoch', a positive number .* got 2.5"),
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


def test_a_group_that_knows_none_of_the_parameters_is_an_error() -> None:
    module, x, _ = problem(4, 6, 3)
    other = copy.deepcopy(module)
    with pytest.raises(ValueError, match="traced from another module: it has none of the optimizer's parameters"):
        EquivalentClassOptimizer(SGD(other.parameters(), lr=0.1), scaling_group(module, x))


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


def test_parameters_on_several_devices_are_left_to_the_base() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = ec_sgd(module, x, lr=0.1)
    optimizer.group.parameters["0.weight"] = nn.Parameter(module[0].weight.to("meta"))
    with pytest.warns(UserWarning, match=r"on several devices.*put the module on one device"):
        train(module, optimizer, x, y, range(1))
