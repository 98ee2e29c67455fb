"""The rule "unit" where things go wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import ResidualMLP, mlp
from tests.optim.bases import WITH_FORMULAS
from tests.optim.training import batches, loss_of, only_refresh, problem, put_back, train, weights_of
from tests.optim.unit_rule import Make, agree, data, example, finite, run_both, saved, unit
from tests.selection import few


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_zero_residual_branch_learns(base: str) -> None:
    torch.manual_seed(0)
    module = ResidualMLP().double()
    nn.init.zeros_(module.down.weight)
    nn.init.zeros_(module.down.bias)
    x, y = data((3,), 2, regression=True)
    optimizer = unit(module, x, base, refresh_interval=10)
    losses = train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 5
    assert bool((module.down.weight != 0).any())
    losses += train(module, optimizer, x, y, range(1, 80))
    assert optimizer.statistics().dormant_units == 0
    assert finite(module)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_zero_last_layer_learns(base: str) -> None:
    torch.manual_seed(0)
    module = mlp(6, 8, 8, 3).double()
    nn.init.zeros_(module[4].weight)
    nn.init.zeros_(module[4].bias)
    x, y = data((6,), 3, regression=False)
    optimizer = unit(module, x, base, refresh_interval=20)
    losses = train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().clipped_share == 0
    assert optimizer.statistics().dormant_units == 16
    losses += train(module, optimizer, x, y, range(1, 80))
    assert optimizer.statistics().dormant_units == 0
    assert finite(module)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("base", ["sgd", "momentum", "amsgrad"])
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_without_a_gradient_is_left_alone(base: str, early: bool) -> None:
    """Also when it had gradients before."""
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, base, refresh_interval=500)
    if not early:
        run_both(module, optimizer, reference, x, y, 3)
    else:
        only_refresh(optimizer)
        reference.refresh()
    names = {id(p): name for name, p in module.named_parameters()}
    before, rule = weights_of(module), saved(optimizer)
    for step in range(3, 6):
        for one in (module, reference.module):
            one.zero_grad()
            loss_of(one, *batches(x, y, step)).backward()
            one[2].weight.grad = None
            one[0].bias.grad = None
        options = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        reference.step(optimizer.optimizer, options)
        optimizer.step()
        agree(module, optimizer, reference)
    now = saved(optimizer)
    biases_first = sorted(names.values(), key=lambda name: "weight" in name)
    counts = dict(zip(biases_first, torch.arange(6 + 5 + 3 + 6 + 5 + 3).split([6, 5, 3, 6, 5, 3]), strict=True))
    for name, rows in counts.items():
        still = name in ("2.weight", "0.bias")
        for key in ("second", "seen"):
            assert torch.equal(now[key][rows], rule[key][rows]) == still, name
        assert torch.equal(module.get_parameter(name), before[name]) == still, name


def test_no_moments_move_where_gradients_are_missing_whatever_another_optimizer_trains() -> None:
    module, x, y = problem(4, 6, 5, 3)
    group = scaling_group(module, x)
    own = [*module[0].parameters(), module[2].weight]
    first = EquivalentClassOptimizer(SGD(own, lr=0.05), group, rule="unit")
    train(module, first, x, y, range(3))
    before = saved(first)
    module.zero_grad()
    loss_of(module, *batches(x, y, 3)).backward()
    module[2].weight.grad = None
    first.step()  # the other parameters have gradients, but are not among its own
    after = saved(first)
    missing = slice(12, 17)
    assert torch.equal(after["second"][missing], before["second"][missing])
    assert torch.equal(after["seen"][missing], before["seen"][missing])
    assert not torch.equal(after["second"][:12], before["second"][:12])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", few([math.nan, math.inf, -math.inf], [math.inf]))
@pytest.mark.parametrize("first", few([True, False], [False]))
def test_a_gradient_that_is_not_finite_spoils_its_own_row_for_one_step(base: str, bad: float, first: bool) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base, refresh_interval=None)
    before = train(module, optimizer, x, y, range(0 if first else 8))
    good = copy.deepcopy((module.state_dict(), optimizer.optimizer.state_dict()))
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 8)).backward()
    module[2].weight.grad[1, 2] = bad
    optimizer.step()
    assert not bool(module[2].weight[1, 2].isfinite())
    others = [p for p in module.parameters() if p is not module[2].weight]
    assert all(bool(p.isfinite().all()) for p in others)
    assert bool(module[2].weight[[0, 2, 3, 4]].isfinite().all())
    for key in ("second", "seen", "rho" if base == "sgd" else "own"):
        assert bool(saved(optimizer)[key].isfinite().all()), key
    assert int((saved(optimizer)["seen"] == 0).sum()) == first  # the row has taken no note of it

    for step in range(9, 12):  # other parameters, while that one is spoilt
        for p in module.parameters():
            p.grad = torch.randn_like(p) * 0.01
        module[2].weight.grad[1] = math.nan
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in others), step

    module.load_state_dict(good[0])
    optimizer.optimizer.load_state_dict(good[1])
    losses = train(module, optimizer, x, y, range(8, 48))
    assert finite(module)
    assert sum(losses[-4:]) < sum(before[:4] or losses[:4])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", few([math.nan, math.inf], [math.nan]))
def test_a_refresh_at_a_weight_that_is_not_finite_spoils_no_other_parameter(base: str, bad: float) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base, refresh_interval=None, check=None)
    train(module, optimizer, x, y, range(8))
    good = copy.deepcopy((module.state_dict(), optimizer.optimizer.state_dict()))
    with torch.no_grad():
        module[2].weight[1, 2] = bad
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 0.01
    optimizer.refresh()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for name, p in module.named_parameters() if name != "2.weight")

    module.load_state_dict(good[0])
    optimizer.optimizer.load_state_dict(good[1])
    train(module, optimizer, x, y, range(8, 12))
    assert finite(module)
    optimizer.refresh()
    losses = train(module, optimizer, x, y, range(8, 48))
    assert finite(module)
    assert sum(losses[-4:]) < sum(losses[:4])


class Failing(SGD):
    """Fails when told so."""

    fail = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.fail:
            raise MemoryError("no room for the momentum")
        return super().step(closure)


def test_a_step_that_fails_leaves_everything_as_it_was() -> None:
    module, x, y = problem(4, 6, 5, 3)
    base = Failing(module.parameters(), lr=0.05, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule="unit")
    train(module, optimizer, x, y, range(3))
    before, rule = weights_of(module), saved(optimizer)
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 3)).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    base.fail = True
    with pytest.raises(MemoryError):
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-15, atol=0)
        assert put_back(p.grad, gradients[name])
    for key in ("rho", "reference", "second", "seen"):
        assert torch.equal(saved(optimizer)[key], rule[key])
    base.fail = False
    optimizer.step()
    assert not torch.equal(saved(optimizer)["second"], rule["second"])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", few([torch.float32, torch.float64], [torch.float32]))
def test_a_unit_without_gradients_stays_finite_and_where_it_is(base: str, dtype: torch.dtype) -> None:
    module, x, y = problem(4, 6, 5, 3, dtype=dtype)
    make: Make = (
        (lambda params: SGD(params, lr=0.05, momentum=0.9))
        if base == "momentum"
        else (lambda params: AdamW(params, lr=0.01, weight_decay=0.0))
    )
    optimizer = unit(module, x, make, refresh_interval=None)
    only_refresh(optimizer)
    before = module[0].weight[2].detach().clone()
    alive = torch.arange(6) != 2
    hooks = [
        module[0].weight.register_hook(lambda g: g * alive[:, None]),
        module[0].bias.register_hook(lambda g: g * alive),
    ]
    train(module, optimizer, x, y, range(100))
    torch.testing.assert_close(module[0].weight[2].detach(), before, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert finite(module)
    assert all(bool(value.isfinite().all()) for value in optimizer.state[module[0].weight].values())
    for hook in hooks:
        hook.remove()
    # It comes to life, and is not thrown out of the network by it.
    train(module, optimizer, x, y, range(100, 101))
    moved = float((module[0].weight[2].detach() - before).norm() / before.norm())
    assert 0 < moved <= (0.0105 if base == "momentum" else 0.1)  # 0.209 lr with a momentum of 0.9
    train(module, optimizer, x, y, range(101, 110))
    assert finite(module)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("size", few([1.0, 1e-6, 1e-12], [1e-6]))
def test_a_unit_that_comes_to_life_moves_by_the_rate_at_most(weight_decay: float, size: float) -> None:
    """However small its gradient is, and whatever weight decay has left in its momentum; and by less if it is faint."""
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(
        module, x, lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=weight_decay), refresh_interval=None
    )
    only_refresh(optimizer)
    factor = torch.ones(6, 1, dtype=torch.float64)
    factor[2] = 0.0
    module[0].weight.register_hook(lambda g: g * factor)
    train(module, optimizer, x, y, range(30))
    before = module[0].weight[2].detach().clone()
    factor[2] = size
    train(module, optimizer, x, y, range(30, 31))
    moved = float((module[0].weight[2].detach() - before).norm() / before.norm())
    assert moved < 0.0105 + 0.05 * weight_decay * 10  # 0.209 lr with a momentum of 0.9
    if size == 1.0:
        assert moved > 0.001
    elif not weight_decay:
        assert moved < 0.001


@pytest.mark.parametrize("size", few([1.0, 1e-3, 1e-8, 0.0], [1e-8]))
@pytest.mark.parametrize("source", ["plain", "path", "zero layer"])
def test_momentum_from_before_the_first_step_throws_no_unit_out_of_the_network(source: str, size: float) -> None:
    """When a row has but a small gradient at its first step, or none."""
    module, x, y = problem(4, 6, 5, 3)
    make: Make = lambda params: SGD(params, lr=0.02, momentum=0.9)  # noqa: E731
    if source == "plain":
        before: Optimizer = make(module.parameters())
    elif source == "path":
        before = EquivalentClassOptimizer(make(module.parameters()), scaling_group(module, x), rule="path")
    else:
        with torch.no_grad():
            module[4].weight.zero_()
        before = unit(module, x, make, refresh_interval=None)
    train(module, before, x, y, range(20))
    optimizer = unit(module, x, make, refresh_interval=None)
    optimizer.load_state_dict(before.state_dict())
    only_refresh(optimizer)
    weights = weights_of(module)
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 20)).backward()
    module[2].weight.grad[1] *= size
    optimizer.step()
    moved = (module[2].weight.detach() - weights["2.weight"])[1].norm() / weights["2.weight"][1].norm()
    assert float(moved) < 0.1  # five times the rate


class Gain(nn.Module):
    """Parameters without an axis, and of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 3, activation=nn.PReLU)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.net(x) + self.shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_an_axis_take_a_tenth_of_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Gain().to(dtype)
    x, y = data((4,), 3, regression=True)
    x, y = x.to(dtype), y.to(dtype)
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    optimizer = unit(module, x, lambda params: SGD(params, lr=0.05))
    losses = train(module, optimizer, x, y, range(1))
    # The gain makes one unit of all outputs, so that the weights, and biases, that lead into them are one row each.
    hidden, outputs = (p.detach().square() for p in start.parameters() if p.ndim == 2)
    biases = start.net[-1].bias.detach().square()
    floor = 0.1 * float(
        torch.stack([hidden.sum(1).mean(), outputs.sum(), biases.sum()]).median().sqrt()
    )  # typical norm
    for name, length in (("gain", None), ("net.1.weight", None), ("shift", 10 * floor)):
        before, now = start.get_parameter(name).detach(), module.get_parameter(name).detach()
        expected = max(abs(float(before)), floor) if length is None else length
        assert abs(float(now - before)) == pytest.approx(0.005 * expected, rel=1e3 * torch.finfo(dtype).eps)
    losses += train(module, optimizer, x, y, range(1, 64))
    assert finite(module)
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_train(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = mlp(4, 16, 16, 3)
    x = torch.randn(64, 4)
    y = 0.3 * torch.randn(64, 3) + x[:, :3]
    module, x, y = module.to(dtype), x.to(dtype), y.to(dtype)
    losses = train(module, unit(module, x, "momentum", refresh_interval=20), x, y, range(64))
    assert finite(module)
    assert all(p.dtype == dtype for p in module.parameters())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_two_optimizers_of_one_module_train_what_is_theirs() -> None:
    module, x, y = problem(4, 6, 5, 7, 3)
    group = scaling_group(module, x)
    parts = [*module[0].parameters(), *module[2].parameters()], [*module[4].parameters(), *module[6].parameters()]
    first = EquivalentClassOptimizer(SGD(parts[0], lr=0.05, momentum=0.9), group, rule="unit", refresh_interval=5)
    second = EquivalentClassOptimizer(AdamW(parts[1], lr=0.01), group, rule="unit", refresh_interval=7)
    # One after the other as they come: each leaves the parameters and gradients of the other alone but for balancing.
    losses = []
    for step in range(64):
        module.zero_grad()
        loss = loss_of(module, *batches(x, y, step))
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer, others in ((first, parts[1]), (second, parts[0])):
            before = [(p.detach().clone(), p.grad.clone()) for p in others]
            optimizer.step()
            for p, (weight, gradient) in zip(others, before, strict=True):
                assert torch.equal(p, weight)
                assert torch.equal(p.grad, gradient)
    assert finite(module)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert len(saved(first)["rho"]) == 6 + 6 + 5 + 5
    assert len(saved(second)["own"]) == 7 + 7 + 3 + 3


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("late", [False, True])
def test_frozen_parameters_stay(base: str, late: bool) -> None:
    module, x, y = problem(4, 6, 5, 7, 3)
    if late:
        optimizer = unit(module, x, base, refresh_interval=50)
        train(module, optimizer, x, y, range(4))
        module[2].requires_grad_(False)
    else:
        module[2].requires_grad_(False)
        optimizer = unit(
            module, x, lambda params: WITH_FORMULAS[base]([p for p in params if p.requires_grad]), refresh_interval=5
        )
    before = weights_of(module)
    losses = train(module, optimizer, x, y, range(4, 44))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("2."), name
    assert finite(module)
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_group_whose_rate_is_zero_stays() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = unit(
        module,
        x,
        lambda params: SGD([{"params": module[0].parameters(), "lr": 0.0}, {"params": module[2].parameters()}], lr=0.1),
    )
    only_refresh(optimizer)
    before = weights_of(module)
    train(module, optimizer, x, y, range(10))
    for name, p in module.named_parameters():
        assert torch.allclose(p, before[name], rtol=1e-14, atol=0) == name.startswith("0."), name


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 0.9, "dampening": 1.0}])
def test_momentum_without_an_average_leaves_the_weights_finite(options: dict[str, float]) -> None:
    """SGD takes them; there is no mean of gradients then."""
    module, x, y = problem(4, 6, 3)
    optimizer = unit(module, x, lambda params: SGD(params, lr=1e-3, **options))
    train(module, optimizer, x, y, range(4))
    assert finite(module)
