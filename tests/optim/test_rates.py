"""What lr means: whatever is embedded, and however weights begin, the first step is as long as the base's own."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adadelta, AdamW, Optimizer

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, MuonAdamW, ScalingGroup, scaling_group
from lightning_ecopt.optim.rates import meaning, mistaken_rate
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one
from tests.networks import mlp
from tests.optim.other_optimizers import Lookahead
from tests.optim.training import needs_muon, only_refresh, problem, train
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
    log_scale = scale_to_gains_of_one(group, torch.ones(group.num_units, dtype=torch.bool))
    typical = {name: p.clone() for name, p in before.items()}
    if log_scale is not None:
        group.rescale_(typical, log_scale)
    sizes = [float(p.square().mean().sqrt()) for p in typical.values() if p.ndim > 1]
    rho = math.exp(statistics.median(map(math.log, sizes)))
    for name, p in net.named_parameters():
        moved = (p.detach() - before[name]).abs() / lr
        if p.ndim == 1:  # biases and gains take the base's own step
            assert float(moved.max()) <= 1.01, name
            assert float(moved.median()) >= 0.99, name
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


@pytest.mark.parametrize("times", [1e-3, 1e3])
def test_the_size_of_one_parameter_does_not_change_the_steps_of_all_others(times: float) -> None:
    moved = []
    for factor in (1.0, times):
        torch.manual_seed(0)
        net = Tokens(50, 32, positions=False)
        i = torch.randint(50, (16, 8))
        with torch.no_grad():
            net.tokens.weight.mul_(factor)
        base = AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
        optimizer = EquivalentClassOptimizer(base, scaling_group(net, i), check=None)
        optimizer.start()
        before = net.up.weight.detach().clone()
        for p in net.parameters():
            p.grad = torch.ones_like(p).normal_(generator=torch.Generator().manual_seed(1))
        optimizer.step()
        moved.append((net.up.weight.detach() - before).abs().amax())
    assert 0.5 < float(moved[1] / moved[0]) < 2


@pytest.mark.parametrize("base", [lambda ps: AdamW(ps, lr=1e-3, weight_decay=0.0), lambda ps: SGD(ps, lr=1e-3)])
def test_what_is_added_is_not_slowed_down(base: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
    """Positions begin at a fifth of the size of other weights, and have to grow."""
    torch.manual_seed(0)

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 3)
            self.positions = nn.Parameter(0.02 * torch.randn(8, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.embed(x) + self.positions)).mean(1)

    net, x = Patches(), torch.randn(4, 8, 16)
    optimizer = EquivalentClassOptimizer(base(net.parameters()), scaling_group(net, x))
    F.cross_entropy(net(x), torch.arange(4) % 3).backward()
    optimizer.start()
    before = net.positions.detach().clone()
    typical = min(float(layer.weight.detach().square().mean().sqrt()) for layer in (net.embed, net.head))
    optimizer.step()
    moved = (net.positions.detach() - before).square().mean().sqrt()
    assert moved > 0.9e-3 * (typical if isinstance(optimizer, SGD) else 1)
    assert moved > 2e-3 * before.square().mean().sqrt()


@pytest.mark.parametrize("kind", [AdamW, pytest.param(MuonAdamW, marks=needs_muon)])
def test_gains_that_balancing_moves_do_not_change_relative_steps(kind: type[Optimizer]) -> None:
    """Behind a norm a matrix is longer at the balanced member, and so is its step."""
    lengths, norms = [], []
    for in_class in (False, True):
        torch.manual_seed(0)
        net, i = Tokens(50, 32, positions=False), torch.randint(50, (16, 8))
        initialise(net, "gpt2")
        norms.append(net.up.weight.detach().norm())
        optimizer: Any = kind(net.parameters(), lr=1e-3, weight_decay=0.0)
        if in_class:
            optimizer = EquivalentClassOptimizer(optimizer, scaling_group(net, i))
            optimizer.start()
        before = net.up.weight.detach().clone()
        F.cross_entropy(net(i).flatten(0, 1), i.flatten()).backward()
        optimizer.step()
        norms.append(before.norm())
        lengths.append((net.up.weight.detach() - before).norm() / before.norm())
    assert norms[-1] > 2 * norms[0]
    torch.testing.assert_close(lengths[1], lengths[0], rtol=0.1, atol=0)


@pytest.mark.parametrize(("momentum", "dampening", "longest"), [(0.9, 0.0, 0.21), (0.9, 0.9, 2.1), (0.9, 0.999, 2.1)])
def test_the_first_step_of_sgd_is_no_longer_than_those_that_follow_may_be(
    momentum: float, dampening: float, longest: float
) -> None:
    module, x, y = problem(4, 6, 5, 3)
    base = SGD(module.parameters(), lr=0.01, momentum=momentum, dampening=dampening)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x))
    only_refresh(optimizer)
    before = module[0].weight.detach().clone()
    train(module, optimizer, x, y, range(1))
    length = (module[0].weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.01 * longest), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("base", "is_wrong"),
    [
        (SGD([nn.Parameter(torch.ones(2))], lr=0.1), False),
        (SGD([nn.Parameter(torch.ones(2))], lr=5.0), True),
        (SGD([nn.Parameter(torch.ones(2))], lr=1e-5), True),
        (SGD([nn.Parameter(torch.ones(2))], lr=0.0), False),
        (AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(1e-3)), False),
        (AdamW([nn.Parameter(torch.ones(2))], lr=1.0), True),
        (AdamW([nn.Parameter(torch.ones(2))], lr=1e-6), False),  # as in fine-tuning
        (SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (0.1, 1e-6)]), False),
        (Adadelta([nn.Parameter(torch.ones(2))], lr=1.0), False),
    ],
)
def test_rates_far_outside_of_what_trains_are_told(base: torch.optim.Optimizer, is_wrong: bool) -> None:
    found, lr = mistaken_rate(base, "unit"), max(float(options["lr"]) for options in base.param_groups)
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
    assert meaning(sgd, "unit") == "lr = 0.1 is the relative length of a step of a unit"
    assert meaning(adamw, "unit") == "lr = 0.001 is AdamW's, for a row of weights of typical size"
    assert meaning(adamw, "path") == "lr = 0.001 is AdamW's, in values of basis paths"
    assert all("\n" not in meaning(base, rule) for base in (sgd, adamw) for rule in ("unit", "path"))


def test_the_meaning_tells_what_it_is_of_where_steps_are_of_two_kinds_and_where_there_is_no_rate() -> None:
    module = mlp(3, 4, 2)
    base = SGD(module.parameters(), lr=0.1)
    base.param_groups[0]["use_muon"] = False
    base.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True, "lr": 0.2})
    of_sgd, of_matrices = meaning(base, "unit").split("; lr = ")
    assert of_sgd == "lr = 0.1 of SGD is the relative length of a step of a unit"
    assert of_matrices == "0.2 of matrices is SGD's, for the balanced weights"
    for options in base.param_groups:
        options["lr"] = None  # as transformers' Adafactor has it
    assert meaning(base, "path") == "lr is SGD's, in values of basis paths"
    assert mistaken_rate(base, "unit") is None


@needs_muon
def test_the_meaning_tells_the_rates_of_muon_and_of_adamw() -> None:
    module = mlp(3, 8, 4, 2)
    base = MuonAdamW(module.parameters(), lr=0.02, adamw_lr=1e-3)
    of_matrices, of_others = meaning(base, "unit").split("; lr = ")
    assert of_matrices == "lr = 0.02 of matrices is MuonAdamW's, for the balanced weights"
    assert of_others == "0.001 of all others is MuonAdamW's, for a row of weights of typical size"
    assert meaning(base, "path") == "lr = 0.001 to 0.02 is MuonAdamW's, in values of basis paths"
    base.add_param_group({"params": [nn.Parameter(torch.ones(2))], "use_muon": False, "lr": 0.3})
    assert "; lr = 0.001 to 0.3 of all others is " in meaning(base, "unit")
    assert mistaken_rate(base, "unit") is None  # there is no saying what is one


def test_a_rate_within_another_optimizer_is_that_of_what_steps() -> None:
    module = mlp(3, 4, 2)
    around_sgd, around_adamw = Lookahead(SGD(module.parameters(), lr=5.0)), Lookahead(AdamW(module.parameters()))
    assert meaning(around_sgd, "unit") == "lr = 5 is the relative length of a step of a unit"
    assert meaning(around_adamw, "unit").startswith("lr = 0.001 is Lookahead's, for a row")
    found = mistaken_rate(around_sgd, "unit")
    assert found is not None
    assert found[0] == "large"
    assert "lr = 5 of Lookahead" in found[1]
    assert found[1].endswith("0.001 to 3. It is the relative length of a step of a unit.")
    assert mistaken_rate(around_sgd, "path") is None


@pytest.mark.parametrize("kind", [ECSGD, ECAdamW])
def test_the_default_rate_trains(kind: type[ECSGD | ECAdamW]) -> None:
    module, x, y = problem(8, 32, 32, 3)
    losses = train(module, kind(module.parameters()), x, y, range(150))
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
