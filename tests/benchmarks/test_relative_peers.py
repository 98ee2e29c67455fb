"""LAMB, LARS, Nero and Adam-mini: steps against the papers' formulas, worked out by hand, and invariances."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.selection import full

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import attention
import peers

pytestmark = full

W = [[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]]
G1, G2 = [[1.0, -2.0, 2.0], [0.5, 0.5, 0.0]], [[-1.0, 1.0, 0.0], [2.0, 0.0, -1.0]]
BIAS, BIAS_G = [0.5, -1.0], [2.0, -0.25]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def steps(build: Callable[..., torch.optim.Optimizer], w: Any, *gradients: Any) -> list[Tensor]:
    """The values of one parameter after each gradient, the start first."""
    parameter = nn.Parameter(torch.tensor(w))
    optimizer = build([parameter])
    values = [parameter.detach().clone()]
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


def test_lamb_takes_the_steps_of_its_algorithm() -> None:
    lr, decay, eps = 0.1, 0.02, 1e-6
    values = steps(lambda params: peers.LAMB(params, lr=lr, betas=(0.5, 0.75), eps=eps, weight_decay=decay), W, G1, G2)
    w, g1, g2 = (torch.tensor(value) for value in (W, G1, G2))
    r = g1 / (g1.abs() + eps) + decay * w  # both means are g1 and g1^2 once the bias is corrected
    w = w - lr * w.norm() / r.norm() * r
    torch.testing.assert_close(values[1], w)
    m, v = (g1 / 4 + g2 / 2) / (1 - 1 / 4), (g1**2 * 3 / 16 + g2**2 / 4) / (1 - 9 / 16)
    r = m / (v.sqrt() + eps) + decay * w
    torch.testing.assert_close(values[2], w - lr * w.norm() / r.norm() * r)


def test_lamb_steps_a_bias_as_adam_does() -> None:
    ours = steps(lambda params: peers.LAMB(params, lr=0.1, eps=1e-8), BIAS, BIAS_G, [1.0, 1.0])
    adam = steps(lambda params: torch.optim.Adam(params, lr=0.1), BIAS, BIAS_G, [1.0, 1.0])
    torch.testing.assert_close(ours[2], adam[2])


def test_lars_takes_the_steps_of_its_algorithm() -> None:
    lr, decay, momentum = 0.1, 0.02, 0.5
    values = steps(lambda params: peers.LARS(params, lr, momentum, decay), W, G1, G2)
    w, g1, g2 = (torch.tensor(value) for value in (W, G1, G2))
    v = lr * w.norm() / (g1.norm() + decay * w.norm()) * (g1 + decay * w)
    w = w - v
    torch.testing.assert_close(values[1], w)
    v = momentum * v + lr * w.norm() / (g2.norm() + decay * w.norm()) * (g2 + decay * w)
    torch.testing.assert_close(values[2], w - v)


def test_lars_steps_a_bias_as_sgd_does() -> None:
    ours = steps(lambda params: peers.LARS(params, lr=0.1, momentum=0.9, weight_decay=0.1), BIAS, BIAS_G, BIAS_G)
    sgd = steps(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), BIAS, BIAS_G, BIAS_G)
    torch.testing.assert_close(ours[2], sgd[2])


@pytest.mark.parametrize("kind", [peers.LAMB, peers.LARS])
def test_a_zero_tensor_leaves_zero(kind: Callable[..., torch.optim.Optimizer]) -> None:
    values = steps(lambda params: kind(params, lr=0.1), [[0.0, 0.0]], [[1.0, -1.0]])
    assert float(values[1].abs().min()) > 0.05


@pytest.mark.parametrize("kind", [peers.LAMB, peers.LARS])
def test_steps_are_relative_to_the_tensor(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """A tensor that is c times as large, and whose gradients are so c times as small, stays c times as large."""
    c = 7.0
    build = lambda params: kind(params, lr=0.1, weight_decay=0.0)  # noqa: E731
    base = steps(build, W, [[1.0, -2.0, 2.0], [0.5, 0.5, 1.0]], [[-1.0, 1.0, 0.5], [2.0, 0.5, -1.0]])
    scaled = steps(
        build,
        (c * torch.tensor(W)).tolist(),
        [[1.0 / c, -2.0 / c, 2.0 / c], [0.5 / c, 0.5 / c, 1.0 / c]],
        [[-1.0 / c, 1.0 / c, 0.5 / c], [2.0 / c, 0.5 / c, -1.0 / c]],
    )
    torch.testing.assert_close(scaled[2], c * base[2], rtol=1e-4, atol=1e-4)


def test_nero_takes_the_steps_of_its_algorithm() -> None:
    lr, beta = 0.1, 0.75
    values = steps(lambda params: peers.Nero(params, lr, beta), W, G1, G2)

    def projected(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(1, keepdim=True)
        return rows / rows.norm(dim=1, keepdim=True)

    w, g1, g2 = projected(torch.tensor(W)), torch.tensor(G1), torch.tensor(G2)
    torch.testing.assert_close(values[0], w)
    squares1, squares2 = g1.square().sum(1, keepdim=True), g2.square().sum(1, keepdim=True)
    w = projected(w - lr * g1 / squares1.sqrt())
    torch.testing.assert_close(values[1], w)
    mean = (squares1 * beta * (1 - beta) + squares2 * (1 - beta)) / (1 - beta**2)
    torch.testing.assert_close(values[2], projected(w - lr * g2 / mean.sqrt()))


def test_nero_keeps_rows_of_zero_mean_and_unit_norm_and_ignores_their_scale() -> None:
    base = steps(lambda params: peers.Nero(params, lr=0.1), W, G1, G2)
    scaled = steps(
        lambda params: peers.Nero(params, lr=0.1),
        (torch.tensor(W) * torch.tensor([[5.0], [0.1]])).tolist(),
        (torch.tensor(G1) * torch.tensor([[2.0], [30.0]])).tolist(),
        (torch.tensor(G2) * torch.tensor([[2.0], [30.0]])).tolist(),
    )
    torch.testing.assert_close(scaled[2], base[2])
    torch.testing.assert_close(base[2].mean(1), torch.zeros(2))
    torch.testing.assert_close(base[2].norm(dim=1), torch.ones(2))


def test_nero_steps_biases_by_their_magnitude_at_the_start() -> None:
    values = steps(lambda params: peers.Nero(params, lr=0.1), BIAS, BIAS_G)
    torch.testing.assert_close(values[1], torch.tensor(BIAS) - 0.1 * 0.75 * torch.tensor(BIAS_G).sign())
    zero = steps(lambda params: peers.Nero(params, lr=0.1), [0.0, 0.0], [3.0, 0.0])
    torch.testing.assert_close(zero[1], torch.tensor([-0.001, 0.0]))


def test_adam_mini_has_one_second_moment_for_a_row() -> None:
    lr, decay, eps = 0.1, 0.02, 1e-8
    build = lambda params: peers.AdamMini(params, lr, (0.5, 0.75), eps, decay)  # noqa: E731
    values = steps(build, W, G1, G2)
    w, g1, g2 = (torch.tensor(value) for value in (W, G1, G2))
    mean1, mean2 = g1.square().mean(1, keepdim=True), g2.square().mean(1, keepdim=True)
    w = w * (1 - lr * decay) - lr * g1 / (mean1.sqrt() + eps)
    torch.testing.assert_close(values[1], w)
    m, v = (g1 / 4 + g2 / 2) / (3 / 4), (mean1 * 3 / 16 + mean2 / 4) / (7 / 16)
    torch.testing.assert_close(values[2], w * (1 - lr * decay) - lr * m / (v.sqrt() + eps))


def test_adam_mini_is_adamw_where_a_block_has_one_element() -> None:
    column, gradients = [[1.0], [-2.0], [0.5]], ([[1.0], [2.0], [3.0]], [[-1.0], [0.5], [0.0]])
    ours = steps(lambda params: peers.AdamMini(params, lr=0.1), column, *gradients)
    adamw = steps(lambda params: torch.optim.AdamW(params, lr=0.1), column, *gradients)
    torch.testing.assert_close(ours[2], adamw[2])


def test_adam_mini_takes_heads_of_queries_and_keys_and_has_half_of_adams_state() -> None:
    net = attention.decoder(16, 1, 4, 8, outputs=11)
    optimizer = peers.adam_mini(net, lr=0.1)
    net(torch.randint(11, (2, 8))).square().sum().backward()
    optimizer.step()
    first = net.blocks[0].attention
    moments = {name: optimizer.state[p]["exp_avg_sq"].numel() for name, p in net.named_parameters()}
    assert moments["blocks.0.attention.q.weight"] == moments["blocks.0.attention.k.weight"] == 4
    assert moments["blocks.0.attention.v.weight"] == 16
    assert moments["tokens.weight"] == moments["head.weight"] == 11
    assert moments["blocks.0.attention.v.bias"] == 1
    gradient = first.q.weight.grad.reshape(4, -1).square().mean(1, keepdim=True)
    torch.testing.assert_close(optimizer.state[first.q.weight]["exp_avg_sq"], 0.001 * gradient)
    assert sum(moments.values()) < 0.1 * sum(p.numel() for p in net.parameters())
    with pytest.raises(ValueError, match="5 rows"):
        peers.AdamMini([nn.Parameter(torch.ones(5, 2))], lr=0.1, rows=2)
