from __future__ import annotations

import pytest
import torch

from tests.paths.cases import NETWORKS, point
from tests.paths.explicit import ExplicitPaths, ends


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_do_not_push_along_the_orbits(name: str, some_inactive: bool) -> None:
    at = point(name, random_beta=True, some_inactive=some_inactive)
    gradients = at.gradients()
    totals = []
    for table in ends(at.group, at.skeleton.active):
        total = torch.zeros(at.group.num_units + 1, dtype=torch.float64)
        for key, units in table.items():
            total.index_add_(0, units.flatten() % len(total), (at.weights[key] * gradients[key]).flatten())
        totals.append(total[:-1])
    assert float(totals[0].abs().max()) > 1e-3
    torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_momentum_starts_anew_at_skeleton_weights_and_nowhere_else(name: str, some_inactive: bool) -> None:
    at = point(name, random_beta=True, some_inactive=some_inactive)
    momentum = {key: torch.randn_like(weight) for key, weight in at.weights.items()}
    expected = {key: value.clone() for key, value in momentum.items()}
    paths = ExplicitPaths(at.group, at.skeleton, at.weights)
    for key, index in [*paths.fixed.values(), *paths.out.values()]:
        expected[key][index] = 0.0
    at.coordinates.restart_skeleton_(momentum)
    assert all(torch.equal(momentum[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weight_space_momentum_of_ordinary_elements_is_the_pullback_along_the_path_values(name: str) -> None:
    at = point(name, random_beta=True, some_inactive=True)
    explicit = ExplicitPaths(at.group, at.skeleton, at.weights, at.coordinates.paths.beta)
    in_paths = {key: torch.randn_like(weight) for key, weight in at.weights.items()}
    leaves = {key: weight.clone().requires_grad_() for key, weight in at.weights.items()}
    v = explicit.paths(leaves)
    pulled_back = torch.autograd.grad(list(v.values()), list(leaves.values()), [in_paths[key] for key in v])
    expected = dict(zip(leaves, pulled_back, strict=True))
    at.coordinates.multiply_by_beta_(in_paths, 1)
    at.coordinates.restart_skeleton_(in_paths)
    at.coordinates.restart_skeleton_(expected)
    for key, value in in_paths.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-14, msg=key)
