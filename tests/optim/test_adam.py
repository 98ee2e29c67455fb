"""Adam and AdamW in path coordinates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.steps.skeleton import choose_skeleton
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, plain_cnn
from tests.optim.bases import WITH_FORMULAS
from tests.optim.training import (
    batches,
    distance,
    only_refresh,
    problem,
    rescaled,
    same_bits,
    through_a_file,
    train,
    weights_of,
)
from tests.paths.explicit import ExplicitPaths
from tests.selection import examples, few

Make = Callable[[Iterable[Any]], Optimizer]

ADAMS = ("adam", "adam_l2", "adamw", "amsgrad")
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def in_paths(module: nn.Module, x: Tensor, base: str, **wrapper: Any) -> EquivalentClassOptimizer:
    """A base optimizer in path coordinates."""
    return EquivalentClassOptimizer(
        WITH_FORMULAS[base](module.parameters()), scaling_group(module, x), rule="path", **wrapper
    )


def teacher(shape: tuple[int, ...], outputs: int, regression: bool) -> tuple[Tensor, Tensor]:
    """Data with targets of a random teacher."""
    x = torch.randn(64, *shape, dtype=torch.float64)
    score = x.flatten(1) @ torch.randn(x[0].numel(), outputs, dtype=torch.float64)
    return x, score / score.std() if regression else score.argmax(1)


def balanced(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy at the balanced member of the class."""
    other = copy.deepcopy(module)
    scaling_group(other, x).balance_()
    return other


def paths_of(module: nn.Module, x: Tensor, free_start: float) -> ExplicitPaths:
    """The path coordinates, by their definition, that start at the weights of a balanced module."""
    group = scaling_group(module, x)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    skeleton = choose_skeleton(group.couplings, weights, group.alive())
    return ExplicitPaths(group, skeleton, weights, free_start=free_start)


def skeleton_of(paths: ExplicitPaths) -> dict[str, Tensor]:
    """Where the skeleton weights are, by parameter."""
    at = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in paths.v.items()}
    for name, index in [*paths.fixed.values(), *paths.out.values()]:
        at[name][index] = True
    return at


def entries(optimizer: Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The moments of a saved state, by entry and parameter."""
    found: dict[str, dict[str, Tensor]] = {}
    for (name, _), held in zip(module.named_parameters(), optimizer.state_dict()["state"].values(), strict=True):
        for entry in POWERS:
            if entry in held:
                found.setdefault(entry, {})[name] = held[entry].clone()
    return found


# The class alone ------------------------------------------------------------------------------------------------------


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "mlp": (lambda: mlp(6, 8, 8, 3, activation=nn.PReLU), (6,), 3, False),
    "cnn": (plain_cnn, (1, 8, 8), 3, False),
    "residual": (ResidualMLP, (3,), 2, True),
    "resnet": (ResNet, (1, 6, 6), 3, False),
    "dense": (DenseNet, (1, 5, 5), 3, False),
}


@pytest.mark.parametrize(
    ("name", "base"),
    few([("mlp", "adam"), ("cnn", "amsgrad"), ("residual", "adam_l2"), ("resnet", "adamw")], [("residual", "adam_l2")]),
)
def test_a_run_depends_on_the_class_alone(name: str, base: str) -> None:
    torch.manual_seed(3)
    build, shape, outputs, regression = NETWORKS[name]
    module = build().double()
    x, y = teacher(shape, outputs, regression)
    other = rescaled(module, x, 0.7)
    start = copy.deepcopy(module)
    for one in (module, other):
        optimizer = in_paths(one, x, base, refresh_interval=17)
        losses = train(one, optimizer, x, y, range(70))
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-10
    assert distance(start, module, x) > 1e-2
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@examples(8, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    bias=st.booleans(),
    base=st.sampled_from(sorted(ADAMS)),
    refresh_interval=st.sampled_from([2, 5, None]),
    free_start=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_a_run_of_any_perceptron_depends_on_the_class_alone(
    seed: int, widths: list[int], bias: bool, base: str, refresh_interval: int | None, free_start: float
) -> None:
    torch.manual_seed(seed)
    module = mlp(3, *widths, 2, activation=nn.LeakyReLU, bias=bias).double()
    x, y = teacher((3,), 2, regression=True)
    other, start = rescaled(module, x), copy.deepcopy(module)
    for one in (module, other):
        train(one, in_paths(one, x, base, refresh_interval=refresh_interval, free_start=free_start), x, y, range(12))
    assert distance(module, other, x) < 1e-9
    assert distance(start, module, x) > 1e-6


# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "free_start"),
    [("mlp", base, 1.0) for base in ADAMS]
    + [("mlp", "adamw", 2.0), ("residual", "amsgrad", 1.0), ("dense", "adam_l2", 2.0), ("cnn", "adamw", 0.5)],
)
def test_steps_are_those_of_the_base_on_explicit_path_coordinates(name: str, base: str, free_start: float) -> None:
    torch.manual_seed(2)
    build, shape, outputs, _ = NETWORKS[name]
    module = build().double()
    x, y = teacher(shape, outputs, regression=True)
    start = balanced(module, x)
    paths = paths_of(start, x, free_start)
    skeleton = skeleton_of(paths)
    optimizer = in_paths(module, x, base, max_path_ratio=None, free_start=free_start)
    v = {key: value.clone().requires_grad_() for key, value in paths.v.items()}
    explicit = WITH_FORMULAS[base](v.values())
    for step in range(6):
        train(module, optimizer, x, y, range(step, step + 1))
        explicit.zero_grad()
        rows, targets = batches(x, y, step)
        F.mse_loss(functional_call(start, paths.weights(v), rows), targets).backward()
        explicit.step()
        expected = {key: value.detach() for key, value in paths.weights(v).items()}
        for key, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), expected[key], rtol=1e-11, atol=1e-12, msg=lambda m, k=key: k + m)
        for key, index in paths.fixed.values():
            assert torch.equal(module.get_parameter(key)[index], start.get_parameter(key)[index])

    # What is saved belongs to the weights: means divide by what path values multiply, squares by its square.
    plain = WITH_FORMULAS[base](module.parameters())
    plain.load_state_dict(optimizer.state_dict())
    for key, p in module.named_parameters():
        beta = v[key].detach() / expected[key]
        for entry, power in POWERS.items():
            if entry in explicit.state[v[key]]:
                held = (explicit.state[v[key]][entry] * beta**power).masked_fill(skeleton[key], 0.0)
                torch.testing.assert_close(plain.state[p][entry], held, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("base", ["adam_l2", "adamw"])
def test_decay_leaves_the_fixed_skeleton_weights_where_they_are(base: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = balanced(module, x)
    paths = paths_of(start, x, 2.0)
    optimizer = in_paths(module, x, base, refresh_interval=None)
    for options in optimizer.param_groups:
        options["weight_decay"] = 20.0  # four fifths remain of what decays
    train(module, optimizer, x, y, range(6))
    now, before = weights_of(module), weights_of(start)
    for name, index in paths.fixed.values():
        assert torch.equal(now[name][index], before[name][index])
    for name in now:
        others = ~skeleton_of(paths)[name]
        assert bool((now[name] != before[name])[others].all())
    for name, index in paths.fixed.values():
        p = module.get_parameter(name)
        assert all(float(optimizer.state[p][entry][index]) == 0.0 for entry in POWERS if entry in optimizer.state[p])


def test_without_gradients_decay_is_that_of_the_path_values() -> None:
    module, x, _ = problem(4, 6, 5, 3)
    start = balanced(module, x)
    paths = paths_of(start, x, 1.0)
    optimizer = in_paths(module, x, "adamw", max_path_ratio=None, free_start=1.0)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    now = paths.paths(weights_of(module))
    for name, value in now.items():
        torch.testing.assert_close(value, paths.v[name] * (1 - 0.01 * 0.3), rtol=1e-12, atol=1e-14)


# The refresh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ADAMS)
def test_a_refresh_carries_the_moments_of_ordinary_weights(base: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    old = skeleton_of(paths_of(balanced(module, x), x, 2.0))
    optimizer = in_paths(module, x, base, refresh_interval=None)
    train(module, optimizer, x, y, range(6))
    held, before = entries(optimizer, module), weights_of(module)
    new = skeleton_of(paths_of(balanced(module, x), x, 2.0))
    only_refresh(optimizer)
    now, after = entries(optimizer, module), weights_of(module)
    ratios = torch.cat([(after[name] / before[name]).flatten() for name in after])
    assert float(ratios.max()) > 1.01  # the balanced member is another by now
    assert (
        held.keys()
        == now.keys()
        == {entry for entry in POWERS if entry != "max_exp_avg_sq"}
        | ({"max_exp_avg_sq"} if optimizer.param_groups[0]["amsgrad"] else set())
    )
    for entry, power in POWERS.items():
        for name, value in now.get(entry, {}).items():
            expected = held[entry][name] * (before[name] / after[name]) ** power
            ordinary = ~(old[name] | new[name])
            assert bool((value[new[name]] == 0).all())
            torch.testing.assert_close(value[ordinary], expected[ordinary], rtol=1e-9, atol=1e-18)
            assert int((value[ordinary] != 0).sum()) >= 0.5 * int(ordinary.sum())


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "stop"), [("adamw", 0), ("adamw", 6), ("adamw", 7), ("adam_l2", 1), ("adam_l2", 8)])
def test_a_resumed_run_has_the_same_bits(base: str, stop: int) -> None:
    def fresh() -> tuple[nn.Module, EquivalentClassOptimizer]:
        torch.manual_seed(1)
        module = ResidualMLP()
        return module, in_paths(module, x, base, refresh_interval=7)

    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    reference, optimizer = fresh()
    losses = train(reference, optimizer, x, y, range(13))

    module, optimizer = fresh()
    train(module, optimizer, x, y, range(stop))
    state = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    train(module, optimizer, x, y, range(stop, 13))
    assert same_bits(module, reference)

    again, optimizer = fresh()
    again.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(again, optimizer, x, y, range(stop, 13)) == losses[stop:]
    assert same_bits(again, reference)


@pytest.mark.parametrize("base", ["adamw", "amsgrad"])
def test_states_are_exchanged_with_the_plain_base(base: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = in_paths(module, x, base)
    losses = train(module, optimizer, x, y, range(8))

    plain = WITH_FORMULAS[base](module.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in module.parameters():
        assert plain.state[p].keys() == optimizer.state[p].keys()
        assert float(plain.state[p]["step"]) == 8
        assert bool((plain.state[p]["exp_avg_sq"] >= 0).all())
    losses += train(module, plain, x, y, range(8, 16))

    held, before = entries(plain, module), weights_of(module)
    optimizer = in_paths(module, x, base)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    skeleton = skeleton_of(paths_of(balanced(module, x), x, 2.0))
    only_refresh(optimizer)
    after = weights_of(module)
    for entry, values in entries(optimizer, module).items():
        for name, value in values.items():
            expected = held[entry][name] * (before[name] / after[name]) ** POWERS[entry]
            torch.testing.assert_close(value, expected.masked_fill(skeleton[name], 0.0), rtol=1e-9, atol=1e-18)
    losses += train(module, optimizer, x, y, range(16, 64))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_saving_changes_nothing() -> None:
    module, x, y = problem(4, 6, 5, 3)
    twin = copy.deepcopy(module)
    first, second = in_paths(module, x, "amsgrad"), in_paths(twin, x, "amsgrad")
    for step in range(6):
        train(module, first, x, y, range(step, step + 1))
        train(twin, second, x, y, range(step, step + 1))
        first.state_dict()
    assert same_bits(module, twin)
