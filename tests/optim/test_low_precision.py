"""Weights of half precision, loss scalers, autocast and sparse gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import mlp
from tests.optim.base_runs import BOUND, error_of, problem, wrap
from tests.optim.bases import BASES, DEFINITIONS, Base, Make
from tests.optim.training import RULES, batches, loss_of, same_bits, train, weights_of
from tests.selection import few

# Low precision --------------------------------------------------------------------------------------------------------


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
#: An eps that float16 can hold: with the usual one the plain optimizers divide zero by zero there.
QUIET: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, lr=0.05),
    "adam": lambda params: optim.Adam(params, lr=0.01, eps=1e-3),
    "adamw": lambda params: optim.AdamW(params, lr=0.01, eps=1e-3, weight_decay=0.0),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], [torch.bfloat16]))
@RULES
@pytest.mark.parametrize("name", few(QUIET, ["sgd", "adamw"]))
def test_weights_of_half_precision_do_not_drift_where_gradients_are_zero(
    name: str, rule: str, dtype: torch.dtype
) -> None:
    module, x, y = problem(Base(QUIET[name]), dtype)
    base = QUIET[name](module.parameters())
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=None)
    train(module, optimizer, x, y, range(4))  # so that no path, and no unit, has a scale of one
    for p in module.parameters():
        p.grad.zero_()
        if "exp_avg" in base.state[p]:
            base.state[p]["exp_avg"].zero_()
    before = copy.deepcopy(module)
    for _ in range(100):
        optimizer.step()
    assert same_bits(module, before)


def displacement(make: Make, rule: str | None, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Where weight matrices start, and how far they move in steps of about two units in the last place of bfloat16."""
    module, x, _ = problem(Base(make), torch.bfloat16, seed)
    module, x = module.to(dtype), x.to(dtype)
    optimizer: Optimizer = make(module.parameters())
    if rule is not None:
        group = scaling_group(module, x)
        optimizer = EquivalentClassOptimizer(
            optimizer, group, rule=rule, refresh_interval=None, representative="current", check=None
        )

    def flat() -> Tensor:
        return torch.cat([p.double().flatten() for p in weights_of(module).values() if p.ndim == 2])

    start = flat()
    torch.manual_seed(seed)
    means = [torch.randn(p.shape) for p in module.parameters()]
    for _ in range(20):
        for p, mean in zip(module.parameters(), means, strict=True):
            p.grad = (mean + 0.3 * torch.randn(p.shape)).bfloat16().to(dtype)
        optimizer.step()
    return start, flat() - start


@pytest.mark.parametrize(
    ("rule", "make", "same_length"),
    [
        ("path", lambda params: optim.SGD(params, lr=0.002), lambda params: optim.SGD(params, lr=0.002)),
        ("unit", lambda params: optim.SGD(params, lr=0.01), lambda params: optim.SGD(params, lr=0.002)),
        ("path", lambda params: optim.Adam(params, lr=0.002), lambda params: optim.Adam(params, lr=0.002)),
        ("unit", lambda params: optim.Adam(params, lr=0.002), lambda params: optim.Adam(params, lr=0.002)),
    ],
)
def test_small_steps_in_bfloat16_go_where_they_go_in_float64(rule: str, make: Make, same_length: Make) -> None:
    """As well as those of the plain base, that round weights once where ours round three times; to neither side."""

    def compare(kind: Make, chosen: str | None) -> tuple[float, float, float]:
        pairs = [
            (displacement(kind, chosen, torch.bfloat16, seed), displacement(kind, chosen, torch.float64, seed)[1])
            for seed in range(2)
        ]
        start = torch.cat([at for (at, _), _ in pairs])
        exact = torch.cat([way for _, way in pairs])
        off = torch.cat([way for (_, way), _ in pairs]) - exact
        size = exact.abs().mean()
        return tuple(float(value.mean() / size) for value in (off.abs(), off * exact.sign(), off * start.sign()))

    error, along, outward = compare(make, rule)
    assert error < 3 * compare(same_length, None)[0]
    assert abs(along) < 0.08
    assert abs(outward) < 0.08


def everything(module: nn.Module, optimizer: EquivalentClassOptimizer) -> Any:
    return copy.deepcopy((module.state_dict(), optimizer.state_dict()))


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "asgd", "rprop"])
def test_a_step_that_a_scaler_skips_changes_no_bit(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = 0
    for step in range(9):
        optimizer.zero_grad()
        scaler.scale(loss_of(module, *batches(x, y, step))).backward()
        bad = step in (0, 3, 5)  # before the first step, when a refresh is due, and between two
        if bad:
            module[2].weight.grad[1, 2] = torch.inf
        before, scale = everything(module, optimizer), scaler.get_scale()
        if step % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            assert_same(before, everything(module, optimizer))
            skipped += 1
        else:
            assert not torch.equal(module[0].weight, before[0]["0.weight"])
    assert skipped == 3


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "fused", "asgd"])
def test_a_scaler_that_skips_no_step_makes_no_difference(name: str, rule: str) -> None:
    modules = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), None):
        module, x, y = problem(BASES["adam"], torch.float32)
        if name == "fused":  # the plain optimizer unscales gradients itself
            base = optim.AdamW(module.parameters(), lr=0.01, fused=True)
            optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=3)
        else:
            optimizer = wrap(name, module, x, rule)
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(module, *batches(x, y, step))
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None and step % 2:
                scaler.unscale_(optimizer)
            if step % 2:
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        modules.append(module)
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@RULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_under_autocast_weights_of_float32_move_as_by_definition(name: str, dtype: torch.dtype, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule, max_path_ratio=None)
    exact = DEFINITIONS[rule](BASES[name], copy.deepcopy(module).double(), x.double())
    for step in range(5):
        optimizer.zero_grad()
        rows, targets = batches(x, y, step)
        with torch.autocast("cpu", dtype=dtype):
            output = module(rows)
        assert output.dtype == dtype
        (output.float() - targets).square().mean().backward()
        gradients = {key: p.grad.double() for key, p in module.named_parameters()}
        optimizer.step()
        exact.step(gradients, refresh=step % 3 == 0)
        assert error_of(module, exact) < BOUND[torch.float32]
        assert all(p.dtype == torch.float32 for p in module.parameters())


# Sparse gradients -----------------------------------------------------------------------------------------------------


def with_embedding() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 4, sparse=True), *mlp(4, 6, 3)).double()
    return module, torch.randint(0, 7, (64,)), torch.randn(64, 3, dtype=torch.float64)


@RULES
@pytest.mark.parametrize("kind", ["one_group", "two_groups"])
def test_an_embedding_with_sparse_gradients_takes_the_steps_of_the_plain_base(kind: str, rule: str) -> None:
    module, x, y = with_embedding()
    groups = {
        "one_group": list(module.parameters()),
        "two_groups": [{"params": [module[0].weight], "lr": 0.1}, {"params": list(module[1:].parameters())}],
    }
    base = optim.SGD(groups[kind], lr=0.1)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=3)
    assert optimizer.group.num_units == 6
    for step in range(7):
        optimizer.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        gradient = module[0].weight.grad
        assert gradient.is_sparse
        expected = nn.Parameter(module[0].weight.detach().clone())
        expected.grad = gradient.clone()
        optim.SGD([expected], lr=0.1).step()
        hidden = module[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(module[0].weight, expected)
        assert module[0].weight.grad is gradient
        assert not torch.equal(module[1].weight, hidden)


@RULES
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_embedding_may_have_sparse_adam_beside_the_optimizer_of_the_rest(wrapped: bool, rule: str) -> None:
    module, x, y = with_embedding()
    scaling_group(module, x).balance_()
    twin = nn.Parameter(module[0].weight.detach().clone())
    plain = optim.SparseAdam([twin], lr=0.05)
    sparse: Optimizer = optim.SparseAdam([module[0].weight], lr=0.05)
    if wrapped:
        sparse = EquivalentClassOptimizer(sparse, scaling_group(module, x), rule=rule, refresh_interval=2)
    rest = EquivalentClassOptimizer(
        optim.AdamW(module[1:].parameters(), lr=0.01), scaling_group(module, x), rule=rule, refresh_interval=3
    )
    for step in range(5):
        module.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        twin.grad = module[0].weight.grad.clone()
        before = weights_of(module)
        for optimizer in (sparse, rest, plain):
            optimizer.step()
        assert torch.equal(module[0].weight, twin)
        assert all(not torch.equal(p, before[key]) for key, p in module.named_parameters())
    assert int(rest.usable_units().sum()) == 6
