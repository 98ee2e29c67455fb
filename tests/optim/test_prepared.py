"""A prepared step is taken where tensors are such as those of the step before, and nowhere else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.lines import LineKernels
from lightning_ecopt.optim.prepared import PreparedStep
from lightning_ecopt.optim.stages import Running
from lightning_ecopt.optim.stepper import Stepper
from tests.networks import mlp
from tests.optim.training import weights_of
from tests.paths.cases import NETWORKS
from tests.selection import few

pytestmark = pytest.mark.compiler

STEPS, CHANGE_AT = 10, 6
X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(32) % 3
#: The call of the kernels that is a prepared step of each rule.
RULES = {"unit": "step_", "path": "path_step_"}
MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: AdamW(params, lr=0.01, amsgrad=True),
}


class Run:
    """Trains a network by one implementation, and is changed on the way."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer],
        implementation: str,
        dtype: torch.dtype = torch.float64,
        rule: str = "unit",
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        self.net, self._x = mlp(6, 8, 8, 3).to(dtype), X.to(dtype)
        self.wide = torch.zeros(1, 12)  # what is beside a weight in its memory
        self.base = make(self.net.parameters())
        group = scaling_group(self.net, self._x[:2])
        self.optimizer = EquivalentClassOptimizer(
            self.base,
            group,
            rule=rule,
            implementation=implementation,  # type: ignore[arg-type]
            check=None,
            **options,
        )

    @property
    def weight(self) -> nn.Parameter:
        """The second matrix."""
        return next(p for p in list(self.net.parameters())[1:] if p.ndim == 2)

    def step(self, before: Callable[[Run], object] | None = None) -> None:
        """One step, with a change between its gradients and itself."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self._x), Y).backward()
        if before is not None:
            before(self)
        self.optimizer.step()


def gradient(run: Run, change: Callable[[Tensor], Tensor | None], number: int | None = None) -> None:
    weight = run.weight if number is None else list(run.net.parameters())[number]
    assert weight.grad is not None
    weight.grad = change(weight.grad)


def move(run: Run) -> None:
    run.weight.data = run.weight.data.clone()


def transposed_memory(run: Run) -> None:
    run.weight.data = run.weight.data.t().contiguous().t()


def turn(run: Run) -> None:
    """The square weight has other strides at the same address."""
    run.weight.data = run.weight.data.t()


def turn_state(run: Run) -> None:
    for entry in run.base.state[run.weight].values():
        entry.data = entry.data.t() if entry.ndim else entry.data


def wider_memory(run: Run) -> None:
    """The weight is part of a wider matrix, whose other columns belong to nobody."""
    run.wide = torch.nn.functional.pad(run.weight.data, (0, 4))
    run.weight.data = run.wide[:, : run.weight.shape[1]]


def entries(run: Run) -> None:
    """The state of one parameter is a copy from now on."""
    state = run.base.state[run.weight]
    run.base.state[run.weight] = {name: entry.clone() for name, entry in state.items()}


def load(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def scale_state(run: Run) -> None:
    """Other numbers in the same memory are no other step."""
    for entry in run.base.state[run.weight].values():
        entry.mul_(0.5)


def option(name: str, value: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for options in run.base.param_groups:
            if name in options:
                options[name] = value

    return change


def frozen_group(run: Run) -> None:
    """Another parameter, with a gradient, that the scaling group does not know."""
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    extra.grad = torch.ones(3, dtype=torch.float64)
    run.base.add_param_group({"params": [extra]})
    run.net.extra = extra  # type: ignore[assignment]  # so that it counts as one of the weights


def own_step(run: Run) -> None:
    """A step of the user's, which halves the gradients."""
    step = run.base.step

    def halved(*args: Any) -> Any:
        for p in run.net.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        return step(*args)

    run.base.step = halved  # type: ignore[method-assign]


#: What happens just before one of the steps, and whether that step may be a prepared one.
CHANGES: dict[str, tuple[Callable[[Run], object], bool]] = {
    "no gradient": (lambda run: gradient(run, lambda g: None), False),
    "other strides": (lambda run: gradient(run, lambda g: g.t().contiguous().t()), False),
    "expanded": (lambda run: gradient(run, lambda g: g.mean().expand_as(g)), False),
    "a graph": (lambda run: gradient(run, lambda g: g.requires_grad_()), True),
    "zeros": (lambda run: gradient(run, torch.zeros_like), True),
    "infinite": (lambda run: gradient(run, lambda g: g.fill_(torch.inf)), True),
    "negative": (lambda run: gradient(run, torch._neg_view), False),
    "negative bias": (lambda run: gradient(run, torch._neg_view, 1), False),
    "moved weight": (move, True),
    "wider memory": (wider_memory, False),
    "turned": (turn, False),
    "turned state": (turn_state, False),
    "transposed weight": (transposed_memory, False),
    "new state": (entries, True),
    "loaded": (load, False),
    "scaled state": (scale_state, True),
    "rate": (option("lr", 0.003), True),
    "rate as a tensor": (option("lr", torch.tensor(0.003, dtype=torch.float64)), True),
    "no rate": (option("lr", 0.0), True),
    "no momentum": (option("momentum", 0.0), False),
    "nesterov": (option("nesterov", True), True),
    "no amsgrad": (option("amsgrad", False), False),
    "decay": (option("weight_decay", 0.3), True),
    "frozen group": (frozen_group, False),
    "own step": (own_step, False),
    "refresh": (lambda run: run.optimizer.refresh(), True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", few(MAKE, ["sgd"]))
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps(name: str, change: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    step_ = getattr(CompiledKernels, RULES[rule])

    def counted(self: CompiledKernels, *args: Any) -> Any:
        taken.append(step)
        return step_(self, *args)

    monkeypatch.setattr(CompiledKernels, RULES[rule], counted)
    happens, may_be_prepared = CHANGES[change]
    option_name = {"no momentum": "momentum", "nesterov": "nesterov", "no amsgrad": "amsgrad"}.get(change)
    runs = [Run(MAKE[name], implementation, rule=rule) for implementation in ("wrapped", "compiled")]
    has_option = option_name is None or option_name in runs[0].base.param_groups[0]
    for run in runs:
        for step in range(STEPS):
            run.step(happens if step == CHANGE_AT else None)
    expected, found = (weights_of(run.net) for run in runs)
    assert all(not run.wide[:, 8:].any() for run in runs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, equal_nan=True)
    assert set(range(2, CHANGE_AT)) <= set(taken)  # the first step makes the state, the second prepares
    may_be_prepared &= (change, rule) != ("refresh", "path")  # the path rule is made anew
    if has_option:
        assert (CHANGE_AT in taken) == may_be_prepared


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("refresh", [True, False])
def test_state_on_another_device_is_not_addressed(name: str, rule: str, refresh: bool) -> None:
    run = Run(MAKE[name], "auto", rule=rule)
    for _ in range(4):
        run.step()
    state = run.base.state[run.weight]
    state.update({key: entry.to("meta") for key, entry in state.items() if entry.ndim})
    if refresh:
        run.optimizer.refresh()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="meta"):
            run.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAKE)
def test_a_step_without_gradients_follows_the_type_of_the_parameters(name: str, rule: str) -> None:
    run = Run(MAKE[name], "auto", torch.float32, rule=rule)
    for _ in range(4):
        run.step()
    run.net.double()
    run.optimizer.zero_grad()
    run.optimizer.step()
    saved = run.optimizer.state_dict()["equivalent_class"]
    assert saved["beta" if rule == "path" else "second"].dtype == torch.float64


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", few(MAKE, ["sgd"]))
def test_rates_that_stay_change_and_come_back(name: str, rule: str) -> None:
    """What C is told of them is kept as long as they stay."""
    runs = [Run(MAKE[name], implementation, rule=rule) for implementation in ("wrapped", "compiled")]
    for rate in (0.01, 0.01, 0.01, 0.03, 0.03, 0.01, 0.01, 0.0, 0.01, 0.01):
        for run in runs:
            run.step(option("lr", rate))
    expected, found = (weights_of(run.net) for run in runs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def forget(run: Run) -> None:
    """Nothing is prepared for the next step."""
    stage = run.optimizer._session.stage
    if isinstance(stage, Running):
        parameters = stage.network.group.parameters
        run.optimizer._session.stage = replace(stage, stepper=Stepper(run.base, stage.rule, parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("rule", RULES)
def test_a_prepared_step_changes_the_same_bits(name: str, dtype: torch.dtype, rule: str) -> None:
    """So that a run that is resumed, whose first step is not prepared, ends as the one that went on."""
    one, other = (Run(MAKE[name], "compiled", dtype, rule) for _ in range(2))
    for step in range(STEPS):
        one.step()
        other.step(forget if step % 2 else None)
    assert all(map(torch.equal, one.net.parameters(), other.net.parameters()))


def test_few_gradients_are_prepared_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another gradient is missing at each step, preparing each of them would cost more than it saves."""
    tries = []
    of = PreparedStep.of
    monkeypatch.setattr(PreparedStep, "of", lambda *args: (tries.append(1), of(*args))[1])
    run = Run(MAKE["sgd"], "compiled")
    for _ in range(40):
        run.step(lambda run: gradient(run, lambda g: None))
    assert len(tries) == 6  # in the 1st, 2nd, 4th, 8th, 16th and 32nd step that is fused


def test_a_network_that_is_disturbed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing gradient now and then costs one step that is not prepared each time."""
    taken = []
    step_ = CompiledKernels.step_
    monkeypatch.setattr(CompiledKernels, "step_", lambda *args: (taken.append(step), step_(*args))[1])
    run = Run(MAKE["sgd"], "compiled")
    for step in range(60):
        run.step((lambda run: gradient(run, lambda g: None)) if step % 10 == 9 else None)
    assert taken == [step for step in range(2, 60) if step % 10 != 9]


@pytest.mark.parametrize("name", MAKE)
def test_state_that_was_cleared_is_released(name: str) -> None:
    run = Run(MAKE[name], "compiled")
    for _ in range(4):
        run.step()
    released = [weakref.ref(entry) for state in run.base.state.values() for entry in state.values()]
    run.base.state.clear()
    assert not any(entry() is not None for entry in released)


@pytest.mark.parametrize("implementation", ["wrapped", "eager", "compiled"])
def test_a_guard_that_is_never_needed_may_be_beyond_the_numbers_of_the_weights(implementation: str) -> None:
    run = Run(MAKE["sgd"], implementation, torch.float32, "path", max_path_ratio=1e300)
    for _ in range(3):
        run.step()
    assert run.optimizer.statistics().guarded_paths == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("implementation", ["eager", "compiled"])
def test_a_weight_that_has_lost_skeleton_elements_is_named(implementation: str) -> None:
    run = Run(partial(SGD, lr=0.02), implementation, rule="path")
    for _ in range(3):
        run.step()

    before: dict[str, Tensor] = {}

    def narrow(run: Run) -> None:
        weight = run.weight
        gradient, weight.grad = weight.grad, None
        weight.data = weight.data[:, :1].contiguous()
        weight.grad = None if gradient is None else gradient[:, :1].contiguous()
        before.update(weights_of(run.net))

    with pytest.raises(IndexError):
        run.step(narrow)
    assert all(map(torch.equal, weights_of(run.net).values(), before.values()))


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_without_memory(rule: str) -> None:
    """Derivatives of functions that are constant have none, where ``"wrapped"`` raises."""
    one, other = (Run(MAKE["sgd"], "compiled", rule=rule) for _ in range(2))
    for step in range(STEPS):
        for run, zeros in ((one, torch.zeros), (other, torch._efficientzerotensor)):
            run.step(partial(gradient, change=lambda g: zeros(g.shape, dtype=g.dtype)) if step == CHANGE_AT else None)  # noqa: B023
    assert all(map(torch.equal, one.net.parameters(), other.net.parameters()))


@pytest.mark.parametrize("options", [{"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.5, "dampening": 0.9}])
@pytest.mark.parametrize("rule", RULES)
def test_options_that_are_tensors(options: dict[str, float], rule: str) -> None:
    of_tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
    expected = Run(partial(SGD, lr=0.02, **options), "wrapped", rule=rule)
    found = Run(partial(SGD, lr=0.02, **of_tensors), "compiled", rule=rule)
    for _ in range(STEPS):
        expected.step()
        found.step()
    torch.testing.assert_close(weights_of(found.net), weights_of(expected.net), rtol=1e-11, atol=1e-13)


def _groups(net: nn.Module) -> list[dict[str, Any]]:
    """Parameters of one axis have another rate and another decay."""
    of = [[p for p in net.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)]
    return [{"params": of[0], "weight_decay": 0.01}, {"params": of[1], "lr": 0.005}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, lr=0.02),
        partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
        partial(SGD, lr=2.0, momentum=0.5),  # so that the guard is needed
        partial(AdamW, lr=0.01, amsgrad=True),
    ],
    ids=["sgd", "nesterov", "guarded", "amsgrad"],
)
@pytest.mark.parametrize("network", ["mlp", "batch_norm", "resnet"])
@pytest.mark.parametrize("rule", few(RULES, ["path"]))
def test_one_call_is_as_its_parts(
    rule: str, network: str, make: Callable[..., Optimizer], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What C does in one call has the bits of the same calls one by one, which is what Triton's kernels do."""
    taken = []

    def by_parts(self: CompiledKernels, *args: Any) -> Any:
        taken.append(True)
        return getattr(LineKernels, RULES[rule])(self, *args)

    found, statistics = [], []
    for is_one_call in (True, False):
        if not is_one_call:
            monkeypatch.setattr(CompiledKernels, RULES[rule], by_parts)
        torch.manual_seed(0)
        build, shape = NETWORKS[network]
        net, x = build().to(dtype), torch.randn(8, *shape, dtype=dtype)
        optimizer = EquivalentClassOptimizer(
            make(_groups(net)),
            scaling_group(net, x),
            rule=rule,
            implementation="compiled",
            check=None,
            max_path_ratio=1.01,
        )
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        found.append([*weights_of(net).values(), *(v for of in optimizer.state.values() for v in of.values())])
        statistics.append(optimizer.statistics())
    assert len(taken) == 5 - 1 - (make.keywords.get("momentum", 0) > 0 or "amsgrad" in make.keywords)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert statistics[0] == statistics[1]
    if rule == "path" and make.keywords["lr"] > 1:
        assert statistics[0].guarded_paths > 0
