from __future__ import annotations

import pytest
import torch

from tests.paths.cases import NETWORKS, Point, point
from tests.selection import few

STEP = 1e-6


def path_differences(at: Point, name: str, index: tuple[int, ...]) -> float:
    """Central difference of the loss along one path coordinate."""
    before = {key: weight.clone() for key, weight in at.weights.items()}
    beta = at.coordinates.paths.beta.clone()
    losses = []
    for sign in (1, -1):
        leave_ = at.coordinates.to_coordinates_(at.weights)
        at.weights[name][index] += sign * STEP
        leave_(None)
        losses.append(float(at.loss().detach()))
        for key, weight in at.weights.items():
            weight.copy_(before[key])
        at.coordinates.paths.beta.copy_(beta)
    return (losses[0] - losses[1]) / (2 * STEP)


def places(at: Point, number: int) -> list[tuple[str, tuple[int, ...]]]:
    """Skeleton weights of both kinds, and some ordinary elements of every parameter."""
    found = []
    chosen = [(name, flat[:16]) for name, (_, flat) in at.coordinates.elements.places.items()]
    chosen += [(name, torch.randperm(weight.numel())[:number]) for name, weight in at.weights.items()]
    for name, flat in chosen:
        axes = torch.unravel_index(flat, at.weights[name].shape)
        found += [(name, index) for index in zip(*(axis.tolist() for axis in axes), strict=True)]
    return found


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("random_beta", [False, True])
@pytest.mark.parametrize("name", few(NETWORKS, ["mlp", "residual", "dense"]))
def test_path_gradients_are_those_of_finite_differences(name: str, random_beta: bool, some_inactive: bool) -> None:
    at = point(name, random_beta=random_beta, some_inactive=some_inactive, free_start=1.5)
    gradients = at.path_gradients()
    chosen = places(at, 5)
    exact = torch.stack([gradients[key][index] for key, index in chosen])
    measured = torch.tensor([path_differences(at, key, index) for key, index in chosen], dtype=torch.float64)
    elements = at.coordinates.elements.places.items()
    fixed = [gradients[key].take(flat)[slots < at.group.num_units] for key, (slots, flat) in elements]
    assert all(bool((values == 0).all()) for values in fixed)
    assert float((exact - measured).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_leaving_path_space_without_a_move_changes_nothing(name: str) -> None:
    at = point(name, random_beta=True)
    before = {key: weight.clone() for key, weight in at.weights.items()}
    beta = at.coordinates.paths.beta.clone()
    num_guarded = at.coordinates.to_coordinates_(at.weights)(2.0).num_guarded
    for key, weight in at.weights.items():
        torch.testing.assert_close(weight, before[key], rtol=1e-15, atol=0)
    assert torch.equal(at.coordinates.paths.beta, beta)
    assert int(num_guarded) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_paths_out_of_units_have_the_values_that_beta_says(name: str) -> None:
    at = point(name)
    start = {key: weight.clone() for key, weight in at.weights.items()}
    for _ in range(3):
        leave_ = at.coordinates.to_coordinates_(at.weights)
        for weight in at.weights.values():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
        leave_(2.0)
    skeleton = at.skeleton
    for unit in range(skeleton.num_units):
        value, end = 1.0, unit
        while end != -1:
            coupling = at.group.couplings[int(skeleton.out_coupling[end])]
            now, then = (coupling.view(w[coupling.parameter]).flatten() for w in (at.weights, start))
            value *= float(now[skeleton.out_index[end]] / then[skeleton.out_index[end]])
            end = int(skeleton.target[end])
        assert value == pytest.approx(float(at.coordinates.paths.beta[unit]), rel=1e-12)
    assert float((at.coordinates.paths.beta - 1).abs().max()) > 0.01


def test_path_gradients_of_what_scales_with_no_unit_are_those_of_the_weights() -> None:
    at = point("mlp", random_beta=True)
    gradients = at.gradients()
    weights = {key: weight.clone() for key, weight in at.weights.items()}
    found = at.path_gradients()
    # The output's bias leads into no unit and is no skeleton weight; slopes do not scale.
    assert {key for key in found if torch.equal(found[key], gradients[key])} == {"1.weight", "3.weight", "4.bias"}
    assert all(torch.equal(at.weights[key], weights[key]) for key in weights)
    del gradients["2.weight"]
    at.coordinates.transform_gradients_(gradients, at.coordinates.free_weights(at.weights, gradients))
    assert gradients.keys() == found.keys() - {"2.weight"}
