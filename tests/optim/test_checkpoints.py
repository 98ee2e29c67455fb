"""A run goes on from a checkpoint bit for bit, and state is exchanged with the plain base."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.symmetry import GroupFromNextCall
from tests.networks import ResidualMLP, mlp, norm_cnn
from tests.optim.optimizer_runs import SGD, balanced, gradients_of, path_sgd, paths_of
from tests.optim.training import RULES, ec_sgd, loss_of, problem, same_bits, through_a_file, train, weights_of
from tests.paths.explicit import ExplicitPaths
from tests.selection import few, pairwise

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


@pytest.mark.parametrize(
    ("stop", "interval", "pending", "name", "rule"),
    few(pairwise([0, 5, 13], [1, 5, None], [False, True], NETWORKS, ["unit", "path"]), 8),
)
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
    moving = {"unit": ["second", "seen"], "path": ["beta"]}[rule]
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
    with pytest.raises(ValueError, match="The checkpoint was made with parameters of other shapes"):
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
