"""Numbers at the edge: parameters without elements, weights of zero, numbers that overflow, and types that change."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_ecopt import (
    EquivalentClassDistance,
    EquivalentClassOptimizer,
    PathNorm,
    ScalingGroup,
    UnitImbalance,
    scaling_group,
)
from lightning_ecopt.common.signals import uninterrupted
from lightning_ecopt.kernels.choose import Implementation
from lightning_ecopt.optim import stepper
from lightning_ecopt.symmetry.report import print_report
from tests.networks import mlp
from tests.optim.training import RULES, loss_of, train
from tests.selection import everything, few, pairwise

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
BASES = pytest.mark.parametrize("name", few(MAKE, ["adamw"]))
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


@pytest.mark.parametrize(
    ("kind", "name", "rule", "form"),
    few(pairwise(EMPTY, MAKE, ["unit", "path"], ["wrapped", "eager", "compiled"]), 8),
)
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
    plain = copy.deepcopy(start)
    train(plain, MAKE[name]([*plain.parameters()]), x, y, range(5))
    for p, q, r in zip(module.parameters(), start.parameters(), plain.parameters(), strict=True):
        assert torch.equal(r, q) or not torch.equal(p, q)  # some get no gradient
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, optimizer, x, y, range(2))
    for unit in range(group.num_units):
        group.describe(unit)
    print_report(group.overview(optimizer.usable_units()))
    imbalance, distance, norm = UnitImbalance(), EquivalentClassDistance(), PathNorm()
    imbalance.update(group)
    distance.update(module, start, group)
    norm.update(module, x)
    assert all(bool(metric.compute().isfinite()) for metric in (imbalance, distance, norm))


def test_parameters_without_elements_do_not_keep_a_step_from_being_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    take = stepper.FusedStep.take
    monkeypatch.setattr(stepper.FusedStep, "take", lambda *args: (steps.append(1), take(*args))[1])
    module, x = EMPTY["table"](), torch.randn(8, 4)
    base = optim.AdamW(module.parameters(), lr=0.01)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), implementation="eager")
    train(module, optimizer, x, torch.zeros(8, 1), range(3))
    assert len(steps) == 2  # the base's own step makes the state


# Weights of zero ------------------------------------------------------------------------------------------------------


@FORMS
@RULES
@BASES
@pytest.mark.parametrize("layers", few(["0", "2", "4", "0 2 4"], ["0 2 4"]))
@pytest.mark.parametrize("own", [False, True])
def test_layers_of_zeros_have_finite_steps(layers: str, own: bool, name: str, rule: str, form: Implementation) -> None:
    """In parameter groups of their own, or in optimizers of their own."""
    torch.manual_seed(0)
    module, x, y = mlp(6, 5, 5, 3), torch.randn(8, 6), torch.arange(8) % 3
    for k in map(int, layers.split()):
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
@pytest.mark.parametrize("kind", few(SPOILT, ["squares_overflow"]))
def test_gradients_that_overflow_do_the_same_in_all_implementations(
    kind: str, name: str, rule: str, form: Implementation
) -> None:
    """Where the base, which is wrapped, leaves a finite weight, the fused step leaves the same."""
    if kind == "sums_overflow" and rule == "path":
        pytest.skip("a path's gradient is a sum over a row; where that overflows, what is left depends on the order")
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


# Sixteen bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power", [1, -1, -2])
def test_factors_need_not_fit_where_their_products_do(power: int, dtype: torch.dtype) -> None:
    module, x = mlp(4, 3, 2).to(dtype), torch.randn(2, 4, dtype=dtype)
    group = scaling_group(module, x)
    reach = 60.0 if dtype == torch.float16 else 8e37  # half of the largest power of two, or less
    spans = torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64) * reach
    log_scale = torch.log(spans) / power
    ratio = [spans[:, None], spans, 1 / spans]
    tensors = {
        name: (torch.ones(p.shape, dtype=torch.float64) / size).to(dtype)
        for (name, p), size in zip(group.parameters.items(), ratio, strict=False)
    }
    expected = {name: tensor.double() * size for (name, tensor), size in zip(tensors.items(), ratio, strict=False)}
    group.rescale_(tensors, log_scale, power=power)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2 * torch.finfo(dtype).eps, atol=0)


def far_from_balance(dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """Weights of less than 60000 whose squares, factors and intermediate products have no place in float16."""
    torch.manual_seed(0)
    module = mlp(6, 8, 8, 3).to(dtype)
    with torch.no_grad():
        module[0].weight[0] *= 30000
        module[0].bias[0] *= 30000
        module[2].weight[:, 0] /= 1000
        module[2].weight[1:] /= 100
        module[2].bias[1:] /= 100
        module[4].weight[:, 1:] *= 1000
    return module, torch.randn(5, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balancing_in_sixteen_bits_is_that_of_float64(dtype: torch.dtype) -> None:
    module, x = far_from_balance(dtype)
    exact = copy.deepcopy(module).double()
    scaling_group(module, x).balance_()
    scaling_group(exact, x.double()).balance_()
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q.detach(), rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


@RULES
@pytest.mark.parametrize("name", ["sgd", "momentum"])
@pytest.mark.parametrize("size", [1e-2, 1e4])
def test_large_and_small_gradients_of_float16_take_steps_of_float32(size: float, name: str, rule: str) -> None:
    found = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        module, x = mlp(6, 5, 3), torch.randn(8, 6)
        module[0].weight.data[0] /= 100  # a row whose factor float16 cannot hold, where gradients are large
        module, x = module.half().to(dtype), x.to(dtype)
        rate = 0.05 if rule == "unit" else 1e-3 / size
        base = optim.SGD(module.parameters(), lr=rate, momentum=0.5 * (name == "momentum"))
        optimizer = EquivalentClassOptimizer(
            base, scaling_group(module, x), rule=rule, representative="current", check=None
        )
        for _ in range(3):
            for p in module.parameters():
                p.grad = (size * torch.randn(p.shape)).half().to(dtype)
            optimizer.step()
        found.append([p.detach().float() for p in module.parameters()])
    for low, exact in zip(*found, strict=True):
        torch.testing.assert_close(low, exact, rtol=0.02, atol=0.005)


# Inference mode -------------------------------------------------------------------------------------------------------

WITHIN = [{"group"}, {"first step"}, {"refresh"}, {"gradients"}, {"load"}, {"group", "first step", "refresh", "load"}]


@pytest.mark.parametrize(
    ("name", "rule", "form", "within"),
    few(pairwise(["sgd", "momentum", "adamw", "rmsprop"], ["unit", "path"], ["wrapped", "eager"], WITHIN), 8),
)
def test_inference_mode_leaves_no_tensors_that_cannot_change(
    name: str, rule: str, form: Implementation, within: set[str]
) -> None:
    """The state of the base is its own: as with torch alone, it must not be made in this mode."""
    found = []
    for modes in (set(), within):
        torch.manual_seed(0)
        module, x, y = mlp(6, 5, 3), torch.randn(8, 6), torch.arange(8) % 3
        with torch.inference_mode("group" in modes):
            group = scaling_group(module, x)

        def make(module: nn.Module = module, group: ScalingGroup = group) -> EquivalentClassOptimizer:
            base = MAKE[name]([*module.parameters()])
            return EquivalentClassOptimizer(base, group, rule=rule, implementation=form)

        optimizer = make()
        for step in range(5):
            module.zero_grad()
            loss_of(module, x, y).backward()
            if "gradients" in modes:
                with torch.inference_mode():
                    for p in module.parameters():
                        p.grad = p.grad.clone()
            if step == 2:
                optimizer.refresh()
            if step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                optimizer.load_state_dict(saved)
            event = {0: "first step" if name == "sgd" else "", 2: "refresh", 3: "load"}.get(step)
            with torch.inference_mode(event in modes):
                optimizer.step()
        found.append([p.detach().clone() for p in module.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


# Types that change ----------------------------------------------------------------------------------------------------

KINDS = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]


def run_with_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], at: int, make: Make, rule: str | None, form: Implementation
) -> tuple[list[Tensor], str]:
    """The weights after each step, whose gradients are given; and the error that ended it."""
    torch.manual_seed(0)
    module, x = mlp(6, 5, 3).to(dtypes[0]), torch.randn(8, 6).to(dtypes[0])
    optimizer = make([*module.parameters()])
    if rule is not None:
        optimizer = EquivalentClassOptimizer(
            optimizer, scaling_group(module, x), rule=rule, implementation=form, refresh_interval=4, check=None
        )
    for step in range(6):
        if step == at:
            module.to(dtypes[1])
        for p in module.parameters():
            p.grad = torch.randn(p.shape, dtype=torch.float32).to(p.dtype)
        before = [p.detach().clone() for p in module.parameters()]
        try:
            optimizer.step()
        except RuntimeError as error:
            near = 8 * torch.finfo(module[0].weight.dtype).eps
            for p, q in zip(module.parameters(), before, strict=True):
                torch.testing.assert_close(p.detach(), q * (1 - 0.01 * 0.01), rtol=near + 2e-4, atol=near)
            return before, str(error)
    return [p.detach().clone() for p in module.parameters()], ""


@pytest.mark.parametrize("at", few([0, 1, 2, 3, 5], [2]))
@FORMS
@RULES
@pytest.mark.parametrize("name", few(["sgd", "momentum", "nesterov", "adamw", "rmsprop"], ["momentum", "adamw"]))
@pytest.mark.parametrize(("before", "after"), few(KINDS, 2))
def test_a_module_may_change_its_dtype_between_steps(
    before: torch.dtype, after: torch.dtype, name: str, rule: str, form: Implementation, at: int
) -> None:
    """The steps go on, as exactly as the types allow, or end in the error of plain torch."""
    dtypes = before, after
    _, expected = run_with_another_dtype(dtypes, at, MAKE[name], None, form)
    found, error = run_with_another_dtype(dtypes, at, MAKE[name], rule, form)
    assert error == expected
    assert all(p.dtype == after for p in found)
    if not error:
        exact, _ = run_with_another_dtype((torch.float64, torch.float64), 9, MAKE[name], rule, form)
        near = 0.1 if after == torch.bfloat16 else 1e-4
        for p, q in zip(found, exact, strict=True):
            torch.testing.assert_close(p.double(), q, rtol=near, atol=near)


@RULES
def test_after_a_change_to_float64_steps_are_as_exact(rule: str) -> None:
    """Vectors over rows follow, and with them the way into coordinates and back."""
    torch.manual_seed(0)
    module, x, y = mlp(6, 5, 3), torch.randn(8, 6), torch.arange(8) % 3
    optimizer = EquivalentClassOptimizer(
        optim.RMSprop(module.parameters(), lr=0.01), scaling_group(module, x), rule=rule, refresh_interval=None
    )
    train(module, optimizer, x, y, range(3))
    module.double()
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(module)
    train(module, optimizer, x.double(), y, range(3))
    for p, q in zip(module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


# Steps that fail ------------------------------------------------------------------------------------------------------


class Nth(TorchFunctionMode):
    """Raises an error in place of a call of torch, or sends Ctrl-C after it."""

    def __init__(self, number: int, interrupt: bool = False) -> None:
        super().__init__()
        self.left, self.interrupt = number, interrupt

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 and not self.interrupt:
            raise MemoryError("no room")
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return result


class Shared(nn.Module):
    """Three layers in one parameter, and a bias that is used twice, so that blocks share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.biases = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.packed.split(4)
        one, two = self.biases.split(4)
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, first, one)), second, two)), third)


def before_a_step(
    shared: bool, rule: str, name: str, form: Implementation, dtype: torch.dtype
) -> tuple[nn.Module, EquivalentClassOptimizer]:
    torch.manual_seed(0)
    module, x = (Shared() if shared else mlp(4, 5, 3)), torch.randn(8, 4)
    module, x = module.to(dtype), x.to(dtype)
    base = MAKE[name]([*module.parameters()])
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, check=None, implementation=form)
    for _ in range(2):
        for p in module.parameters():
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    for p in module.parameters():
        p.grad = torch.randn(p.shape).to(dtype)
    return module, optimizer


@pytest.mark.parametrize("dtype", few([torch.float64, torch.bfloat16], 1))
@pytest.mark.parametrize("shared", [False, True])
@RULES
def test_a_step_that_fails_anywhere_on_the_way_into_coordinates_leaves_weights(
    rule: str, shared: bool, dtype: torch.dtype
) -> None:
    """Every eleventh call of torch before the base's step fails in turn; in the default run fewer of them."""
    for number in range(1, 1200, 11 if everything() else 83):
        module, optimizer = before_a_step(shared, rule, "rmsprop", "wrapped", dtype)
        weights = [p.detach().clone() for p in module.parameters()]
        gradients = [p.grad for p in module.parameters()]
        values = [p.grad.clone() for p in module.parameters()]
        reached = []
        optimizer.optimizer.step = lambda reached=reached: reached.append(1)
        with contextlib.suppress(MemoryError), Nth(number):
            optimizer.step()
        if reached:
            break
        near = 32 * torch.finfo(dtype).eps
        for p, w, g, v in zip(module.parameters(), weights, gradients, values, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=near, atol=near, msg=lambda m, n=number: f"{n}: {m}")
            assert p.grad is g
            torch.testing.assert_close(g, v, rtol=near, atol=near, msg=lambda m, n=number: f"{n}: {m}")
    assert reached
    assert number > 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a terminal: a shell lets what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("form", ["wrapped", "eager"])
@RULES
def test_ctrl_c_waits_for_the_end_of_a_step(rule: str, form: Implementation) -> None:
    expected, optimizer = before_a_step(False, rule, "adamw", form, torch.float64)
    optimizer.step()
    for number in range(1, 400, 7 if everything() else 150):
        module, optimizer = before_a_step(False, rule, "adamw", form, torch.float64)
        start = [p.detach().clone() for p in module.parameters()]
        try:
            with Nth(number, interrupt=True):
                optimizer.step()
        except KeyboardInterrupt:
            moved = [not torch.equal(p, q) for p, q in zip(module.parameters(), start, strict=True)]
            assert all(moved) or not any(moved)
            if any(moved):
                for p, q in zip(module.parameters(), expected.parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_wait() -> None:
    reached = []

    def block() -> None:
        with uninterrupted():
            for number in (1, 2):
                signal.raise_signal(signal.SIGINT)
                reached.append(number)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
