"""Every way to run a step agrees with the plain one, and which one it is follows from the network and the machine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ecopt import EquivalentClassOptimizer, kernels, scaling_group
from lightning_ecopt.kernels import EagerKernels, choose_kernels
from lightning_ecopt.kernels import eager as eager_module
from lightning_ecopt.kernels.compiled import CompiledKernels
from tests.networks import mlp, norm_cnn
from tests.optim.training import problem, put_back, train, weights_of

Make = Callable[[Iterable[Any]], Optimizer]


def grouped(kind: Callable[..., Optimizer], *options: dict[str, Any], **common: Any) -> Make:
    """Parameters in turn to as many groups as there are options."""

    def make(params: Iterable[Any]) -> Optimizer:
        params = list(params)
        groups = [{"params": params[k :: len(options)], **own} for k, own in enumerate(options)]
        return kind(groups, **common)

    return make


BASES: dict[str, Make] = {
    "plain": lambda params: SGD(params, lr=1e-3),
    "decay": lambda params: SGD(params, lr=1e-3, weight_decay=1e-2),
    "maximize": lambda params: SGD(params, lr=1e-3, weight_decay=1e-2, maximize=True),
    "momentum": lambda params: SGD(params, lr=2e-4, momentum=0.9, weight_decay=1e-2),
    "dampening": lambda params: SGD(params, lr=2e-4, momentum=0.9, dampening=0.3, maximize=True),
    "nesterov": lambda params: SGD(params, lr=1e-3, momentum=0.8, nesterov=True, weight_decay=1e-2),
    "groups": grouped(
        SGD, {"lr": 2e-3}, {"momentum": 0.5, "weight_decay": 0.1}, {"dampening": 0.2}, lr=1e-3, momentum=0.9
    ),
    "adam": lambda params: Adam(params, lr=1e-3),
    "adam_l2": lambda params: Adam(params, lr=1e-3, weight_decay=1e-2, amsgrad=True, maximize=True),
    "adamw": lambda params: AdamW(params, lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda params: AdamW(params, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw_groups": grouped(AdamW, {"weight_decay": 0.0}, {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6}, lr=1e-3),
}


class Packed(nn.Module):
    """Attention with its projections in one parameter, an embedding, a scalar and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.project = nn.Linear(8, 24)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.out = nn.Linear(8, 8)
        self.up = nn.ConvTranspose1d(8, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.embedding(x)).relu().chunk(3, -1)
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v) * self.gain).relu()
        return self.head(self.up(mixed.transpose(1, 2)).relu().mean(-1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]] = {
    "mlp": (lambda: mlp(6, 9, 8, 3), lambda dtype: torch.randn(2, 6).to(dtype)),
    "cnn": (norm_cnn, lambda dtype: torch.randn(2, 1, 6, 6).to(dtype)),
    "packed": (Packed, lambda dtype: torch.zeros(2, 5, dtype=torch.int64)),
}


class Run:
    """A run on gradients that do not depend on the weights, so that it does not blow up what rounding changes.

    The gradients have means, as those behind a ReLU, jump now and then so that they are clipped, and one is missing in
    every seventh step.
    """

    def __init__(self, network: str, base: str, rule: str, implementation: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        build, example = NETWORKS[network]
        self.module, x = build().to(dtype), example(dtype)
        self.named = dict(self.module.named_parameters())
        group, optimizer = scaling_group(self.module, x), BASES[base](self.named.values())
        self.optimizer = EquivalentClassOptimizer(
            optimizer, group, rule=rule, refresh_interval=150, implementation=implementation
        )

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        size = 10.0 if number % 11 == 10 else 1.0
        for k, p in enumerate(self.named.values()):
            gradient = size * (torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.2)
            p.grad = None if number % 7 == 6 and k == number % len(self.named) else gradient.to(p.dtype)
        for options in self.optimizer.param_groups:
            options["lr"] *= 0.999
        self.optimizer.step()

    def steps(self, number: int) -> Run:
        for k in range(number):
            self.step(k)
        return self

    def go_on_from(self, other: Run) -> None:
        """Take over weights and state."""
        self.module.load_state_dict(other.module.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and state."""
        found = weights_of(self.module)
        for name, p in self.named.items():
            found |= {f"{name} {key}": value for key, value in self.optimizer.state[p].items() if value is not None}
        return found


def agree(found: Run, expected: Run, tolerance: float) -> None:
    """All tensors, by the norm of their difference relative to their own."""
    first, second = found.tensors(), expected.tensors()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert bool(value.isfinite().all()), name
        assert float((value - second[name].to(value)).norm()) <= tolerance * float(value.norm()), name


def compare(network: str, base: str, rule: str, implementation: str) -> None:
    """500 steps in float64; in float32 each step from the same weights and state, and 500 steps to where they lead."""
    kinds = (network, base, rule)
    expected = Run(*kinds, "wrapped", torch.float64).steps(500)
    agree(Run(*kinds, implementation, torch.float64).steps(500), expected, 1e-12)
    run, plain = Run(*kinds, implementation, torch.float32), Run(*kinds, "wrapped", torch.float32)
    for number in range(500):
        if number % 25 == 1:
            plain.go_on_from(run)
            plain.step(number)
            run.step(number)
            agree(run, plain, 1e-6)
        else:
            run.step(number)
    agree(run, expected, 1e-5)  # the plain version in float32 is as far from it, or farther


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("base", BASES)
def test_a_fused_run_is_that_of_the_plain_version(base: str, rule: str) -> None:
    compare("mlp", base, rule, "eager")


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("network", ["cnn", "packed"])
@pytest.mark.parametrize("base", ["nesterov", "adam_l2"])
def test_weights_of_all_forms_take_fused_steps(base: str, network: str, rule: str) -> None:
    compare(network, base, rule, "eager")
