"""Every way to run a step agrees with the plain one, and which one it is follows from the network and the machine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.common import tensors
from lightning_ecopt.common.tensors import PIECE_SIZES, PieceSize
from lightning_ecopt.kernels import EagerKernels, choose_kernels
from lightning_ecopt.kernels.compiled import CompiledKernels
from tests.networks import mlp, norm_cnn
from tests.optim.training import problem, put_back, train, weights_of
from tests.selection import few, full

Make = Callable[[Iterable[Any]], Optimizer]


def grouped(kind: Callable[..., Optimizer], *options: dict[str, Any], **common: Any) -> Make:
    """Parameters in turn to as many groups as there are options."""

    def make(params: Iterable[Any]) -> Optimizer:
        params = list(params)
        groups = [{"params": params[k :: len(options)], **own} for k, own in enumerate(options)]
        return kind(groups, **common)

    return make


#: Options of which fused kernels know; rates so small that steps along given gradients stay near the start.
FUSED: dict[str, Make] = {
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


STEPS = 250


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
        group, optimizer = scaling_group(self.module, x), FUSED[base](self.named.values())
        self.optimizer = EquivalentClassOptimizer(
            optimizer, group, rule=rule, refresh_interval=75, check=None, implementation=implementation
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


@cache
def plain64(network: str, base: str, rule: str) -> Run:
    """All steps of the plain version in float64."""
    return Run(network, base, rule, "wrapped", torch.float64).steps(STEPS)


def compare64(network: str, base: str, rule: str, implementation: str) -> None:
    """All steps."""
    agree(Run(network, base, rule, implementation, torch.float64).steps(STEPS), plain64(network, base, rule), 1e-12)


def compare32(network: str, base: str, rule: str, implementation: str) -> None:
    """Some of the steps, each from the same weights and state, and where all of them lead."""
    run, plain = (Run(network, base, rule, kind, torch.float32) for kind in (implementation, "wrapped"))
    for number in range(STEPS):
        if number % 25 == 1:
            plain.go_on_from(run)
            plain.step(number)
        run.step(number)
        if number % 25 == 1:
            agree(run, plain, 1e-6)
    # The plain version in float32 is as far from this, or farther.
    agree(run, plain64(network, base, rule), 1e-5)


#: Bases of the default run, and of single precision.
SOME = ("nesterov", "adam_l2", "adamw_groups")


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize(
    ("base", "compare"),
    few(
        [*((base, compare64) for base in FUSED), *((base, compare32) for base in SOME)],
        [(base, compare64) for base in SOME],
    ),
)
def test_a_fused_run_is_that_of_the_plain_version(
    base: str, rule: str, compare: Callable[..., None], kind: str
) -> None:
    compare("mlp", base, rule, kind)


@full
@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("network", "base", "compare"),
    [
        *((*run, compare64) for run in (("cnn", "nesterov"), ("packed", "adam_l2"), ("packed", "nesterov"))),
        *((*run, compare32) for run in (("cnn", "nesterov"), ("packed", "adam_l2"))),
    ],
)
def test_weights_of_all_forms_take_fused_steps(
    network: str, base: str, rule: str, compare: Callable[..., None], kind: str
) -> None:
    compare(network, base, rule, kind)


# What a step costs in memory, and whose it is -------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that did not exist before, in elements."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._known:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("kind", ["eager", "compiled", "wrapped"])
@pytest.mark.parametrize("base", ["momentum", "adam_l2"])
def test_no_operation_of_a_step_makes_a_tensor_of_the_size_of_the_weights(
    base: str, kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in PIECE_SIZES:
        monkeypatch.setitem(PIECE_SIZES, work, PieceSize(1 << 10, 1 << 10))
    monkeypatch.setattr(tensors, "FEW", 0)  # what is small is stacked
    module, x, _ = problem(40, 100, 100, 3)
    make = {
        "momentum": lambda params: SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True),
        "adam_l2": lambda params: Adam(params, lr=0.01, weight_decay=0.1, amsgrad=True, fused=True),
    }[base]
    optimizer = EquivalentClassOptimizer(
        make(module.parameters()), scaling_group(module, x), rule=rule, refresh_interval=None, implementation=kind
    )
    for _ in range(2):  # the first makes the state
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.arange(len(x)) % 3).backward()
        known = [*module.parameters()] + [p.grad for p in module.parameters() if p.grad is not None]
        known += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        with Largest(known) as largest:
            optimizer.step()
    # 203 units and outputs, as rows of weights and of biases.
    assert 2 * 203 <= largest.elements <= 4096 < module[2].weight.numel()


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("form", ["expanded", "shared", "graph", "sixteen bits"])
def test_gradients_that_cannot_be_changed_in_place_stay_as_they_are(form: str, rule: str) -> None:
    torch.manual_seed(0)
    module = mlp(4, 6, 4, 3).to(torch.bfloat16 if form == "sixteen bits" else torch.float64)
    optimizer = EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.01),
        scaling_group(module, torch.zeros(1, 4, dtype=module[0].weight.dtype)),
        rule=rule,
        implementation="wrapped",
    )
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    if form == "expanded":
        module[0].weight.grad = torch.randn(6, 1, dtype=torch.float64).expand(6, 4)
    elif form == "shared":
        memory = torch.randn(6, 4, dtype=torch.float64)
        module[0].weight.grad, module[2].weight.grad = memory, memory.view(4, 6)
    elif form == "graph":
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        module[0].weight.grad = torch.randn(6, 4, dtype=torch.float64) * factor
    optimizer.refresh_interval = None
    optimizer.representative = "current"
    gradients = [p.grad for p in module.parameters()]
    before = [g.detach().clone() for g in gradients if g is not None]
    versions = [g._version for g in gradients if g is not None]
    optimizer.step()
    for p, gradient, value, version in zip(module.parameters(), gradients, before, versions, strict=True):
        assert p.grad is gradient
        assert put_back(gradient, value)
        if form == "sixteen bits" or gradient.grad_fn is not None:
            assert gradient._version == version


# Which version is taken -----------------------------------------------------------------------------------------------


@pytest.mark.compiler
def test_the_version_follows_from_the_device() -> None:
    weights, elsewhere = [torch.zeros(10)], [torch.zeros(10, device="meta")]
    assert type(choose_kernels("auto", weights)) is CompiledKernels
    assert type(choose_kernels("auto", elsewhere)) is EagerKernels
    assert type(choose_kernels("auto", [*weights, *elsewhere])) is EagerKernels
    for given, kind in (("eager", EagerKernels), ("wrapped", EagerKernels), ("compiled", CompiledKernels)):
        assert type(choose_kernels(given, weights)) is kind
    with pytest.raises(ValueError, match="'compiled' needs a CPU, and the parameters are on cpu, meta: use 'auto'"):
        choose_kernels("compiled", [*weights, *elsewhere])


class Mixed(nn.Module):
    """The last layer computes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)).double())


@pytest.mark.compiler
@pytest.mark.parametrize("base", [AdamW, SGD])
def test_parameters_of_several_types_are_stepped_alike(base: type[Optimizer]) -> None:
    found = []
    for kind in ("eager", "wrapped", "compiled"):
        torch.manual_seed(0)
        module, x = Mixed(), torch.randn(8, 4)
        optimizer = EquivalentClassOptimizer(
            base(module.parameters(), lr=0.01), scaling_group(module, x), implementation=kind
        )
        for _ in range(4):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
        found.append([p.detach() for p in module.parameters()])
    for weights in zip(*found, strict=True):
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["expanded", "shared"])
def test_gradients_whose_memory_is_used_twice_are_rescaled_once_at_a_refresh(form: str) -> None:
    found = []
    for copied in (False, True):
        torch.manual_seed(0)
        module = mlp(4, 6, 4, 3)
        gradients = [torch.ones_like(p) for p in module.parameters()]
        if form == "expanded":
            gradients[0] = torch.arange(1.0, 7)[:, None].expand(6, 4)
        else:
            gradients[0] = gradients[2].view(6, 4)
        optimizer = EquivalentClassOptimizer(
            SGD(module.parameters(), lr=0.01), scaling_group(module, torch.zeros(1, 4)), check=None
        )
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            p.grad = gradient.clone() if copied else gradient
        optimizer.step()
        found.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_triton_is_refused_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module, x, _ = problem(4, 6, 3)
    with pytest.raises(ValueError, match=r"needs a GPU, and the parameters are on cpu: use 'auto'"):
        EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), scaling_group(module, x), implementation="triton")


def test_an_unknown_version_is_refused() -> None:
    module, x, _ = problem(4, 6, 3)
    with pytest.raises(ValueError, match=r"implementation must be one of auto, wrapped.*, got 'fast'"):
        EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), scaling_group(module, x), implementation="fast")


def test_a_scheduler_of_the_base_sees_that_it_takes_steps() -> None:
    module, x, y = problem(4, 6, 3)
    base = SGD(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, x, y, range(2))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)


def test_a_subclass_of_sgd_takes_its_own_steps() -> None:
    class Counting(SGD):
        count = 0

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            self.count += 1
            return super().step(closure)

    module, x, y = problem(4, 6, 3)
    base = Counting(module.parameters(), lr=0.1)
    train(module, EquivalentClassOptimizer(base, scaling_group(module, x)), x, y, range(5))
    assert base.count == 5


@pytest.mark.parametrize("rule", ["unit", "path"])
def test_steps_are_taken_where_all_operations_must_be_deterministic(rule: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        run = Run("cnn", "momentum", rule, "eager", torch.float64).steps(9)
    finally:
        torch.use_deterministic_algorithms(False)
    agree(run, Run("cnn", "momentum", rule, "eager", torch.float64).steps(9), 0.0)


@pytest.mark.parametrize("implementation", ["eager", "compiled", "wrapped"])
@pytest.mark.parametrize("rule", ["unit", "path"])
def test_weights_in_the_order_of_channels_last_take_the_same_steps(rule: str, implementation: str) -> None:
    expected, found = (Run("cnn", "adamw", rule, implementation, torch.float64) for _ in range(2))
    found.module.to(memory_format=torch.channels_last)
    strides = {name: p.stride() for name, p in found.named.items()}
    assert strides["4.weight"] != expected.named["4.weight"].stride()
    agree(found.steps(20), expected.steps(20), 1e-13)
    assert {name: p.stride() for name, p in found.named.items()} == strides
