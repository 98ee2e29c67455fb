"""The one-reduction form of the step agrees with autograd through an explicit weight-from-path map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.steps.skeleton import choose_skeleton
from tests.paths.cases import NETWORKS, make, point
from tests.paths.explicit import ExplicitPaths
from tests.selection import few


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("random_beta", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_path_gradients_are_those_of_autograd_through_the_map(
    name: str, random_beta: bool, some_inactive: bool
) -> None:
    at = point(name, 1, random_beta=random_beta, some_inactive=some_inactive, free_start=0.8)
    explicit = ExplicitPaths(at.group, at.skeleton, at.weights, at.coordinates.paths.beta, at.coordinates.paths.start)
    v = {key: value.clone().requires_grad_() for key, value in explicit.v.items()}
    weights = explicit.weights(v)
    for key, weight in weights.items():
        torch.testing.assert_close(weight.detach(), at.weights[key], rtol=1e-13, atol=0)
    loss = (functional_call(at.module, weights, at.x) - at.target).square().mean()
    expected = torch.autograd.grad(loss, list(v.values()))
    found = at.path_gradients()
    scale = max(float(value.abs().max()) for value in expected)
    for key, value in zip(v, expected, strict=True):
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("name", NETWORKS)
def test_path_gradients_solve_the_chain_rule_over_all_basis_paths(name: str) -> None:
    at = point(name, 2, random_beta=True, some_inactive=True)
    explicit = ExplicitPaths(at.group, at.skeleton, at.weights, at.coordinates.paths.beta)
    gradients = at.gradients()
    leaves = {key: weight.clone().requires_grad_() for key, weight in at.weights.items()}
    v = explicit.paths(leaves)
    for key, value in v.items():
        torch.testing.assert_close(value.detach(), explicit.v[key], rtol=1e-13, atol=0)
    found = at.path_gradients()
    summed = torch.autograd.grad(list(v.values()), list(leaves.values()), [found[key] for key in v])
    scale = max(float(value.abs().max()) for value in gradients.values())
    for key, value in zip(leaves, summed, strict=True):
        torch.testing.assert_close(value, gradients[key], rtol=0, atol=1e-10 * scale)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "weight_decay": {"momentum": 0.9, "weight_decay": 0.05},
    "maximize": {"momentum": 0.5, "maximize": True},
    "foreach": {"momentum": 0.9, "weight_decay": 0.01, "foreach": True},
    "loop": {"momentum": 0.9, "weight_decay": 0.01, "foreach": False},
}


def sgd(tensors: dict[str, Tensor], lr: float, two_groups: bool, **options: Any) -> torch.optim.SGD:
    """SGD, with a group of its own for every other parameter if asked for."""
    values = list(tensors.values())
    if not two_groups:
        return torch.optim.SGD(values, lr=lr, **options)
    groups = [{"params": values[::2]}, {"params": values[1::2], "lr": 0.4 * lr, "weight_decay": 0.02}]
    return torch.optim.SGD(groups, lr=lr, **options)


def explicit_run(
    module: nn.Module,
    x: Tensor,
    targets: list[Tensor],
    lr: float,
    max_ratio: float | None,
    two_groups: bool,
    free_start: float,
    **options: Any,
) -> tuple[dict[str, Tensor], int]:
    """Train the path coordinates themselves.

    Returns:
        The weights in the end, and how often the guard limited a move.
    """
    group = scaling_group(module, x)
    group.balance_()
    start = {name: p.detach() for name, p in module.named_parameters()}
    paths = ExplicitPaths(group, choose_skeleton(group.couplings, start, group.alive()), start, free_start=free_start)
    v = {name: value.requires_grad_() for name, value in paths.v.items()}
    optimizer = sgd(v, lr, two_groups, **options)
    guarded = 0
    for target in targets:
        optimizer.zero_grad()
        (functional_call(module, paths.weights(v), x) - target).square().mean().backward()
        before = {unit: v[paths.out[unit][0]].detach()[paths.out[unit][1]].clone() for unit in paths.free}
        optimizer.step()
        with torch.no_grad():
            for unit, old in before.items():
                name, index = paths.out[unit]
                ratio = float(v[name][index] / old)
                if max_ratio is not None and not 1 / max_ratio <= ratio <= max_ratio:
                    v[name][index] = old * min(max(ratio, 1 / max_ratio), max_ratio)
                    guarded += 1
    return {name: weight.detach() for name, weight in paths.weights(v).items()}, guarded


def compare_runs(
    name: str,
    *,
    lr: float = 0.05,
    steps: int = 30,
    max_ratio: float | None = None,
    two_groups: bool = False,
    free_start: float = 1.0,
    **options: Any,
) -> int:
    """Assert that both runs end in the same weights, and say how often the guard limited a move."""
    module, x = make(name)
    targets = [torch.randn_like(module(x)) for _ in range(steps)]
    # The targets were made with a forward call that moves the running statistics; both runs start from the same.
    expected, guarded = explicit_run(
        copy.deepcopy(module), x, targets, lr, max_ratio, two_groups, free_start, **options
    )
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    optimizer = EquivalentClassOptimizer(
        sgd(dict(module.named_parameters()), lr, two_groups, **options),
        scaling_group(module, x),
        rule="path",
        refresh_interval=None,
        max_path_ratio=max_ratio,
        free_start=free_start,
    )
    for target in targets:
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
    moved = 0.0
    for key, p in module.named_parameters():
        assert bool(expected[key].isfinite().all())
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(p.detach(), expected[key], rtol=0, atol=1e-9 * max(scale, 1.0), msg=key)
        moved = max(moved, float((p.detach() - before[key]).abs().max()))
    assert moved > 1e-2
    statistics = optimizer.statistics()
    assert statistics is not None
    assert statistics.guarded_paths == guarded
    return guarded


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", few(["mlp", "residual"], ["residual"]))
def test_a_run_agrees_with_sgd_on_explicit_path_coordinates(name: str, options: str) -> None:
    compare_runs(name, lr=0.005 if options == "maximize" else 0.05, **OPTIONS[options])


@pytest.mark.parametrize("name", few(["deep_mlp", "cnn", "batch_norm", "resnet", "dense"], ["batch_norm", "dense"]))
def test_a_run_of_any_architecture_agrees_with_sgd_on_explicit_path_coordinates(name: str) -> None:
    compare_runs(name, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01)


@pytest.mark.parametrize("name", ["mlp", "residual", "dense"])
def test_a_run_with_two_parameter_groups_agrees_with_sgd_on_explicit_path_coordinates(name: str) -> None:
    compare_runs(name, two_groups=True, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("free_start", [0.5, 3.0])
def test_a_run_with_another_free_start_agrees_with_sgd_on_explicit_path_coordinates(free_start: float) -> None:
    compare_runs("residual", free_start=free_start, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("name", ["mlp", "deep_mlp", "residual", "dense"])
def test_a_guarded_run_agrees_with_sgd_on_guarded_path_coordinates(name: str) -> None:
    assert compare_runs(name, lr=0.1, max_ratio=1.002, momentum=0.9) > 0
