"""The rule "unit" against its formulas in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import mlp
from tests.optim.bases import WITH_FORMULAS
from tests.optim.reference import Reference
from tests.optim.training import batches, loss_of, only_refresh, problem, same_bits, train
from tests.optim.unit_rule import EXAMPLES, data, example, run_both, saved, unit
from tests.selection import examples, few

# The formulas, in loops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base"),
    few(
        [("mlp", base) for base in WITH_FORMULAS if base != "nesterov"]
        + [(name, "nesterov") for name in EXAMPLES]
        + [(name, "amsgrad") for name in ("one_input", "slope", "norms", "transposed", "grouped_transposed")]
        + [
            (name, "muon_adamw")
            for name in ("one_input", "no_bias", "residual", "cnn")
            if "muon_adamw" in WITH_FORMULAS
        ],
        [
            *[
                ("mlp", base)
                for base in ("sgd", "dampening", "adam_l2", "adamw", "muon_adamw")
                if base in WITH_FORMULAS
            ],
            *[(name, "nesterov") for name in ("cnn", "residual")],
            *[(name, "amsgrad") for name in ("norms", "grouped_transposed")],
        ],
    ),
)
def test_steps_are_those_of_the_formulas(name: str, base: str) -> None:
    module, x, y, reference = example(name)
    optimizer = unit(module, x, base, refresh_interval=3)
    run_both(module, optimizer, reference, x, y, 7)
    assert optimizer.statistics().dormant_units == 0


def test_some_gradients_of_the_comparison_are_clipped() -> None:
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, "sgd", refresh_interval=None)
    run_both(module, optimizer, reference, x, y, 10)
    assert 0.1 < optimizer.statistics().clipped_share < 0.6


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_small_rows_have_a_floor(base: str) -> None:
    module, x, y, reference = example("mlp")
    with torch.no_grad():
        for one in (module, reference.module):
            one[2].weight[1] *= 1e-3  # far below the others, also when it is balanced
            one[2].bias[1] *= 1e-3
            one[4].weight[:, 1] *= 1e-3
            one[4].weight[2] *= 1e-3
    run_both(module, unit(module, x, base, refresh_interval=4), reference, x, y, 6)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_rows_of_zeros_take_the_steps_of_the_mean(base: str) -> None:
    module, x, y, reference = example("residual")
    with torch.no_grad():
        for one in (module, reference.module):
            for p in one.down.parameters():
                p.zero_()
    run_both(module, unit(module, x, base, refresh_interval=4), reference, x, y, 6)
    assert bool((module.down.weight != 0).all())


def test_rows_keep_the_steps_that_they_had_at_the_start() -> None:
    """However much their weights have grown or shrunk since, also in a checkpoint."""
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "momentum", refresh_interval=3)
    train(module, optimizer, x, y, range(1))
    before = saved(optimizer)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
    train(module, optimizer, x, y, range(1, 8))
    other = unit(module, x, "momentum", refresh_interval=3)
    other.load_state_dict(optimizer.state_dict())
    train(module, other, x, y, range(8, 12))
    for one in (optimizer, other):
        assert torch.equal(saved(one)["rho"], before["rho"])
        assert torch.equal(saved(one)["reference"], before["reference"])


def test_small_gains_have_a_floor() -> None:
    module, x, y, reference = example("norms")
    with torch.no_grad():
        for one in (module, reference.module):
            one.norm1.weight[0] = 1e-3
            one.norm2.weight[0] = -1e-4
            one.norm1.bias[0] = one.norm2.bias[0] = 1e-3
    run_both(module, unit(module, x, "momentum", refresh_interval=4), reference, x, y, 6)


def test_parameter_groups_have_rates_and_momentum_of_their_own() -> None:
    module, x, y, reference = example("mlp")

    def make(_: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(
            [
                {"params": [*module[0].parameters()], "lr": 0.02, "momentum": 0.0, "weight_decay": 0.1},
                {"params": [module[2].weight, module[4].bias], "momentum": 0.5, "nesterov": True},
                {"params": [module[4].weight, module[2].bias], "dampening": 0.3},
            ],
            lr=0.05,
            momentum=0.9,
        )

    run_both(module, unit(module, x, make, refresh_interval=4), reference, x, y, 7)


def test_a_schedule_may_change_rate_and_momentum() -> None:
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, "nesterov", refresh_interval=7)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, base_momentum=0.5)
    seen = set()

    def advance(step: int) -> None:
        scheduler.step()
        seen.add(optimizer.param_groups[0]["momentum"])

    run_both(module, optimizer, reference, x, y, 10, advance)
    assert len(seen) == 10


@examples(10, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    base=st.sampled_from(sorted(WITH_FORMULAS)),
    refresh_interval=st.sampled_from([1, 3, None]),
)
def test_steps_of_any_perceptron_are_those_of_the_formulas(
    seed: int, widths: list[int], outputs: int, bias: bool, base: str, refresh_interval: int | None
) -> None:
    torch.manual_seed(seed)
    widths[0] = max(widths[0], 2)  # some row has more than one element
    module = mlp(*widths, outputs, bias=bias, activation=nn.LeakyReLU).double()
    x, y = data((widths[0],), outputs, regression=True, size=32)
    last = 2 * (len(widths) - 1)
    streams = {str(k): str(k) if k < last else None for k in range(0, last + 1, 2)}
    reference = Reference(copy.deepcopy(module), x, streams)
    run_both(module, unit(module, x, base, refresh_interval=refresh_interval), reference, x, y, 6)


# What the learning rate is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "lr"), [(2, 0.1), (4, 1e-3), (7, 0.03), (20, 0.1), (64, 1e-3)])
def test_the_rate_of_sgd_is_the_relative_length_of_a_step(width: int, lr: float) -> None:
    torch.manual_seed(0)
    module = mlp(5, width, width, 3, activation=nn.LeakyReLU).double()
    x, y = data((5,), 3, regression=True)
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    train(module, unit(module, x, lambda params: SGD(params, lr=lr)), x, 1e3 * y, range(1))
    for name, p in module.named_parameters():
        if name.endswith("weight"):
            before = start.get_parameter(name)
            ratio = (p - before).norm(dim=1) / before.norm(dim=1)
            torch.testing.assert_close(ratio, torch.full_like(ratio, lr), rtol=1e-11, atol=0)
        else:  # a tenth of the norm of the weights into the same unit, or of the typical norm
            weight = start.get_parameter(name.replace("bias", "weight"))
            typical = torch.stack([q.square().sum(1).mean().log() for q in start.parameters() if q.ndim == 2])
            norm = (0.5 * typical.median()).exp() if name.startswith("4") else weight.norm(dim=1)
            moved = (p - start.get_parameter(name)).abs()
            torch.testing.assert_close(moved, (0.1 * lr * norm).expand_as(moved), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.8, 0.6)])
def test_the_rate_is_the_length_of_a_step_between_constant_and_independent_gradients(
    momentum: float, dampening: float
) -> None:
    """Both are wrong by the same factor, in opposite directions, which is 1 without momentum."""
    lengths = {}
    for independent in (False, True):
        module, x, _ = problem(4, 500, 8, 3)
        optimizer = unit(
            module, x, lambda params: SGD(params, lr=1e-3, momentum=momentum, dampening=dampening), check=None
        )
        only_refresh(optimizer)
        magnitude = module[2].weight.detach().norm(dim=1)
        ratios = []
        generator = torch.Generator().manual_seed(0)
        for step in range(200):
            if independent or step == 0:
                gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()]
            before = module[2].weight.detach().clone()
            for p, gradient in zip(module.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
            ratios.append((module[2].weight.detach() - before).norm(dim=1) / magnitude)
        lengths[independent] = torch.stack(ratios[100:]).square().mean().sqrt() / 1e-3
    factor = ((1 + momentum) / (1 - momentum)) ** 0.25
    assert lengths[False] == pytest.approx(factor, rel=1e-5)
    assert lengths[True] == pytest.approx(1 / factor, rel=0.05)  # clipping, and the spread of random numbers


@pytest.mark.parametrize("base", ["sgd", "momentum", "amsgrad"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_the_loss_does_not_matter(base: str, factor: float) -> None:
    module, x, y = problem(4, 6, 5, 3)
    other = copy.deepcopy(module)
    pair = []
    for one in (module, other):
        plain = WITH_FORMULAS[base](one.parameters())
        for options in plain.param_groups:
            options["weight_decay"] = 0.0
            if "eps" in options:
                options["eps"] = 1e-40
        pair.append(EquivalentClassOptimizer(plain, scaling_group(one, x), rule="unit", refresh_interval=7))
    for step in range(20):
        for one, optimizer, times in zip((module, other), pair, (1.0, factor), strict=True):
            optimizer.zero_grad()
            (times * loss_of(one, *batches(x, y, step))).backward()
            optimizer.step()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_maximizing_is_minimizing_the_opposite() -> None:
    for make in (SGD, AdamW):
        module, x, y = problem(4, 6, 5, 3)
        other = copy.deepcopy(module)
        first = unit(module, x, lambda params, make=make: make(params, lr=0.02), refresh_interval=5)
        second = unit(other, x, lambda params, make=make: make(params, lr=0.02, maximize=True), refresh_interval=5)
        for step in range(12):
            for one, optimizer, sign in ((module, first, 1), (other, second, -1)):
                optimizer.zero_grad()
                (sign * loss_of(one, *batches(x, y, step))).backward()
                optimizer.step()
        assert same_bits(module, other)
