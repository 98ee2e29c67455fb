"""EC-SGD as Meng et al., arXiv:1802.03713, write it, with every basis path followed by hand.

An equal-width multi-layer perceptron without biases whose skeleton weights, the diagonals, are one. The basis paths are
the paths along the diagonals, and for every other weight the path that contains it and otherwise skeleton weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import mlp
from tests.selection import few

Path = tuple[tuple[int, int, int], ...]  # layer, output, input of the weights on it


def basis_paths(width: int, layers: int) -> tuple[list[Path], list[Path]]:
    """The path along the diagonals from each input, and the path of every other weight."""
    skeleton = [tuple((layer, i, i) for layer in range(layers)) for i in range(width)]
    others = []
    for layer in range(layers):
        for i in range(width):
            for j in range(width):
                if i != j:
                    before = tuple((k, i, i) for k in range(layer))
                    after = tuple((k, j, j) for k in range(layer + 1, layers))
                    others.append((*before, (layer, j, i), *after))
    return skeleton, others


def places(paths: list[Path], width: int) -> Tensor:
    """The weights on each path, ``[paths, layers]``, as places in the vector of all weights."""
    return torch.tensor([[(layer * width + j) * width + i for layer, j, i in path] for path in paths])


def path_values(weights: list[Tensor], paths: list[Path]) -> Tensor:
    flat = torch.cat([weight.flatten() for weight in weights])
    return flat[places(paths, len(weights[0]))].prod(1)


def path_jacobian(weights: list[Tensor], paths: list[Path]) -> Tensor:
    """dv/dw, ``[paths, weights]``: for a weight on a path the product of the others on it."""
    flat = torch.cat([weight.flatten() for weight in weights])
    at = places(paths, len(weights[0]))
    jacobian = flat.new_zeros(len(paths), len(flat))
    for layer in range(len(weights)):
        others = [k for k in range(len(weights)) if k != layer]
        jacobian[torch.arange(len(paths)), at[:, layer]] = flat[at[:, others]].prod(1)
    return jacobian


def linear_weights(module: nn.Sequential) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


class LiteralECSGD:
    """Inverse chain rule, a step of SGD on the values of the basis paths, weight allocation."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float) -> None:
        self.weights, self.lr, self.momentum = weights, lr, momentum
        self.skeleton, self.others = basis_paths(len(weights[0]), len(weights))
        self.buffer: Tensor | None = None

    def path_gradients(self, gradients: list[Tensor]) -> Tensor:
        """dL/dv from dL/dw = sum over p of dL/dv_p dv_p/dw."""
        jacobian = path_jacobian(self.weights, self.skeleton + self.others)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        solution = torch.linalg.lstsq(jacobian.T, flat[:, None]).solution[:, 0]
        # There are more equations than paths; that they have a solution is what makes the paths a basis.
        torch.testing.assert_close(jacobian.T @ solution, flat, rtol=0, atol=1e-10 * float(flat.abs().max()))
        return solution

    def step(self, gradients: list[Tensor]) -> None:
        values = path_values(self.weights, self.skeleton + self.others)
        gradient = self.path_gradients(gradients)
        self.buffer = gradient if self.buffer is None else self.momentum * self.buffer + gradient
        ratio = (values - self.lr * self.buffer) / values
        of_skeleton, of_others = ratio[: len(self.skeleton)], ratio[len(self.skeleton) :]
        assert float(of_skeleton.min()) > 0
        for path, own in zip(self.others, of_others, strict=True):
            (layer, j, i) = next(place for place in path if place[1] != place[2])
            # The first layer's skeleton weight is on the path of every later weight.
            self.weights[layer][j, i] *= own if layer == 0 else own / of_skeleton[i]
        for i, own in enumerate(of_skeleton):
            self.weights[0][i, i] *= own


@pytest.mark.parametrize("layers", few([2, 3, 4], [3]))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_agrees_with_the_papers_own_algorithm(layers: int, momentum: float) -> None:
    torch.manual_seed(layers)
    width, lr = 5, 0.02
    module = mlp(*[width] * (layers + 1), bias=False).double()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_diagonal_(1.0)
    literal_module = copy.deepcopy(module)
    literal = LiteralECSGD(linear_weights(literal_module), lr, momentum)
    paths = literal.skeleton + literal.others
    assert len(paths) == layers * width**2 - (layers - 1) * width
    x = torch.randn(16, width, dtype=torch.float64)
    y = torch.randn(16, width, dtype=torch.float64)
    group = scaling_group(module, x)
    assert group.dimension == len(paths)
    optimizer = EquivalentClassOptimizer(
        torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum),
        group,
        rule="path",
        refresh_interval=None,
        representative="current",
        skeleton="diagonal",
        max_path_ratio=None,
        free_start=1.0,
    )
    start = path_values(linear_weights(module), paths)
    for _ in range(50):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        loss = (literal_module(x) - y).square().mean()
        literal.step(list(torch.autograd.grad(loss, list(literal_module.parameters()))))
        values = path_values(linear_weights(module), paths)
        expected = path_values(literal.weights, paths)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module(x), literal_module(x), rtol=1e-10, atol=1e-10)
    assert float((values - start).abs().max()) > 0.05
    for i in range(width):
        # The same functions, but other members of their classes: which skeleton weights move differs.
        assert all(float(weight[i, i]) == 1.0 for weight in linear_weights(module)[:-1])
        assert all(float(weight[i, i]) == 1.0 for weight in literal.weights[1:])
    assert not torch.equal(module[0].weight, literal_module[0].weight)
