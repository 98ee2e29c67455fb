"""Networks that differentiate themselves: the gradients are among the outputs, or on the way to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.symmetry import scaling_group
from tests.networks import mlp
from tests.selection import full
from tests.symmetry.helpers import assert_complete, normal
from tests.symmetry.soundness.checks import BESIDE, PLAIN, Beside, check


class Net(nn.Module):
    """A function of its parts and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, *inputs: Tensor) -> Any:
        with torch.enable_grad():
            return self.function(self, *inputs)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _forces(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    return gradient(m.net(x), x)


def _penalty(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A critic, and how far its gradient is from length one."""
    x = x.requires_grad_()
    y = m.head(F.avg_pool1d(m.net(x), 2).flatten(1))
    return y, (gradient(y, x).flatten(1).norm(dim=1) - 1).square()


def _residual(m: Any, x: Tensor) -> Tensor:
    """``u'' + u``, of a network with squared relu."""
    x = x.requires_grad_()
    u = m.up(m.down(x).relu().square())
    return gradient(gradient(u, x), x) + u


def _potential(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of molecules of two atoms, from messages between these, and forces."""
    x = x.requires_grad_()
    kinds, first, second = torch.arange(8) % 3, torch.arange(8), torch.arange(8) ^ 1
    distance = (x[first] - x[second]).norm(dim=1, keepdim=True)
    messages = m.filter(distance).relu() * m.kind(kinds)[second]
    atoms = m.norm(torch.zeros(8, 3, dtype=x.dtype).index_add(0, first, messages))
    energy = torch.zeros(4, 1, dtype=x.dtype).index_add(0, first // 2, m.energy(atoms))
    return energy, gradient(energy, x)


def _features(m: Any, x: Tensor) -> Tensor:
    """Gradients that go through a saturating function, then through a layer of their own."""
    x = x.requires_grad_()
    return m.head(gradient(m.energy(m.net(x).tanh()), x).relu())


def _adapted(m: Any, x: Tensor) -> Tensor:
    """One step of gradient descent in the last layer before it is used."""
    h = m.net(x)
    (step,) = torch.autograd.grad(F.linear(h, m.w).square().mean(), m.w, create_graph=True)
    return F.linear(h, m.w - 0.1 * step)


def _functional(m: Any, x: Tensor) -> Tensor:
    """Forces of every row by itself."""
    return torch.vmap(torch.func.grad(lambda row: m.net(row).squeeze()))(x)


def _forward(m: Any, x: Tensor) -> Tensor:
    """Derivatives in one direction, in forward mode."""
    return torch.func.jvp(m.net, (x,), (torch.ones_like(x),))[1]


def _critic() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.ConvTranspose1d(3, 4, 2, 2), nn.PReLU())


@pytest.mark.parametrize(
    ("make", "shape", "units"),
    [
        pytest.param(lambda: Net(_forces, net=mlp(3, 4, 5, 1, activation=nn.LeakyReLU)), (8, 3), 9, id="forces"),
        pytest.param(lambda: Net(_functional, net=mlp(3, 4, 5, 1)), (8, 3), 9, id="functional", marks=full),
        pytest.param(
            lambda: Net(_forward, net=mlp(3, 4, 5, 2, activation=nn.PReLU)), (8, 3), 9, id="forward mode", marks=full
        ),
        pytest.param(lambda: Net(_penalty, net=_critic(), head=nn.Linear(16, 1)), (4, 2, 4), 7, id="penalty"),
        pytest.param(
            lambda: Net(_residual, down=nn.Linear(1, 4), up=nn.Linear(4, 1)), (8, 1), 4, id="residual", marks=full
        ),
        pytest.param(
            lambda: Net(
                _potential,
                filter=nn.Linear(1, 3),
                kind=nn.Embedding(3, 3),
                norm=nn.LayerNorm(3),
                energy=nn.Linear(3, 1),
            ),
            (8, 3),
            3 + 3,
            id="potential",
        ),
        pytest.param(
            lambda: Net(_features, net=mlp(3, 4, 4), energy=nn.Linear(4, 1), head=nn.Linear(3, 2)),
            (8, 3),
            4 + 1,
            id="features",
            marks=full,
        ),
        pytest.param(
            lambda: Net(_adapted, net=mlp(3, 4, 4), w=nn.Parameter(torch.ones(2, 4))),
            (8, 3),
            4,
            id="adapted",
            marks=full,
        ),
    ],
)
def test_as_many_units_as_there_are_freedoms(make: Callable[[], nn.Module], shape: tuple[int, ...], units: int) -> None:
    module = make()
    assert scaling_group(module, torch.randn(shape).double()).num_units == units
    assert_complete(module, normal(shape))


class Deep(torch.autograd.Function):
    """A backward pass within a backward pass: autograd runs the innermost of them on a thread of its own."""

    threads: ClassVar[set[int]] = set()

    @staticmethod
    def forward(ctx: Any, h: Tensor, depth: int) -> Tensor:
        ctx.depth = depth
        return h.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        Deep.threads.add(threading.get_ident())
        if ctx.depth == 0:
            return above.abs(), None
        with torch.enable_grad():
            h = torch.ones_like(above, requires_grad=True)
            return torch.autograd.grad(Deep.apply(h, ctx.depth - 1), h, above, create_graph=True)[0], None


def test_gradients_are_watched_on_threads_of_autograd() -> None:
    def odd(m: Any, h: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(Deep.apply(h, 70), h, m.block(h), create_graph=True)[0]

    Deep.threads.clear()
    group = check(Beside(odd, block=mlp(5, 5, 5)), torch.randn(6, 3).double())
    assert len(Deep.threads) > 1
    assert group.num_units == PLAIN + BESIDE + BESIDE + BESIDE
