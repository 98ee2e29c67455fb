"""What a module does with autograd stops no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.symmetry.soundness.checks import BESIDE, PLAIN, block, check, every, odd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class NumpyTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(h.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].square())


class ReluOfLinear(torch.autograd.Function):
    """Written by hand, with a setup of its own for the backward pass."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor) -> Tensor:
        return (h @ weight.t()).clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, weight, y = ctx.saved_tensors
        grad = grad * (y > 0)
        return grad @ weight, grad.t() @ h


class DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.mark_dirty(h)
        return h.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def _backward(m: Any, h: Tensor) -> Tensor:
    """A step of its own in every call; the gradients stay behind."""
    with torch.enable_grad():
        m.block(h.detach()).square().mean().backward()
    return h * m.block[0].weight.grad.norm()


def _adapted(m: Any, h: Tensor) -> Tensor:
    """One step of gradient descent before the layer is used."""
    with torch.enable_grad():
        loss = m.block(h).square().mean()
        grads = torch.autograd.grad(loss, list(m.block.parameters()), create_graph=True)
    weight, bias = (p - 0.1 * g for p, g in zip(m.block.parameters(), grads, strict=True))
    return F.relu(F.linear(h, weight, bias))


def _steps_of_an_optimizer(m: Any, h: Tensor) -> Tensor:
    """A code is fitted to the features, by an optimizer."""
    code = torch.zeros_like(h, requires_grad=True)
    optimizer = torch.optim.SGD([code], lr=0.1)
    with torch.enable_grad():
        for _ in range(2):
            optimizer.zero_grad()
            (m.block(code) - h.detach()).square().sum().backward(inputs=[code])
            optimizer.step()
    return code.detach()


def _penalty(m: Any, h: Tensor) -> Tensor:
    with torch.enable_grad():
        point = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(m.block(point).sum(), point, create_graph=True)
    return h + gradient


def _saved_elsewhere(m: Any, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        return m.block(h)


def _without_gradient(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * h


def _in_inference_mode(m: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        y = 2 * h
    return y.clone()


AUTOGRAD = {
    "straight through": odd(lambda m, h: Round.apply(h)),
    "straight through by detach": odd(lambda m, h: h + (h.round() - h).detach()),
    "function of numpy": odd(lambda m, h: NumpyTanh.apply(h)),
    "function with a context set up": odd(
        lambda m, h: ReluOfLinear.apply(h, m.w), w=lambda: nn.Parameter(torch.ones(5, 5))
    ),
    "function that writes": odd(lambda m, h: DoubledInPlace.apply(h.clone())),
    "no gradient": (odd(_without_gradient), PLAIN + BESIDE),
    "inference mode": (odd(_in_inference_mode), PLAIN + BESIDE),
    "checkpoint, reentrant": (
        odd(lambda m, h: checkpoint(m.block, h, use_reentrant=True), block=block),
        PLAIN + 2 * BESIDE,
    ),
    "checkpoint": (odd(lambda m, h: checkpoint(m.block, h, use_reentrant=False), block=block), PLAIN + 2 * BESIDE),
    "saved tensors moved": (odd(_saved_elsewhere, block=block), PLAIN + 2 * BESIDE),
    "backward": odd(_backward, block=block),
    "adapted by a gradient": odd(_adapted, block=block),
    "steps of an optimizer": odd(_steps_of_an_optimizer, block=block),
    "gradient as features": odd(_penalty, block=block),
    "gradient of a function": odd(lambda m, h: torch.func.grad(lambda t: t.square().sum())(h)),
    "forward derivative": odd(lambda m, h: torch.func.jvp(m.block, (h,), (torch.ones_like(h),))[1], block=block),
    "jacobian": odd(lambda m, h: torch.func.jacrev(m.block)(h[0]).sum() * h, block=block),
    "vmap": odd(lambda m, h: torch.vmap(lambda row: 2 * row)(h)),
    "vmap of a layer": odd(lambda m, h: torch.func.vmap(m.block, chunk_size=3)(h), block=block),
    "gradient of every row": odd(lambda m, h: torch.vmap(torch.func.grad(lambda row: row.pow(2).sum()))(h)),
    "called with other weights": odd(
        lambda m, h: torch.func.functional_call(m.block, {"0.bias": torch.ones(5).double()}, (h,)), block=block
    ),
    "called with its own weights": (
        odd(lambda m, h: torch.func.functional_call(m.block, dict(m.block.named_parameters()), h), block=block),
        PLAIN + 2 * BESIDE,
    ),
}


@every(AUTOGRAD)
def test_what_is_done_to_gradients(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    group = check(make(), x)
    assert units in (None, group.num_units)
