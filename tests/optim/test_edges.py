"""Numbers at the edge: parameters without elements, weights of zero, numbers that overflow, and types that change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import (
    EquivalentClassDistance,
    EquivalentClassOptimizer,
    PathNorm,
    UnitImbalance,
    scaling_group,
)
from lightning_ecopt.kernels.choose import Implementation
from tests.networks import mlp
from tests.optim.training import RULES, loss_of, train
from tests.selection import few

Make = Callable[[list[nn.Parameter]], Optimizer]
MAKE: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, lr=0.05),
    "momentum": lambda params: optim.SGD(params, lr=0.02, momentum=0.9),
    "nesterov": lambda params: optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params: optim.Adam(params, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda params: optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01),
}
BASES = pytest.mark.parametrize("name", few(MAKE, ["momentum", "adamw"]))
FORMS = pytest.mark.parametrize("form", ["wrapped", "eager"])


def all_finite(module: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters())


# Parameters without elements ------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A perceptron, and a part whose outputs are added to it, of some of the inputs."""

    def __init__(self, part: nn.Module, inputs: int = 4) -> None:
        super().__init__()
        self.part, self.inputs, self.net = part, inputs, mlp(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.part(x[:, : self.inputs]).sum(-1, keepdim=True)


class Table(nn.Embedding):
    """A table that is used as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.sum(0)


EMPTY: dict[str, Callable[[], nn.Module]] = {
    "table": lambda: Beside(Table(0, 6)),
    "rank_zero": lambda: Beside(nn.Sequential(nn.Linear(4, 0, bias=False), nn.Linear(0, 8, bias=False))),
    "no_hidden": lambda: Beside(nn.Sequential(nn.Linear(4, 0), nn.PReLU(0), nn.Linear(0, 2))),
    "no_inputs": lambda: Beside(nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 1)), inputs=0),
    "no_outputs": lambda: Beside(nn.Linear(4, 0)),
    "nothing_else": lambda: nn.Sequential(nn.Linear(4, 0, bias=False), nn.ReLU(), nn.Linear(0, 3, bias=False)),
}


@pytest.mark.parametrize("form", few(["wrapped", "eager", "compiled"], ["wrapped", "eager"]))
@RULES
@BASES
@pytest.mark.parametrize("kind", few(EMPTY, ["table", "no_hidden", "nothing_else"]))
@pytest.mark.filterwarnings("ignore:.*no scaling freedoms", "ignore:Initializing zero-element")
def test_parameters_without_elements_disturb_no_others(kind: str, name: str, rule: str, form: Implementation) -> None:
    torch.manual_seed(0)
    module, x = EMPTY[kind](), torch.randn(8, 4)
    y = torch.zeros_like(module(x)).detach()
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(MAKE[name]([*module.parameters()]), group, rule=rule, implementation=form)
    optimizer.refresh_interval = 2
    start = copy.deepcopy(module)
    train(module, optimizer, x, y, range(5))
    assert all_finite(module)
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), start.parameters(), strict=True) if p.numel())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, optimizer, x, y, range(2))
    for unit in range(group.num_units):
        group.describe(unit)
    group.summary(usable=optimizer.usable_units())
    imbalance, distance, norm = UnitImbalance(), EquivalentClassDistance(), PathNorm()
    imbalance.update(group)
    distance.update(module, start, group)
    norm.update(module, x)
    assert all(bool(metric.compute().isfinite()) for metric in (imbalance, distance, norm))


def test_parameters_without_elements_do_not_keep_a_step_from_being_fused() -> None:
    steps = []

    module, x = EMPTY["table"](), torch.randn(8, 4)
    base = optim.AdamW(module.parameters(), lr=0.01)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), implementation="eager")
    base.register_step_pre_hook(lambda *_: steps.append(1))
    train(module, optimizer, x, torch.zeros(8, 1), range(3))
    assert len(steps) == 1  # the first one, which makes the state


# Weights of zero ------------------------------------------------------------------------------------------------------


@FORMS
@RULES
@BASES
@pytest.mark.parametrize("layers", few([(0,), (2,), (4,), (0, 2, 4)], [(2,), (0, 2, 4)]))
@pytest.mark.parametrize("own", [False, True])
def test_layers_of_zeros_have_finite_steps(
    layers: tuple[int, ...], own: bool, name: str, rule: str, form: Implementation
) -> None:
    """In parameter groups of their own, or in optimizers of their own."""
    torch.manual_seed(0)
    module, x, y = mlp(6, 5, 5, 3), torch.randn(8, 6), torch.arange(8) % 3
    for k in layers:
        nn.init.zeros_(module[k].weight)
        nn.init.zeros_(module[k].bias)
    group, parts = scaling_group(module, x), [[*module[k].parameters()] for k in (0, 2, 4)]
    given = parts if own else [[{"params": part} for part in parts]]
    optimizers = [
        EquivalentClassOptimizer(MAKE[name](part), group, rule=rule, implementation=form, refresh_interval=2)
        for part in given
    ]
    for _ in range(4):
        module.zero_grad()
        loss_of(module, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all_finite(module)
    assert max(float(p.detach().abs().max()) for p in module.parameters()) < 5
    assert float(module[4].bias.detach().abs().max()) > 0


# Gradients that overflow ----------------------------------------------------------------------------------------------

SPOILT: dict[str, Callable[[Tensor], object]] = {
    "squares_overflow": lambda g: g[1, 2].mul_(1e25),
    "all_squares_overflow": lambda g: g.mul_(1e25),
    "sums_overflow": lambda g: g[1].fill_(3e38),
    "infinite": lambda g: g[1, 2].fill_(torch.inf),
    "both_infinite": lambda g: g[1, 2:4].copy_(torch.tensor([torch.inf, -torch.inf])),
    "undefined": lambda g: g[1, 2].fill_(torch.nan),
    "tiny": lambda g: g.mul_(1e-30),
}


def steps_with_spoilt_gradients(name: str, rule: str, kind: str, form: Implementation) -> list[list[Tensor]]:
    torch.manual_seed(0)
    module, x = mlp(6, 5, 5, 3), torch.randn(8, 6)
    base = MAKE[name]([*module.parameters()])
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, implementation=form)
    found = []
    for step in range(6):
        for p in module.parameters():
            p.grad = torch.randn(p.shape)
        if step in (2, 3):
            SPOILT[kind](module[2].weight.grad)
        if step == 5:
            optimizer.refresh()
        optimizer.step()
        found.append([p.detach().clone() for p in module.parameters()])
    return found


@pytest.mark.parametrize("form", few(["eager", "compiled"], 1))
@RULES
@pytest.mark.parametrize("name", few([name for name in MAKE if name != "rmsprop"], ["momentum", "adamw"]))
@pytest.mark.parametrize("kind", few(SPOILT, ["squares_overflow", "infinite"]))
def test_gradients_that_overflow_do_the_same_in_all_implementations(
    kind: str, name: str, rule: str, form: Implementation
) -> None:
    """Where the base, which is wrapped, leaves a finite weight, the fused step leaves the same."""
    pairs = zip(
        steps_with_spoilt_gradients(name, rule, kind, "wrapped"),
        steps_with_spoilt_gradients(name, rule, kind, form),
        strict=True,
    )
    for step, (expected, found) in enumerate(pairs):
        for p, q in zip(expected, found, strict=True):
            finite = p.isfinite()
            torch.testing.assert_close(q[finite], p[finite], rtol=1e-4, atol=1e-5, msg=lambda m, k=step: f"{k}: {m}")


@RULES
@pytest.mark.parametrize("form", ["wrapped", "eager"])
@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw"])
def test_adam_stays_finite_where_the_plain_one_does(name: str, rule: str, form: Implementation) -> None:
    last = steps_with_spoilt_gradients(name, rule, "squares_overflow", form)[-1]
    assert all(bool(p.isfinite().all()) for p in last)
