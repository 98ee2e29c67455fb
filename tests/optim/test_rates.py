"""What lr means: whatever is embedded, and however weights begin, the first step is as long as the base's own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adadelta, AdamW

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, ScalingGroup, scaling_group
from lightning_ecopt.optim.rates import meaning, mistaken_rate
from tests.networks import mlp
from tests.optim.training import problem, train
from tests.selection import few


class Tokens(nn.Module):
    """A block of a decoder between an embedding and a head."""

    def __init__(self, vocabulary: int, width: int, *, positions: bool) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width)) if positions else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, i: Tensor) -> Tensor:
        x = self.tokens(i)
        if self.positions is not None:
            x = x + self.positions
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def initialise(net: nn.Module, init: str) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and init != "torch":
            if init == "gpt2":
                nn.init.normal_(layer.weight, 0, 0.02)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, nn.Linear) and init != "torch":
            nn.init.zeros_(layer.bias)


def axes_of_rows(group: ScalingGroup, name: str) -> tuple[int, ...]:
    """The axes along which a row of a matrix lies: those along which its elements lead into one value."""
    (coupling,) = [coupling for coupling in group.couplings if coupling.parameter == name]
    return tuple(axis for axis, size in enumerate(coupling.incoming.shape) if size == 1)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("init", ["torch", "gpt2", "he"])
@pytest.mark.parametrize("vocabulary", few([65, 1_000, 10_000, 50_000], [65, 10_000]))
def test_no_row_moves_by_a_third_or_three_times_the_rate_unless_it_is_that_large(
    vocabulary: int, init: str, positions: bool
) -> None:
    torch.manual_seed(0)
    net, lr = Tokens(vocabulary, 32, positions=positions), 1e-3
    initialise(net, init)
    i = torch.randint(vocabulary, (16, 8))
    base = AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    group = scaling_group(net, i)
    optimizer = EquivalentClassOptimizer(base, group)
    F.cross_entropy(net(i[:, :-1] if not positions else i).flatten(0, 1)[: 16 * 7], i[:, 1:].flatten()).backward()
    optimizer.start()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    rho = float(optimizer.state_dict()["equivalent_class"]["reference"])
    for name, p in net.named_parameters():
        moved = (p.detach() - before[name]).abs() / lr
        if p.ndim == 1:  # biases and gains take the base's own step
            assert float(moved.max()) <= 1.01, name
            continue
        axes = axes_of_rows(group, name)
        size = before[name].square().mean(axes).sqrt()
        length = moved.amax(axes)
        assert float(length.min()) > 0.99 / 3, name
        assert bool((length < 1.01 * (size / rho).clamp(min=3)).all()), name
        assert name == "tokens.weight" or float(length.max()) < 3.03, name
    assert float(before["tokens.weight"].square().mean().sqrt()) < 3 * rho or init == "torch"


def test_sgd_takes_the_same_relative_step_in_all_rows_whatever_is_embedded() -> None:
    torch.manual_seed(0)
    net = Tokens(1_000, 32, positions=True)
    i = torch.randint(1_000, (16, 8))
    group = scaling_group(net, i)
    optimizer = EquivalentClassOptimizer(SGD(net.parameters(), lr=0.01), group)
    F.cross_entropy(net(i).flatten(0, 1), i.flatten()).backward()
    optimizer.start()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        if p.ndim == 2:
            axes = axes_of_rows(group, name)
            ratio = (p.detach() - before[name]).norm(dim=axes) / before[name].norm(dim=axes)
            torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("base", "is_wrong"),
    [
        (SGD([nn.Parameter(torch.ones(2))], lr=0.1), False),
        (SGD([nn.Parameter(torch.ones(2))], lr=5.0), True),
        (SGD([nn.Parameter(torch.ones(2))], lr=1e-5), True),
        (SGD([nn.Parameter(torch.ones(2))], lr=0.0), False),
        (AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(1e-3)), False),
        (AdamW([nn.Parameter(torch.ones(2))], lr=1.0), True),
        (Adadelta([nn.Parameter(torch.ones(2))], lr=1.0), False),
    ],
)
def test_rates_far_outside_of_what_trains_are_told(base: torch.optim.Optimizer, is_wrong: bool) -> None:
    found, lr = mistaken_rate(base, "unit"), float(base.param_groups[0]["lr"])
    assert (found is not None) == is_wrong
    if found is not None:
        assert found[0] == ("large" if lr > 0.1 else "small")
        assert f"lr = {lr:g} of {type(base).__name__}" in found[1]
    assert mistaken_rate(base, "path") is None


def test_a_rate_that_a_warm_up_has_made_small_is_no_mistake() -> None:
    base = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1e-6)
    assert base.param_groups[0]["lr"] == pytest.approx(1e-7)
    assert mistaken_rate(base, "unit") is None


def test_a_mistaken_rate_is_told_once_and_a_small_one_after_the_first_interval() -> None:
    for lr, decay, expected in ((10.0, 1.0, [0]), (1e-6, 1.0, [3]), (0.1, 0.01, [])):
        module, x, y = problem(4, 6, 5, 3)
        group = scaling_group(module, x)
        optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=lr), group, refresh_interval=3)
        told = []
        for step in range(9):
            optimizer.param_groups[0]["lr"] = lr * decay**step
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(module, optimizer, x, y, range(step, step + 1))
            told += [step for one in caught if "far outside of the rates" in str(one.message)]
        assert told == expected


def test_the_meaning_of_the_rate_is_one_line() -> None:
    module = mlp(3, 4, 2)
    sgd, adamw = SGD(module.parameters(), lr=0.1), AdamW(module.parameters(), lr=1e-3)
    assert meaning(sgd, "unit").startswith("lr = 0.1: with the rule 'unit' the relative length of a step")
    assert meaning(adamw, "unit").startswith("lr = 0.001: as AdamW has it")
    assert meaning(adamw, "path") == "lr = 0.001: as AdamW has it, in values of basis paths"
    assert all("\n" not in meaning(base, rule) for base in (sgd, adamw) for rule in ("unit", "path"))


@pytest.mark.parametrize("kind", [ECSGD, ECAdamW])
def test_the_default_rate_trains(kind: type[ECSGD | ECAdamW]) -> None:
    module, x, y = problem(8, 32, 32, 3)
    losses = train(module, kind(module.parameters()), x, y, range(150))
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
