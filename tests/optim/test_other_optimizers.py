"""Optimizers of all forms are run, hooks are called once, and what cannot be run is refused and undone."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer, RMSprop
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, scaling_group
from tests.networks import mlp
from tests.optim.other_optimizers import FORMS, Bare, Lookahead, Noisy, Sharpness
from tests.optim.training import RULES, batches, distance, loss_of, problem, rescaled, same_bits, train, weights_of
from tests.selection import few


def by_closure(module: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, steps: range) -> list[float]:
    """Train with closures, as Lightning does."""
    losses = []
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module, *batches(x, y, step))
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        optimizer.step(closure)
    return losses


def run(form: str, module: nn.Module, x: Tensor, rule: str) -> EquivalentClassOptimizer:
    base = FORMS[form](list(module.parameters()))
    return EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=3)


# Forms ----------------------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("form", few(FORMS, ["bare", "lookahead", "strict"]))
def test_what_an_optimizer_of_any_form_does_depends_on_the_class_alone(form: str, rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    other = rescaled(module, x)
    losses = []
    for one in (module, other):
        optimizer = run(form, one, x, rule)
        losses = by_closure(one, optimizer, x, y, range(10))
        assert len(optimizer.state_dict()) > 1
        assert form.split()[0] in repr(optimizer).lower()
    assert len(losses) == 10
    assert sum(losses[8:]) < sum(losses[:2])  # on the same batches
    assert distance(module, other, x) < 1e-9


@RULES
@pytest.mark.parametrize("form", few(FORMS, ["lookahead"]))
def test_training_goes_on_from_the_state_of_an_optimizer_of_any_form(form: str, rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = run(form, module, x, rule)
    by_closure(module, optimizer, x, y, range(5))
    other, state = copy.deepcopy(module), copy.deepcopy(optimizer.state_dict())
    resumed = run(form, other, x, rule)
    resumed.load_state_dict(state)
    by_closure(module, optimizer, x, y, range(5, 12))
    by_closure(other, resumed, x, y, range(5, 12))
    assert distance(module, other, x) < 1e-12


def test_the_state_of_an_optimizer_within_another_is_rescaled() -> None:
    module, x, y = problem(4, 6, 3)
    base = Lookahead(SGD(module.parameters(), lr=0.0, momentum=0.9))
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(base, group, refresh_interval=None)
    train(module, optimizer, x, y, range(2))
    p = module[0].weight
    held = {name: value.clone() for name, value in {**base.slow[p], **base.inner.state[p]}.items()}
    group.act_(torch.full((6,), 0.5, dtype=torch.float64))  # which the refresh takes back
    optimizer.refresh()
    optimizer.zero_grad()
    optimizer.step()
    now = {**base.slow[p], **base.inner.state[p]}
    for name, power in {"slow_params": -1, "momentum_buffer": 1}.items():
        torch.testing.assert_close(now[name], held[name] * math.exp(0.5) ** power)


@RULES
@pytest.mark.parametrize("steps_before", [0, 4])
def test_sgd_within_another_takes_the_steps_of_sgd(steps_before: int, rule: str) -> None:
    """Bit for bit, also with momentum from before."""
    modules = []
    for wrap in (lambda base: base, Bare):
        module, x, y = problem(4, 6, 5, 3)
        sgd = SGD(module.parameters(), lr=0.05, momentum=0.9, dampening=0.3)
        train(module, sgd, x, y, range(steps_before))
        group = scaling_group(module, x)
        optimizer = EquivalentClassOptimizer(wrap(sgd), group, rule=rule, refresh_interval=3, implementation="wrapped")
        train(module, optimizer, x, y, range(8))
        modules.append(module)
    assert same_bits(*modules)


def test_lookahead_pulls_the_weights_that_sgd_has_reached() -> None:
    """By hand: every second step of SGD is followed by the way back to the slow weights, half of it."""
    module, x, y = problem(4, 6, 5, 3)
    other = copy.deepcopy(module)
    sgd = SGD(other.parameters(), lr=0.05, momentum=0.9)
    options = {"representative": "current", "refresh_interval": None}
    looks = EquivalentClassOptimizer(
        Lookahead(SGD(module.parameters(), lr=0.05, momentum=0.9)), scaling_group(module, x), **options
    )
    alone = EquivalentClassOptimizer(sgd, scaling_group(other, x), **options)
    slow = weights_of(other)
    for step in range(6):
        train(module, looks, x, y, range(step, step + 1))
        train(other, alone, x, y, range(step, step + 1))
        if step % 2 == 1:
            for name, p in other.named_parameters():
                p.data.copy_(slow[name].lerp_(p.detach(), 0.5))
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["bare", "lookahead"])
def test_steps_of_sgd_within_another_do_not_depend_on_the_size_of_the_loss(form: str) -> None:
    modules = []
    for factor in (1.0, 2.0**-10):
        module, x, y = problem(4, 6, 5, 3)
        optimizer = run(form, module, x, "unit")
        for step in range(10):
            optimizer.zero_grad()
            (factor * loss_of(module, *batches(x, y, step))).backward()
            optimizer.step()
        modules.append(module)
    assert distance(*modules, x) < 1e-10
    assert distance(module, problem(4, 6, 5, 3)[0], x) > 1e-2


# Arguments and results ------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("freedoms", [True, False])
def test_arguments_and_results_pass_through(freedoms: bool, rule: str) -> None:
    module = mlp(4, 6, 3, activation=nn.ReLU if freedoms else nn.Tanh).double()
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    optimizer = EquivalentClassOptimizer(Noisy(module.parameters(), lr=0.1), scaling_group(module, x), rule=rule)
    for _ in range(2):
        loss_of(module, x, y).backward()
        assert optimizer.step(noise=0.5) == {"scale": 1.0, "noise": 0.5}
        assert optimizer.step(None, 2.0) == {"scale": 2.0, "noise": 0.0}
        assert optimizer.step(lambda: 3, 2.0, noise=1.0) == {"scale": 2.0, "noise": 1.0}
        assert optimizer.step(closure=lambda: 3, scale=4.0) == {"scale": 4.0, "noise": 0.0}
    optimizer.zero_grad()
    assert optimizer.step(scale=5.0) == {"scale": 5.0, "noise": 0.0}


def test_a_step_with_arguments_is_not_fused() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), scaling_group(module, x))
    train(module, optimizer, x, y, range(2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise'"):
        optimizer.step(noise=1.0)
    with pytest.raises(TypeError):
        optimizer.step("no closure")


# Closures in the middle of a step -------------------------------------------------------------------------------------

WAYS = {
    "moves": {},
    "moves data": {"through_data": True, "zero_grad": None},
    "clears": {"through_data": True, "zero_grad": "none"},
    "zeroes": {"zero_grad": "zero"},
}


@RULES
@pytest.mark.parametrize("way", few(WAYS, ["moves data", "zeroes"]))
def test_an_optimizer_that_needs_gradients_at_other_weights_is_refused_and_undone(way: str, rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    rescaled_ = rescaled(module, x)
    base = Sharpness(rescaled_.parameters(), SGD, **WAYS[way], lr=0.1, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(rescaled_, x), rule=rule)
    loss_of(rescaled_, x, y).backward()
    before, gradients = weights_of(rescaled_), [p.grad.clone() for p in rescaled_.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Sharpness\(model.parameters\(\), base_optimizer=ECSGD, ...\)"):
            optimizer.step(lambda: None)
        assert all(torch.equal(p, before[name]) for name, p in rescaled_.named_parameters())
        assert all(torch.equal(p.grad, g) for p, g in zip(rescaled_.parameters(), gradients, strict=True))
        assert not any(base.state.values())
        assert "count" not in base.param_groups[0]
        assert optimizer.statistics() is None


def test_without_freedoms_an_optimizer_may_call_its_closure_at_other_weights() -> None:
    torch.manual_seed(0)
    module = mlp(4, 6, 3, activation=nn.Tanh).double()
    plain = copy.deepcopy(module)
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    base = Sharpness(module.parameters(), SGD, lr=0.1, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), refresh_interval=3)
    other = Sharpness(plain.parameters(), SGD, lr=0.1, momentum=0.9)
    for step in range(5):
        by_closure(module, optimizer, x, y, range(step, step + 1))
        other.zero_grad()
        loss_of(plain, *batches(x, y, step)).backward()  # which our step does first
        by_closure(plain, other, x, y, range(step, step + 1))
    assert same_bits(module, plain)


@pytest.mark.parametrize("inner", [ECSGD, ECAdamW])
def test_it_may_run_an_equivalent_class_optimizer_instead(inner: Any) -> None:
    module, x, y = problem(4, 16, 3)
    optimizer = Sharpness(module.parameters(), inner, lr=0.01)
    optimizer.base_optimizer.bind(scaling_group(module, x))
    losses = []
    for step in range(30):
        losses.append(float(loss_of(module, *batches(x, y, step)).detach()))
        loss_of(module, *batches(x, y, step)).backward()
        by_closure(module, optimizer, x, y, range(step, step + 1))
    assert sum(losses[-4:]) < sum(losses[:4])
    assert optimizer.base_optimizer.statistics() is not None
    with pytest.raises(TypeError, match="Sharpness runs an EquivalentClassOptimizer already"):
        EquivalentClassOptimizer(optimizer, scaling_group(module, x))


# Hooks ----------------------------------------------------------------------------------------------------------------

Make = Callable[[list[Tensor]], Optimizer]
HOOKED: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "rmsprop": lambda params: RMSprop(params, lr=0.01),
    "lookahead": FORMS["lookahead"],
}


@RULES
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_all_optimizers_run_once_and_see_weights(name: str, rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(HOOKED[name](list(module.parameters())), scaling_group(module, x), rule=rule)
    seen: list[tuple[Optimizer, dict[str, Tensor]]] = []
    handles = [
        register(lambda optimizer, *_: seen.append((optimizer, weights_of(module))))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        for _ in range(2):
            loss_of(module, x, y).backward()
            before = weights_of(module)
            optimizer.step()
            assert [one for one, _ in seen] == [optimizer, optimizer]
            for (_, held), expected in zip(seen, (before, weights_of(module)), strict=True):
                assert all(torch.equal(held[key], expected[key]) for key in expected)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert not seen


class Slow(RMSprop):
    """Waits in the middle of its step until others have stepped."""

    inside, others = threading.Event(), threading.Event()

    def step(self, closure: Any = None) -> Any:
        self.inside.set()
        assert self.others.wait(10)
        return super().step(closure)


def test_hooks_of_all_optimizers_run_on_other_threads_meanwhile() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(Slow(module.parameters(), lr=0.1), scaling_group(module, x))
    other = nn.Linear(2, 2)
    plain = SGD(other.parameters(), lr=0.1)
    seen: list[Optimizer] = []
    hook = seen.append
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: hook(optimizer))
    try:
        loss_of(module, x, y).backward()
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        assert Slow.inside.wait(10)
        plain.step()
        assert seen == [plain]
        Slow.others.set()
        thread.join()
    finally:
        handle.remove()
    assert seen == [plain, optimizer]


def test_the_base_keeps_its_hooks_for_when_it_is_used_alone() -> None:
    module, x, y = problem(4, 6, 3)
    base, seen = SGD(module.parameters(), lr=0.1), []
    base.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    base.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x))
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    train(module, optimizer, x, y, range(2))
    assert seen == [optimizer] * 4
    assert optimizer.state_dict()["note"] == 1
    seen.clear()
    train(module, base, x, y, range(2))
    assert seen == [base] * 4
    assert base.state_dict()["note"] == 1


# Parameters that cannot be rescaled -----------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A perceptron and a filter, whose weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 16, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.net(x)) * self.filter, n=8)


class Marked(Tensor):
    """Stands for any subclass of a tensor that means more than its values."""


class Tagged(nn.Module):
    """A perceptron and a gain that is a tensor of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 16, 8)
        self.gain = nn.Parameter(torch.randn(8).as_subclass(Marked))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.gain.as_subclass(Tensor)


@RULES
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("make", [Spectral, Tagged])
def test_what_cannot_be_rescaled_is_stepped_by_the_base(make: Any, bound: bool, rule: str) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(16, 8)
    (odd,) = [p for name, p in module.named_parameters() if not name.startswith("net")]
    optimizer = ECSGD(module.parameters(), lr=0.1, momentum=0.9, rule=rule)
    if bound:
        optimizer.bind(scaling_group(module, x))
    plain = nn.Parameter(odd.detach().clone())
    reference = SGD([plain], lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(module(x), x).backward()
        plain.grad = odd.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(odd.detach(), plain.detach())
    assert optimizer.group.num_units >= 16
    assert int(optimizer.usable_units().sum()) >= 16
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


class Descends(Optimizer):
    """Plain gradient descent that changes its parameters, or gives them other tensors."""

    def __init__(self, params: Any, lr: float, assigns: bool) -> None:
        super().__init__(params, {"lr": lr})
        self.assigns = assigns

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if self.assigns:
                    p.data = p.data - options["lr"] * p.grad
                else:
                    p.sub_(options["lr"] * p.grad)


@RULES
def test_a_base_that_assigns_data_steps_as_one_that_changes_it(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    twin = copy.deepcopy(module)
    for net, assigns in ((module, True), (twin, False)):
        base = Descends(net.parameters(), 0.05, assigns)
        optimizer = EquivalentClassOptimizer(base, scaling_group(net, x), rule=rule)
        train(net, optimizer, x, y, range(4))
    assert same_bits(module, twin)


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_a_rate_may_be_a_tensor_of_one_element(base: Any) -> None:
    module, x, y = problem(4, 6, 3)
    twin = copy.deepcopy(module)
    for net, lr in ((module, torch.tensor([0.05])), (twin, 0.05)):
        optimizer = EquivalentClassOptimizer(base(net.parameters(), lr=lr), scaling_group(net, x))
        train(net, optimizer, x, y, range(4))
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
