"""Nothing that a model does makes ``scaling_group`` raise or leave a trace, and what it finds is exact."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import io
import math
import multiprocessing
import random
import threading
import types
import warnings
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from tests.networks import ResidualMLP, ResNet, mlp, norm_cnn
from tests.symmetry.helpers import assert_same, draw_, flat_output

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]


class Beside(nn.Module):
    """A network whose hidden features something odd is done to, beside an ordinary one."""

    def __init__(self, odd: Callable[[Any, Tensor], Tensor] = lambda m, h: h, **parts: Any) -> None:
        super().__init__()
        self.plain = mlp(3, 4, 2)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.head = nn.Linear(5, 2)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.odd = odd
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(x), self.head(self.odd(self, self.body(x)))


PLAIN, BESIDE = 4, 5  # hidden features of the ordinary network, and of the one beside it


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_global_stays_behind() -> Iterator[None]:
    torch._dynamo.reset()  # what an earlier test has compiled, or has kept from being compiled
    yield
    assert _get_current_dispatch_mode() is None
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_states() -> tuple[Any, ...]:
    kind, numbers, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, numbers.tolist(), *rest


def record(item: Any) -> Any:
    """What an attribute holds, as something to compare."""
    if isinstance(item, Tensor):
        plain = item.device.type != "meta" and type(item) in (Tensor, nn.Parameter)
        values = (item.detach().to_dense() if item.layout is not torch.strided else item.detach()) if plain else None
        numbers = None if values is None else values.tolist()
        return id(item), item.dtype, item.requires_grad, numbers, record(item.grad) if item.is_leaf else None
    if isinstance(item, torch.Generator):
        return id(item), item.get_state().tolist()
    if isinstance(item, np.ndarray):
        return id(item), item.tolist()
    if isinstance(item, dict | UserDict):
        return id(item), [(key, record(value)) for key, value in item.items()]
    if isinstance(item, list | tuple | deque):
        return id(item), [record(value) for value in item]
    if isinstance(item, types.SimpleNamespace):
        return id(item), record(vars(item))[1]
    return item if isinstance(item, int | float | str | bool | set | None) else id(item)


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that a module and its submodules hold; the dictionaries that hold it may be others."""
    state = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            state[name, key] = copy.copy(value) if isinstance(value, set) else record(value)
    return state


def call(module: nn.Module, *args: Any, read: Callable[[Any], Any] = lambda y: y, **kwargs: Any) -> Tensor:
    """The output of a plain call as one vector; weights and buffers that the call has changed are put back."""
    before = [(t, t.detach().clone()) for t in [*module.parameters(), *module.buffers()]]
    seed_all(0)
    with warnings.catch_warnings(action="ignore"):
        output = flat_output(read(module(*args, **kwargs))).detach().clone()
    with torch.no_grad():
        for tensor, values in before:
            tensor.data.copy_(values)
    module.zero_grad()
    return output


def freedoms(group: ScalingGroup, part: str) -> int:
    """How many independent rescalings there are of the parameters with ``part`` in their names."""
    columns = []
    for unit in torch.eye(group.num_units, dtype=torch.float64):
        ones = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in group.parameters.items() if part in n}
        group.rescale_(ones, unit)
        columns.append(torch.cat([tensor.log().flatten() for tensor in ones.values()]))
    return int(torch.linalg.matrix_rank(torch.stack(columns))) if columns else 0


def check(
    module: nn.Module,
    *args: Any,
    binary: bool = False,
    read: Callable[[Any], Any] = lambda y: y,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **kwargs: Any,
) -> ScalingGroup:
    """The group of ``module``, after all has been checked that holds for any module.

    Args:
        module: what is called.
        *args: inputs of the call.
        binary: whether to rescale by powers of two, which every floating point type keeps exactly.
        read: takes the tensors out of an output that hides them.
        within: what every call is made in.
        **kwargs: further inputs of the call.
    """

    def output() -> Tensor:
        with within():
            return call(module, *args, read=read, **kwargs)

    generator = torch.Generator().manual_seed(1)
    draw_(module, generator)
    output()  # the module works, and has whatever a first call gives it
    seed_all(0)
    state, states = state_of(module), random_states()
    with within():
        group = scaling_group(module, *args, **kwargs)
    assert random_states() == states
    assert state_of(module) == state
    before = output()
    log_scale = torch.randn(group.num_units, generator=generator, dtype=torch.float64)
    group.act_(log_scale.round() * math.log(2) if binary else log_scale)
    assert_same(output(), before)
    assert freedoms(group, "plain.") == PLAIN
    return group


def survive(module: nn.Module, *args: Any) -> None:
    """Checks a module in a process of its own, which a mistake could end."""
    child = multiprocessing.get_context("fork").Process(target=check, args=(module, *args))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def every(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """One test for each entry; the number that stands beside some of them is the number of all freedoms."""
    parameters = [
        pytest.param(*(case if isinstance(case, tuple) else (case, None)), id=name) for name, case in cases.items()
    ]
    return pytest.mark.parametrize(("make", "units"), parameters)


def odd(function: Callable[[Any, Tensor], Tensor], /, **parts: Callable[[], Any]) -> Callable[[], Beside]:
    """Makes a network that does this to its hidden features, with such parts."""
    return lambda: Beside(function, **{name: part() for name, part in parts.items()})


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), nn.ReLU()).double()


# Control flow ---------------------------------------------------------------------------------------------------------


def _halved_until_small(m: Any, h: Tensor) -> Tensor:
    while h.norm() > 1:
        h = h / 2
    return h


def _masked_assignment(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0.5] = 0.5
    return h


def _asserted(m: Any, h: Tensor) -> Tensor:
    assert bool((h.sum() < 1e9).all())
    return h


def _routed(m: Any, h: Tensor) -> Tensor:
    """Every row goes to the expert that a gate chooses, and is added to what the others return."""
    choice = m.gate(h).argmax(1)
    y = torch.zeros_like(h)
    for number, expert in enumerate(m.experts):
        rows = torch.where(choice == number)[0]
        if rows.numel():
            y.index_add_(0, rows, expert(h[rows]))
    return y


CONTROL_FLOW = {
    "branch": odd(lambda m, h: h if h.sum() > 1 else 2 * h),
    "conditional expression": odd(lambda m, h: h * (1 if h[0, 0] > h[1, 1] else 3)),
    "loop over an item": odd(lambda m, h: h + sum(h for _ in range(int(h.sum().item()) % 3))),
    "while": odd(_halved_until_small),
    "list": odd(lambda m, h: h * (1 + sum(value > 0.5 for value in h[0].tolist()))),
    "nonzero": odd(lambda m, h: torch.cat([h, h[(h.sum(1) > 1).nonzero()[:, 0]]])),
    "boolean mask": odd(lambda m, h: torch.cat([h, h[h[:, 0] > 0.5]])),
    "masked select": odd(lambda m, h: h + h.masked_select(h > 0.5).numel()),
    "masked assignment": odd(_masked_assignment),
    "unique": odd(lambda m, h: h + torch.unique(h.round()).numel()),
    "index in Python": odd(lambda m, h: h * (1, 2, 3, 4, 5)[int(h[0].argmax())]),
    "rows one by one": odd(lambda m, h: torch.stack([row if row[0] > 0.5 else -row for row in h])),
    "sorted in Python": odd(lambda m, h: torch.stack(sorted(h, key=lambda row: float(row[0])))),
    "repeated as often as the data say": odd(lambda m, h: h.repeat_interleave((h[:, 0] > 0.5).long() + 1, 0)),
    "assertion": odd(_asserted),
    "routed to experts": odd(
        _routed, gate=lambda: nn.Linear(5, 2), experts=lambda: nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
    ),
}


@every(CONTROL_FLOW)
def test_control_flow_that_depends_on_data(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    check(make(), x)


# Values that leave torch ----------------------------------------------------------------------------------------------


def _saved_and_loaded(m: Any, h: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(h.detach(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _copied_bytes(m: Any, h: Tensor) -> Tensor:
    y = torch.empty_like(h, requires_grad=False)
    y.untyped_storage().copy_(h.untyped_storage())
    return y


def _written_to_numpy_memory(m: Any, h: Tensor) -> Tensor:
    array = np.zeros(tuple(h.shape))
    torch.from_numpy(array).copy_(h.detach())
    return torch.from_numpy(array)


LEAVING = {
    "numpy": odd(lambda m, h: h * float(h.detach().numpy().max())),
    "numpy and back": odd(lambda m, h: torch.from_numpy(np.sinh(h.detach().numpy()))),
    "asarray": odd(lambda m, h: h * float(np.asarray(h.detach())[0].sum())),
    "memory of an array": odd(_written_to_numpy_memory),
    "dlpack": odd(lambda m, h: torch.from_dlpack(h.detach()).exp()),
    "numpy by dlpack": odd(lambda m, h: torch.tensor(np.from_dlpack(h.detach()))),
    "tensor from a list": odd(lambda m, h: torch.tensor(h.tolist(), dtype=torch.float64)),
    "tensor from numbers": odd(lambda m, h: torch.tensor([[float(v) for v in row] for row in h], dtype=h.dtype)),
    "text": odd(lambda m, h: h * float(f"{h.sum():.6f}")),
    "text of a tensor": odd(lambda m, h: h * len(str(h.detach()))),
    "equal": odd(lambda m, h: h if torch.equal(h, h.round()) else h.exp()),
    "close": odd(lambda m, h: 3 * h if torch.allclose(h, h.round(), atol=0.4) else 2 * h),
    "saved and loaded": odd(_saved_and_loaded),
    "deep copy": odd(lambda m, h: copy.deepcopy(h.detach())),
    "copied bytes": odd(_copied_bytes),
    "bytes": odd(lambda m, h: h * (1 + sum(h.detach().clone().untyped_storage().tolist()) % 7)),
    "same memory": odd(lambda m, h: torch.empty(0, dtype=h.dtype).set_(h.detach())),
    "same storage": odd(lambda m, h: torch.empty(0, dtype=h.dtype).set_(h.detach().untyped_storage()).view(8, 5)),
    "weight by numpy": odd(lambda m, h: h * float(m.body[0].weight.detach().numpy().sum())),
    "weight by list": odd(lambda m, h: h * sum(m.body[0].bias.tolist())),
    "weight by item": odd(lambda m, h: h * m.head.weight[0, 0].item()),
    "weight by state dict": odd(lambda m, h: h + m.state_dict()["head.weight"][0]),
    "copied layer": odd(lambda m, h: copy.deepcopy(m.block)(h), block=block),
}


@every(LEAVING)
def test_values_that_leave_torch(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    check(make(), x)


def test_a_pointer_leads_to_the_data(x: Tensor) -> None:
    survive(Beside(lambda m, h: h * ctypes.c_double.from_address(h.detach().data_ptr()).value), x)


# Autograd -------------------------------------------------------------------------------------------------------------


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class NumpyTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(h.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].square())


class ReluOfLinear(torch.autograd.Function):
    """Written by hand, with a setup of its own for the backward pass."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor) -> Tensor:
        return (h @ weight.t()).clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, weight, y = ctx.saved_tensors
        grad = grad * (y > 0)
        return grad @ weight, grad.t() @ h


class DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.mark_dirty(h)
        return h.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def _backward(m: Any, h: Tensor) -> Tensor:
    """A step of its own in every call; the gradients stay behind."""
    with torch.enable_grad():
        m.block(h.detach()).square().mean().backward()
    return h * m.block[0].weight.grad.norm()


def _adapted(m: Any, h: Tensor) -> Tensor:
    """One step of gradient descent before the layer is used."""
    with torch.enable_grad():
        loss = m.block(h).square().mean()
        grads = torch.autograd.grad(loss, list(m.block.parameters()), create_graph=True)
    weight, bias = (p - 0.1 * g for p, g in zip(m.block.parameters(), grads, strict=True))
    return F.relu(F.linear(h, weight, bias))


def _steps_of_an_optimizer(m: Any, h: Tensor) -> Tensor:
    """A code is fitted to the features, by an optimizer."""
    code = torch.zeros_like(h, requires_grad=True)
    optimizer = torch.optim.SGD([code], lr=0.1)
    with torch.enable_grad():
        for _ in range(2):
            optimizer.zero_grad()
            (m.block(code) - h.detach()).square().sum().backward(inputs=[code])
            optimizer.step()
    return code.detach()


def _penalty(m: Any, h: Tensor) -> Tensor:
    with torch.enable_grad():
        point = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(m.block(point).sum(), point, create_graph=True)
    return h + gradient


def _saved_elsewhere(m: Any, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        return m.block(h)


def _without_gradient(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * h


def _in_inference_mode(m: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        y = 2 * h
    return y.clone()


AUTOGRAD = {
    "straight through": odd(lambda m, h: Round.apply(h)),
    "straight through by detach": odd(lambda m, h: h + (h.round() - h).detach()),
    "function of numpy": odd(lambda m, h: NumpyTanh.apply(h)),
    "function with a context set up": odd(
        lambda m, h: ReluOfLinear.apply(h, m.w), w=lambda: nn.Parameter(torch.ones(5, 5))
    ),
    "function that writes": odd(lambda m, h: DoubledInPlace.apply(h.clone())),
    "no gradient": (odd(_without_gradient), PLAIN + BESIDE),
    "inference mode": (odd(_in_inference_mode), PLAIN + BESIDE),
    "checkpoint, reentrant": (
        odd(lambda m, h: checkpoint(m.block, h, use_reentrant=True), block=block),
        PLAIN + 2 * BESIDE,
    ),
    "checkpoint": (odd(lambda m, h: checkpoint(m.block, h, use_reentrant=False), block=block), PLAIN + 2 * BESIDE),
    "saved tensors moved": (odd(_saved_elsewhere, block=block), PLAIN + 2 * BESIDE),
    "backward": odd(_backward, block=block),
    "adapted by a gradient": odd(_adapted, block=block),
    "steps of an optimizer": odd(_steps_of_an_optimizer, block=block),
    "gradient as features": odd(_penalty, block=block),
    "gradient of a function": odd(lambda m, h: torch.func.grad(lambda t: t.square().sum())(h)),
    "forward derivative": odd(lambda m, h: torch.func.jvp(m.block, (h,), (torch.ones_like(h),))[1], block=block),
    "jacobian": odd(lambda m, h: torch.func.jacrev(m.block)(h[0]).sum() * h, block=block),
    "vmap": odd(lambda m, h: torch.vmap(lambda row: 2 * row)(h)),
    "vmap of a layer": odd(lambda m, h: torch.func.vmap(m.block, chunk_size=3)(h), block=block),
    "gradient of every row": odd(lambda m, h: torch.vmap(torch.func.grad(lambda row: row.pow(2).sum()))(h)),
    "called with other weights": odd(
        lambda m, h: torch.func.functional_call(m.block, {"0.bias": torch.ones(5).double()}, (h,)), block=block
    ),
    "called with its own weights": (
        odd(lambda m, h: torch.func.functional_call(m.block, dict(m.block.named_parameters()), h), block=block),
        PLAIN + 2 * BESIDE,
    ),
}


@every(AUTOGRAD)
def test_what_is_done_to_gradients(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    group = check(make(), x)
    assert units in (None, group.num_units)


# Tensors of other kinds -----------------------------------------------------------------------------------------------


class Tagged(Tensor):
    """Stays what it is through every function."""


class Counted(Tensor):
    """Sees every function."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """Has its numbers in another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner_args, inner_kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        output = tree_map_only(Tensor, cls, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, args, kwargs or {}, output)


class Flattened(Wrapped):
    """Says how it is taken apart."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Flattened:
        return Flattened(parts["inner"])


class Unwrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Wrapped) -> Tensor:
        return h.inner.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _adjacency() -> Tensor:
    return (torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).double()


def _quantized_layer() -> nn.Module:
    layers = nn.Sequential(nn.Linear(5, 5))
    return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)


def _by_parts(m: Any, h: Tensor) -> Tensor:
    y = torch.view_as_complex(torch.stack([h, h.flip(0)], -1)) * 1j
    return y.real + torch.view_as_real(y)[..., 1]


def _wrapped(kind: type[Tensor]) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(kind(torch.ones(5, dtype=torch.float64)))


def _jagged(m: Any, h: Tensor) -> Tensor:
    nested = torch.nested.as_nested_tensor([h[:3], h[3:]], layout=torch.jagged)
    return torch.cat((2 * nested).relu().unbind())


def _padded(m: Any, h: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor([h[:3], h[3:]]).to_padded_tensor(0.5).flatten(0, 1)


KINDS = {
    "fourier": odd(lambda m, h: torch.fft.ifft(2 * torch.fft.fft(h)).real),
    "fourier amplitudes": odd(lambda m, h: torch.fft.fft2(h).abs()),
    "real fourier": odd(lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=0), n=8, dim=0)),
    "viewed as complex": odd(_by_parts),
    "polar": odd(lambda m, h: torch.polar(h, h).real),
    "complex parameter": odd(
        lambda m, h: (h * m.w).abs(), w=lambda: nn.Parameter(torch.ones(5, dtype=torch.complex128))
    ),
    "complex layer": odd(
        lambda m, h: m.block(h.to(torch.complex128)).abs(), block=lambda: nn.Linear(5, 5, dtype=torch.complex128)
    ),
    "sparse adjacency": odd(lambda m, h: torch.sparse.mm(m.adjacency, h), adjacency=lambda: _adjacency().to_sparse()),
    "sparse rows": odd(lambda m, h: m.adjacency @ h, adjacency=lambda: _adjacency().to_sparse_csr()),
    "made sparse": odd(lambda m, h: (2 * h.to_sparse()).to_dense()),
    "sparse gradient": odd(
        lambda m, h: h + m.embedding(m.index),
        embedding=lambda: nn.Embedding(9, 5, sparse=True),
        index=lambda: torch.arange(8),
    ),
    "quantized": odd(lambda m, h: torch.quantize_per_tensor(h.float(), 0.1, 0, torch.quint8).dequantize().double()),
    "quantized in name": odd(lambda m, h: torch.fake_quantize_per_tensor_affine(h.float(), 0.1, 0, 0, 255).double()),
    "quantized layer": odd(lambda m, h: m.block(h.float()).double(), block=_quantized_layer),
    "integers": odd(lambda m, h: (10 * h).long().bitwise_and(7).double()),
    "bits": odd(lambda m, h: h.detach().view(torch.int64).bitwise_xor(1 << 51).view(torch.float64)),
    "tagged": odd(lambda m, h: (2 * h.as_subclass(Tagged)).relu().as_subclass(Tensor)),
    "counted": odd(lambda m, h: (2 * h.as_subclass(Counted)).relu().as_subclass(Tensor)),
    "tagged parameter": odd(
        lambda m, h: (h * m.w).as_subclass(Tensor), w=lambda: nn.Parameter(torch.ones(5).double().as_subclass(Tagged))
    ),
    "wrapped": odd(lambda m, h: (2 * Wrapped(h.detach())).inner),
    "wrapped weight and features": odd(lambda m, h: (Wrapped(h.detach()) * Wrapped(m.head.weight.detach()[0])).inner),
    "wrapped parameter": odd(lambda m, h: Unwrap.apply(h * m.w), w=_wrapped(Wrapped)),
    "flattened parameter": odd(lambda m, h: Unwrap.apply(h * m.w), w=_wrapped(Flattened)),
    "padded": odd(_padded),
    "no columns": odd(lambda m, h: torch.cat([h, m.none(h[:, :0])], 1)[:, :5], none=lambda: nn.Linear(0, 2).double()),
    "no rows": odd(lambda m, h: torch.cat([h, m.block(h[:0])]), block=block),
    "layer of no outputs": odd(lambda m, h: torch.cat([m.none(h), h], 1), none=lambda: nn.Linear(5, 0).double()),
}


@every(KINDS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_tensors_of_other_kinds(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    check(make(), x)


def test_rows_of_different_lengths(x: Tensor) -> None:
    survive(Beside(_jagged), x)


@pytest.mark.parametrize("make", [ResidualMLP, ResNet, norm_cnn, partial(mlp, 3, 4, 5, 2)])
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_without_memory_has_as_many_units(make: Callable[[], nn.Module], inside: bool) -> None:
    shape = (2, 1, 8, 8) if make in (ResNet, norm_cnn) else (8, 3)
    expected = scaling_group(make(), torch.randn(shape))
    with torch.device("meta"):
        module, inputs = make(), torch.randn(shape)
        group = scaling_group(module, inputs) if inside else None
    group = group or scaling_group(module, inputs)
    assert group.num_units == expected.num_units > 0
    assert [c.parameter for c in group.couplings] == [c.parameter for c in expected.couplings]
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("real", [False, True], ids=["", "data"])
def test_an_empty_batch_shows_no_freedoms_that_there_are_not(real: bool, x: Tensor) -> None:
    module = Beside(lambda m, h: h if bool(torch.ones(()) > 0) or not real else -h)
    draw_(module, torch.Generator().manual_seed(0))
    group = scaling_group(module, x[:0])
    before = call(module, x)
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(call(module, x), before)


# Memory ---------------------------------------------------------------------------------------------------------------


def _views_changed(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1:3].mul_(2)
    h.t()[0].neg_()
    h.view(-1)[::7].zero_()
    return h


def _overlap_changed(m: Any, h: Tensor) -> Tensor:
    h = h.detach().clone()
    h.as_strided((10, 4), (4, 1)).mul_(3)
    return h


def _out(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.mul(h, 2, out=torch.empty_like(h))


def _out_into_a_part(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h).detach()
    with torch.no_grad():
        torch.mm(h, m.w, out=y[:, :5])
        torch.add(y[:, 0], 1, out=y[:, 1])
        torch.exp(h[:, 2], out=y[:, 2])
    return y


def _data_assigned(m: Any, h: Tensor) -> Tensor:
    h.data = h.data.flip(1) * torch.arange(1, 6)
    return h


def _data_exchanged(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y.data = h.data.sinh()
    return y


def _data_changed(m: Any, h: Tensor) -> Tensor:
    h.data.clamp_(max=0.7)
    return h


def _resized(m: Any, h: Tensor) -> Tensor:
    h = h.detach().clone().resize_(10, 4)
    return h.mul_(2).resize_(8, 5)


def _weights_clipped(m: Any, h: Tensor) -> Tensor:
    for p in m.head.parameters():
        p.data.clamp_(-0.7, 0.7)
    return h


def _weights_assigned(m: Any, h: Tensor) -> Tensor:
    m.head.weight.data = m.head.weight.data.clamp(-0.7, 0.7)
    return h


def _weights_scaled(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.head.weight.copy_(m.head.weight / m.head.weight.norm())
    return h


def _weights_averaged(m: Any, h: Tensor) -> Tensor:
    """A slow copy of the layer follows it."""
    with torch.no_grad():
        for slow, fast in zip(m.slow.parameters(), m.block.parameters(), strict=True):
            slow.lerp_(fast, 0.5)
    return m.block(h) + m.slow(h)


def _running_mean(m: Any, h: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    m.count += 1
    return h - m.mean


def _queue(m: Any, h: Tensor) -> Tensor:
    place = int(m.count) % 8
    m.queue[place] = h.detach()[0]
    m.count += 1
    return h @ m.queue[:5]


def _rebound(m: Any, h: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    m.last = h.detach()
    return h


def _counted(m: Any, h: Tensor) -> Tensor:
    m.count += 1
    m.double_count = 2 * m.count
    return h


def _zeros(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape, dtype=torch.float64)


MEMORY = {
    "strided": odd(lambda m, h: h.as_strided((8, 5), (5, 1)) * 2),
    "overlapping": odd(lambda m, h: h.as_strided((7, 5), (4, 1), 2)),
    "strided weight": odd(lambda m, h: h * m.head.weight.as_strided((5,), (2,))),
    "strided from storage": odd(lambda m, h: h[:, 1:].as_strided((8, 5), (5, 1), 0)),
    "transposed and flat": odd(lambda m, h: h.t().reshape(-1).view(8, 5)),
    "views changed": odd(_views_changed),
    "overlap changed": odd(_overlap_changed),
    "features changed": odd(lambda m, h: h.mul_(3).add_(0)),
    "swapped": odd(lambda m, h: h.clone().transpose_(0, 1).t_().unsqueeze_(0).squeeze_(0)),
    "out": odd(_out),
    "out into a part": odd(_out_into_a_part, w=lambda: torch.ones(5, 5)),
    "data assigned": odd(_data_assigned),
    "data exchanged": odd(_data_exchanged),
    "data changed": odd(_data_changed),
    "resized": odd(_resized),
    "weights clipped": odd(_weights_clipped),
    "weights assigned": odd(_weights_assigned),
    "weights scaled": odd(_weights_scaled),
    "weights averaged": odd(_weights_averaged, block=block, slow=block),
    "running mean": odd(_running_mean, mean=_zeros(5), count=lambda: torch.tensor(0)),
    "queue": odd(_queue, queue=_zeros(8, 5), count=lambda: torch.tensor(3)),
    "rebound": odd(_rebound, mean=_zeros(5), last=_zeros(8, 5)),
    "count": (odd(_counted, count=lambda: torch.tensor(0), double_count=lambda: torch.tensor(0)), PLAIN + BESIDE),
    "batch norm": (
        odd(lambda m, h: m.block(h), block=lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())),
        PLAIN + BESIDE,
    ),
}


@every(MEMORY)
def test_what_is_done_to_memory(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    group = check(make(), x)
    assert units in (None, group.num_units)


def _append(m: Any, h: Tensor) -> None:
    m.state.append(float(h.sum()))


def _set(m: Any, h: Tensor) -> None:
    m.state["sum"] = h.sum()


def _count(m: Any, h: Tensor) -> None:
    m.state.count += int(h.sum() > 0) + 1


STATE = {
    "number": (lambda: 0, lambda m, h: setattr(m, "state", m.state + 1)),
    "list": (list, _append),
    "list in a dict": (lambda: {"a": [1]}, lambda m, h: m.state["a"].append(h)),
    "queue": (lambda: deque([1], maxlen=3), _append),
    "set": (set, lambda m, h: m.state.add(float(h.sum()))),
    "dict": (dict, _set),
    "ordered dict": (OrderedDict, _set),
    "default dict": (lambda: defaultdict(list), lambda m, h: m.state["a"].append(h)),
    "counter": (Counter, lambda m, h: m.state.update(a=1)),
    "user's dict": (UserDict, _set),
    "namespace": (lambda: types.SimpleNamespace(count=0), _count),
    "array": (lambda: np.zeros(2), lambda m, h: m.state.__setitem__(0, float(h.sum()))),
    "tensor": (lambda: [torch.zeros(5).double()], lambda m, h: m.state[0].copy_(h.detach()[0])),
    "generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda m, h: torch.rand(int(h.sum() > 0) + 1, generator=m.state),
    ),
    "seed": (lambda: 0, lambda m, h: torch.manual_seed(int(h.sum() > 0))),
    "randomness of python": (lambda: 0, lambda m, h: random.random()),
    "randomness of numpy": (lambda: 0, lambda m, h: np.random.rand()),
    "mode": (lambda: 0, lambda m, h: m.body.eval()),
    "gradients asked for": (lambda: 0, lambda m, h: m.spare.requires_grad_(False)),
    "gradients": (lambda: 0, lambda m, h: m.spare(h.detach()).sum().backward()),
    "more gradients": (lambda: 0, lambda m, h: (m.body[0].weight * h[0, 0].detach()).sum().backward()),
    "attribute deleted": (lambda: 0, lambda m, h: delattr(m, "state")),
    "buffer added": (lambda: 0, lambda m, h: m.register_buffer("more", torch.zeros(2))),
    "parameter added": (lambda: 0, lambda m, h: m.register_parameter("more", nn.Parameter(torch.zeros(2)))),
    "layer added": (lambda: 0, lambda m, h: m.add_module("more", nn.Linear(2, 2))),
    "hook added": (lambda: 0, lambda m, h: m.body.register_forward_hook(lambda *_: None)),
}


@pytest.mark.parametrize(("make", "change"), STATE.values(), ids=STATE)
@pytest.mark.parametrize("real", [False, True], ids=["", "data"])
def test_state_of_every_kind_stays_as_it_is(
    make: Callable[[], Any], change: Callable[[Any, Tensor], None], real: bool, x: Tensor
) -> None:
    def between(m: Any, h: Tensor) -> Tensor:
        change(m, h)
        return h if not real or bool(torch.ones(()) > 0) else -h

    module = Beside(between, spare=nn.Linear(5, 1))
    module.state = make()
    for p in module.body.parameters():
        p.grad = torch.ones_like(p)
    seed_all(5)
    state, states = state_of(module), random_states()
    group = scaling_group(module, x)
    assert state_of(module) == state
    assert random_states() == states
    assert freedoms(group, "plain.") == PLAIN


# Compilers and other modes --------------------------------------------------------------------------------------------


def _scripted() -> nn.Module:
    return torch.jit.script(block())


def _traced() -> nn.Module:
    return torch.jit.trace(block(), torch.zeros(8, 5, dtype=torch.float64))


def _frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(block().eval()))


def _doubled_unless_large(h: Tensor) -> Tensor:
    if bool(h.sum() > 1e9):
        return h
    return 2 * h


@torch.library.custom_op("lightning_ecopt_tests::twice", mutates_args=())
def twice(h: Tensor) -> Tensor:
    return torch.from_numpy(2 * h.numpy())


@torch.library.custom_op("lightning_ecopt_tests::thrice", mutates_args=())
def thrice(h: Tensor) -> Tensor:
    return 3 * h


@thrice.register_fake
def _(h: Tensor) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("lightning_ecopt_tests::add_one_", mutates_args={"h"})
def add_one_(h: Tensor) -> None:
    h.add_(1)


def _written_by_an_operation(m: Any, h: Tensor) -> Tensor:
    h = h.detach().clone()
    add_one_(h)
    return h


class Shifted(TorchFunctionMode):
    """Adds one to all that is halved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output + 1 if func in (Tensor.div, Tensor.__truediv__) else output


class Logged(TorchDispatchMode):
    """Doubles whatever is added."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.ops.aten.add.Tensor else output


def _within(mode: Callable[[], Any], function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def between(m: Any, h: Tensor) -> Tensor:
        with mode():
            return function(m, h)

    return between


def _shape_asked_for(m: Any, h: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = m.block(mode.from_tensor(h.detach())).shape
    return h.view(shape)


def _another_default(m: Any, h: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return h * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    finally:
        torch.set_default_dtype(before)


MODES = {
    "scripted": (odd(lambda m, h: m.block(h), block=_scripted), PLAIN + 2 * BESIDE),
    "traced by jit": (odd(lambda m, h: m.block(h), block=_traced), PLAIN + 2 * BESIDE),
    "scripted and frozen": odd(lambda m, h: m.block(h), block=_frozen),
    "scripted function": odd(lambda m, h: m.function(h), function=lambda: torch.jit.script(_doubled_unless_large)),
    "forked": odd(lambda m, h: torch.jit.wait(torch.jit.fork(m.block, h)), block=block),
    "symbolically traced": (
        odd(lambda m, h: m.block(h), block=lambda: torch.fx.symbolic_trace(block())),
        PLAIN + 2 * BESIDE,
    ),
    "traced in the call": odd(lambda m, h: make_fx(lambda t: 2 * t.relu())(h)(h)),
    "exported": odd(
        lambda m, h: m.block(h),
        block=lambda: torch.export.export(block(), (torch.zeros(8, 5, dtype=torch.float64),)).module(),
    ),
    "cond": odd(lambda m, h: torch.cond(h.sum() > 0, lambda t: t.sinh(), lambda t: 3 * t, (h,))),
    "cond of a layer": odd(lambda m, h: torch.cond(h.sum() > 0, m.block, lambda t: 3 * t, (h,)), block=block),
    "operation of one's own": odd(lambda m, h: twice(h.detach())),
    "operation with a fake form": odd(lambda m, h: thrice(h.detach())),
    "operation that writes": odd(_written_by_an_operation),
    "function mode": odd(_within(Shifted, lambda m, h: h / 2)),
    "dispatch mode": odd(_within(Logged, lambda m, h: h + 1)),
    "device": (odd(_within(partial(torch.device, "cpu"), lambda m, h: h * torch.ones(5))), PLAIN + BESIDE),
    "shape asked for": odd(_shape_asked_for, block=block),
    "profiler": (odd(_within(partial(torch.profiler.record_function, "a"), lambda m, h: 2 * h)), PLAIN + BESIDE),
    "anomalies": (odd(_within(torch.autograd.detect_anomaly, lambda m, h: 2 * h)), PLAIN + BESIDE),
    "another default": odd(_another_default),
}


@every(MODES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_compilers_and_other_modes(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    group = check(make(), x)
    assert units in (None, group.num_units)


class Backend:
    """Compiles nothing, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.calls += 1
        return graph.forward


def _compiled_model(backend: Backend) -> nn.Module:
    return torch.compile(Beside(lambda m, h: m.block(h), block=block()), backend=backend)


def _compiled_in_place(backend: Backend) -> nn.Module:
    module = Beside(lambda m, h: m.block(h), block=block())
    module.compile(backend=backend)
    return module


def _compiled_part(backend: Backend) -> nn.Module:
    return Beside(lambda m, h: m.block(h), block=torch.compile(block(), backend=backend))


def _compiled_function(backend: Backend) -> nn.Module:
    function = torch.compile(lambda layer, h: layer(h), backend=backend)
    return Beside(lambda m, h: function(m.block, h), block=block())


def _compiled_method(backend: Backend) -> nn.Module:
    module = Beside(lambda m, h: m.block(h), block=block())
    module.block.forward = torch.compile(module.block.forward, backend=backend)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make", [_compiled_model, _compiled_in_place, _compiled_part, _compiled_function, _compiled_method]
)
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_compiled_modules_and_functions_are_not_compiled_again(
    make: Callable[[Backend], nn.Module], called: bool, x: Tensor
) -> None:
    backend = Backend()
    module = make(backend)
    draw_(module, torch.Generator().manual_seed(0))
    before = call(module, x) if called else None
    calls = backend.calls
    assert (calls > 0) == called
    group = scaling_group(module, x)
    assert backend.calls == calls
    assert group.num_units == PLAIN + 2 * BESIDE
    assert freedoms(group, "plain.") == PLAIN
    assert set(group.parameters) == {name for name, _ in module.named_parameters()}
    before = call(module, x) if before is None else before
    calls = backend.calls
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(call(module, x), before)
    assert backend.calls == calls > 0


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
@pytest.mark.parametrize("real", [False, True], ids=["", "data"])
def test_autocast_to_fewer_digits(around: bool, real: bool, x: Tensor) -> None:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)

    class Cast(Beside):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(enabled=not around or torch.is_autocast_enabled("cpu")):
                y = super().forward(x)
            return y if not real or bool(torch.ones(()) > 0) else (y[1], y[0])

    module = Cast(lambda m, h: m.block(h), block=block()).float()
    group = check(module, x.float(), binary=True, within=autocast if around else nullcontext)
    assert group.num_units == PLAIN + 2 * BESIDE


# What modules do to themselves ----------------------------------------------------------------------------------------


def _replaced(m: Any, h: Tensor) -> Tensor:
    m.block = nn.Linear(5, 5).double()
    return m.block(h)


def _chosen(m: Any, h: Tensor) -> Tensor:
    m.block = random.choice(list(m.choices))
    return m.block(h)


def _dropped_layers(m: Any, h: Tensor) -> Tensor:
    for layer in m.choices:
        if torch.rand(()) > 0.3:
            h = layer(h)
    return h


def _frozen_for_a_while(m: Any, h: Tensor) -> Tensor:
    m.block.requires_grad_(False)
    y = m.block(h)
    m.block.requires_grad_(True)
    return y


def _shared() -> nn.Module:
    module = Beside(lambda m, h: m.again(m.block(h)) + F.linear(h, m.third), block=nn.Linear(5, 5))
    module.again, module.third = module.block, module.block.weight
    return module


def _lazy() -> nn.Module:
    module = Beside(lambda m, h: m.block(h), block=nn.Sequential(nn.LazyLinear(5, dtype=torch.float64), nn.ReLU()))
    module(torch.zeros(8, 3, dtype=torch.float64))
    return module


def _hooked() -> nn.Module:
    """Hooks before and after that change what passes."""
    module = Beside(lambda m, h: m.block(h), block=block())
    module.block.register_forward_pre_hook(lambda part, inputs: (2 * inputs[0],))
    module.block.register_forward_hook(lambda part, inputs, output: 3 * output)
    module.block[0].register_forward_hook(lambda part, inputs, output: output.flip(1))
    return module


def _hooked_by_keyword() -> nn.Module:
    module = Beside(lambda m, h: m.block(input=h), block=nn.Linear(5, 5))
    module.block.register_forward_pre_hook(
        lambda part, args, kwargs: (args, {"input": kwargs["input"].exp()}), with_kwargs=True
    )
    module.body.register_full_backward_hook(lambda part, before, after: None)
    module.body.register_full_backward_pre_hook(lambda part, after: None)
    return module


def _features_by_hook() -> nn.Module:
    """What a hook has seen is used elsewhere."""
    seen: list[Tensor] = []
    module = Beside(lambda m, h: h + seen.pop().exp())
    module.body[0].register_forward_hook(lambda part, inputs, output: seen.append(output))
    return module


def _hooked_on_tensors(m: Any, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda grad: 2 * grad)
        h.retain_grad()
    return h


def _weak() -> nn.Module:
    module = Beside(lambda m, h: m.parent()(h) * m.table.get(m.body, 1), block=block())
    module.parent = weakref.ref(module.block)
    module.table = weakref.WeakKeyDictionary({module.body: 2.0})
    return module


def _proxied() -> nn.Module:
    module = Beside(lambda m, h: m.parent(h), block=block())
    object.__setattr__(module, "parent", weakref.proxy(module.block))
    return module


class Managed(nn.Module):
    """Answers for attributes that it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        return self.inner[0].weight

    def __call__(self, h: Tensor) -> Tensor:
        return self.inner(h)


def _with_forward_of_its_own() -> nn.Module:
    module = Beside()
    module.body.forward = lambda x: F.relu(module.body[0](x)) * 2  # type: ignore[method-assign]
    return module


def _in_a_cache(m: Any, h: Tensor) -> Tensor:
    with parametrize.cached():
        return m.block(h) + m.block(2 * h)


def _failed(m: Any, h: Tensor) -> Tensor:
    with suppress(RuntimeError):
        return h @ h
    return 2 * h


def _failed_half_way(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    try:
        y.copy_(h)
        y += m.block(h)
        raise KeyError("nobody hears")
    except KeyError:
        return y.exp()


def _failed_in_a_layer(m: Any, h: Tensor) -> Tensor:
    try:
        return m.block(h[:, :2])
    except RuntimeError as error:
        return h * len(str(error)[:3])


def _without_accelerator(m: Any, h: Tensor) -> Tensor:
    try:
        return 3 * h.to("cuda").cpu()
    except (RuntimeError, AssertionError):
        return 2 * h


def _in_threads(m: Any, h: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(m.block, h.chunk(2))))


def _written_in_a_thread(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h).detach()
    thread = threading.Thread(target=lambda: y.copy_(h.detach().exp()))
    thread.start()
    thread.join()
    return y


def _weights_in_a_thread(m: Any, h: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return h * pool.submit(lambda: m.head.weight[0].detach().exp()).result()


def _in_coroutines(m: Any, h: Tensor) -> Tensor:
    async def half(part: Tensor) -> Tensor:
        await asyncio.sleep(0)
        return m.block(part)

    async def both() -> list[Tensor]:
        return await asyncio.gather(*map(half, h.chunk(2)))

    return torch.cat(asyncio.run(both()))


def _by_generator(m: Any, h: Tensor) -> Tensor:
    def parts() -> Iterator[Tensor]:
        received = yield h
        yield 2 * received

    steps = parts()
    next(steps)
    return steps.send(h.flip(0))


THEMSELVES = {
    "layer replaced": odd(_replaced, block=block),
    "layer chosen": odd(_chosen, choices=lambda: nn.ModuleList([block(), block()])),
    "layers dropped": odd(_dropped_layers, choices=lambda: nn.ModuleList([block(), block()])),
    "layer made": odd(lambda m, h: nn.Linear(5, 5, dtype=torch.float64)(h)),
    "parameter made": odd(lambda m, h: h * nn.Parameter(torch.arange(5.0))),
    "cast": (odd(lambda m, h: m.block.double()(h), block=block), PLAIN + 2 * BESIDE),
    "frozen for a while": (odd(_frozen_for_a_while, block=block), PLAIN + 2 * BESIDE),
    "evaluated for a while": odd(lambda m, h: m.block.eval()(h) * (not m.block.train().training or 2), block=block),
    "two names": _shared,
    "lazy, by now made": (_lazy, PLAIN + 2 * BESIDE),
    "hooks": (_hooked, PLAIN + 2 * BESIDE),
    "hooks with keywords": _hooked_by_keyword,
    "features by hook": _features_by_hook,
    "hooks on tensors": (odd(_hooked_on_tensors), PLAIN + BESIDE),
    "weak references": (_weak, PLAIN + 2 * BESIDE),
    "proxy": (_proxied, PLAIN + 2 * BESIDE),
    "attributes of others": (odd(lambda m, h: m.block(h), block=Managed), PLAIN + 2 * BESIDE),
    "forward of its own": (_with_forward_of_its_own, PLAIN + BESIDE),
    "data parallel": (odd(lambda m, h: m.block(h), block=lambda: nn.DataParallel(block())), PLAIN + 2 * BESIDE),
    "parametrised": odd(_in_a_cache, block=lambda: parametrizations.weight_norm(nn.Linear(5, 5))),
    "orthogonal": odd(lambda m, h: m.block(h), block=lambda: parametrizations.orthogonal(nn.Linear(5, 5))),
    "old weight norm": odd(lambda m, h: m.block(h), block=lambda: torch.nn.utils.weight_norm(nn.Linear(5, 5).double())),
    "failed": odd(_failed),
    "failed half way": odd(_failed_half_way, block=block),
    "failed in a layer": odd(_failed_in_a_layer, block=block),
    "without accelerator": odd(_without_accelerator),
    "threads": odd(_in_threads, block=block),
    "written in a thread": odd(_written_in_a_thread),
    "weights in a thread": odd(_weights_in_a_thread),
    "coroutines": (odd(_in_coroutines, block=block), PLAIN + 2 * BESIDE),
    "generator": odd(_by_generator),
    "dropout": (odd(lambda m, h: F.dropout(h, 0.5)), PLAIN + BESIDE),
    "noise that the data scale": odd(lambda m, h: torch.normal(h.detach(), 1.0)),
    "coins": odd(lambda m, h: h * torch.bernoulli(h.sigmoid())),
    "draw": odd(lambda m, h: h + torch.multinomial(h.softmax(1), 1)),
    "random rectifier": (odd(lambda m, h: F.rrelu(-h, training=True)), PLAIN + BESIDE),
    "warning": (odd(lambda m, h: [warnings.warn("as it is", stacklevel=1), h][1]), PLAIN + BESIDE),
}


@every(THEMSELVES)
@pytest.mark.filterwarnings("ignore:as it is", "ignore:.*weight_norm.*:FutureWarning")
def test_what_modules_do_to_themselves(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    group = check(make(), x)
    assert units in (None, group.num_units)


# Inputs and outputs ---------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class ModelOutput(OrderedDict):
    """A dictionary whose fields are attributes, ``None`` left out."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Slots:
    """Has no dictionary of attributes."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Batch:
    """An object that knows its tensors by name."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Wrap(nn.Module):
    """What an ordinary network returns, and hidden features, in some structure."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.plain, self.other, self.wrap = mlp(3, 4, 2), mlp(3, 5, 2), wrap
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.plain(x), F.relu(self.other[0](x)))


def _closure(y: Tensor, h: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cat([y, h], 1)


def _yielded(y: Tensor, h: Tensor) -> Iterator[Tensor]:
    yield y
    yield 2 * h


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "model output": (lambda y, h: ModelOutput(y, (h, None)), lambda out: out),
    "model output without fields": (lambda y, h: ModelOutput(y), lambda out: out.logits),
    "ordered dict": (lambda y, h: OrderedDict(a=y, b=None, c=h), lambda out: out),
    "user's dict": (lambda y, h: UserDict(a=y, b=h), lambda out: dict(out)),
    "named tuple": (lambda y, h: Pair(y, Pair(None, h)), lambda out: out),
    "list": (lambda y, h: [y, [h, "text", 3]], lambda out: out),
    "queue": (lambda y, h: deque([y, h]), list),
    "rows": (lambda y, h: (y.unbind(), dict(enumerate(h))), lambda out: out),
    "distribution": (lambda y, h: (torch.distributions.Normal(h, 1.0), y), lambda out: (out[0].mean, out[1])),
    "transformed distribution": (
        lambda y, h: torch.distributions.LogNormal(torch.cat([y, h], 1), 1.0),
        lambda out: out.base_dist.mean,
    ),
    "packed": (lambda y, h: nn.utils.rnn.pack_sequence([y.flatten(), h.flatten()], False), lambda out: out.data),
    "sparse": (lambda y, h: (y, h.to_sparse()), lambda out: (out[0], out[1].to_dense())),
    "complex": (lambda y, h: (y, torch.complex(h, h)), lambda out: (out[0], torch.view_as_real(out[1]))),
    "object": (lambda y, h: types.SimpleNamespace(y=y, more=types.SimpleNamespace(h=h)), lambda out: out),
    "object without a dictionary": (lambda y, h: Slots([y, Slots(h)]), lambda o: [o.value[0], o.value[1].value]),
    "array": (lambda y, h: (y, h.detach().numpy()), lambda out: (out[0], torch.from_numpy(out[1]))),
    "numbers": (lambda y, h: (y, h.sum().item(), h[0].tolist()), lambda out: (out[0], torch.tensor(out[2]).double())),
    "iterator": (lambda y, h: iter([y, h]), list),
    "generator": (_yielded, list),
    "function": (_closure, lambda out: out()),
    "part of a function": (lambda y, h: partial(torch.cat, [y, h], 1), lambda out: out()),
    "module": (
        lambda y, h: nn.ParameterDict({"a": nn.Parameter(y.detach()), "b": nn.Parameter(h.detach())}),
        lambda out: [out["a"], out["b"]],
    ),
    "attribute of a tensor": (
        lambda y, h: [setattr(y, "hidden", h), y][1],
        lambda out: (out, out.hidden),
    ),
}


@pytest.mark.parametrize(("wrap", "read"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_in_any_structure(wrap: Callable[[Tensor, Tensor], Any], read: Callable[[Any], Any], x: Tensor) -> None:
    check(Wrap(wrap), x, read=read)


@pytest.mark.parametrize("output", [None, (), {}, "text", 3.0, (None, None), torch.arange(3)])
def test_outputs_that_say_nothing(output: Any, x: Tensor) -> None:
    scaling_group(Wrap(lambda y, h: output), x)


class Take(nn.Module):
    """Finds its input with a function."""

    def __init__(self, take: Callable[..., Tensor]) -> None:
        super().__init__()
        self.plain, self.take = mlp(3, 4, 2).double(), take

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.plain(self.take(*args, **kwargs))


INPUTS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "keywords alone": (lambda *, x, scale=1.0: x * scale, lambda x: ((), {"x": x, "scale": 2.0})),
    "list": (lambda parts: sum(parts), lambda x: (([x, x],), {})),
    "none": (lambda a, x, b=None: x if a is b is None else b, lambda x: ((None, x), {"b": None})),
    "named tuple": (lambda pair: pair.second, lambda x: ((Pair(None, x),), {})),
    "model output": (lambda out: out.logits + out["hidden"][0], lambda x: ((ModelOutput(x, (x,)),), {})),
    "ordered dict": (lambda d: d["x"], lambda x: ((OrderedDict(x=x),), {})),
    "user's dict": (lambda d: d["x"], lambda x: ((UserDict(x=x),), {})),
    "nested": (lambda d: d["a"][0]["b"][1], lambda x: (({"a": [{"b": (None, x)}]},), {})),
    "object": (lambda batch: batch.x, lambda x: ((Batch(x),), {})),
    "object without a dictionary": (lambda batch: batch.value, lambda x: ((Slots(x),), {})),
    "numbers": (lambda n, s, f, x: x * n * f * len(s), lambda x: ((2, "abc", 0.5, x), {})),
    "array": (lambda a: torch.from_numpy(a), lambda x: ((x.numpy(),), {})),
    "packed": (lambda p: p.data, lambda x: ((nn.utils.rnn.pack_sequence([x[:5], x[5:]]),), {})),
    "function": (lambda make: make(), lambda x: ((lambda: x,), {})),
    "module": (lambda part, x: part(x), lambda x: ((nn.Linear(3, 3).double(), x), {})),
    "parameter": (lambda p: p, lambda x: ((nn.Parameter(x),), {})),
    "asks for a gradient": (lambda x: x * 2, lambda x: ((x.clone().requires_grad_(),), {})),
    "part of a graph": (lambda x: x * 2, lambda x: ((x.clone().requires_grad_() * 3,), {})),
    "sparse": (lambda x: x.to_dense(), lambda x: ((x.to_sparse(),), {})),
    "expanded": (lambda x: x + 0, lambda x: ((x[:1].expand(8, 3),), {})),
    "the same twice": (lambda a, b: a + b, lambda x: ((x, x), {})),
    "views of one another": (lambda a, b: a + b.t(), lambda x: ((x, x.t()), {})),
    "subclass": (lambda x: x.as_subclass(Tensor), lambda x: ((x.as_subclass(Tagged),), {})),
    "wrapped": (lambda x: x.inner, lambda x: ((Wrapped(x),), {})),
    "changed by data": (lambda x: x if x.sum() > 1e9 else 2 * x, lambda x: ((x,), {})),
}


@pytest.mark.parametrize(("take", "give"), INPUTS.values(), ids=INPUTS)
def test_inputs_in_any_structure(
    take: Callable[..., Tensor], give: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]], x: Tensor
) -> None:
    args, kwargs = give(x)
    assert check(Take(take), *args, **kwargs).num_units == PLAIN


def test_an_input_that_can_be_read_only_once(x: Tensor) -> None:
    module = Take(lambda parts: sum(part if part.sum() > 0 else -part for part in parts))
    assert scaling_group(module, iter([x, -x])).num_units == PLAIN


@pytest.mark.parametrize("real", [False, True], ids=["", "data"])
@pytest.mark.parametrize(
    ("give", "get"),
    [
        pytest.param(lambda x: x, lambda given: given, id="tensor"),
        pytest.param(lambda x: {"x": x}, lambda given: given["x"], id="dict"),
        pytest.param(lambda x: [(x,)], lambda given: given[0][0], id="nested"),
        pytest.param(ModelOutput, lambda given: given.logits, id="model output"),
        pytest.param(Batch, lambda given: given.x, id="object"),
    ],
)
def test_inputs_that_the_module_writes_to_stay_as_they_are(
    give: Callable[[Tensor], Any], get: Callable[[Any], Tensor], real: bool, x: Tensor
) -> None:
    def take(given: Any) -> Tensor:
        x = get(given).mul_(2)
        if isinstance(given, dict):
            given.clear()
        return x if not real or bool(torch.ones(()) > 0) else -x

    given, before = give(x), x.clone()
    group = scaling_group(Take(take), given)
    assert get(given) is x
    assert torch.equal(x, before)
    assert group.num_units == PLAIN


# The caller -----------------------------------------------------------------------------------------------------------


def _into_memory(m: Any, h: Tensor) -> Tensor:
    return torch.addmm(m.head.weight[0], h, m.block[0].weight, out=torch.empty(8, 5, dtype=h.dtype))


def _weight_changed(m: Any, h: Tensor) -> Tensor:
    m.block[0].weight.clamp_(-0.2, 0.2)
    return m.block(h)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [_into_memory, _weight_changed])
def test_a_call_that_works_only_without_gradients(
    mode: Callable[[], Any], function: Callable[[Any, Tensor], Tensor], x: Tensor
) -> None:
    check(Beside(function, block=block()), x, within=mode)


def test_inputs_made_in_inference_mode(x: Tensor) -> None:
    module = Beside(lambda m, h: m.block(h), block=block())
    with torch.inference_mode():
        group = scaling_group(module, x.clone())
        assert group.num_units == PLAIN + 2 * BESIDE


def test_a_model_within_a_model_that_is_being_traced(x: Tensor) -> None:
    found = []

    def between(m: Any, h: Tensor) -> Tensor:
        found.append(scaling_group(m.block, h.detach()).num_units)
        return m.block(h)

    check(Beside(between, block=nn.Sequential(block(), nn.Linear(5, 5))), x)
    assert set(found) == {BESIDE}


# What the module raises -----------------------------------------------------------------------------------------------


class Bespoke(Exception):
    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


def _raise(error: BaseException) -> Callable[[Any, Tensor], Tensor]:
    def between(m: Any, h: Tensor) -> Tensor:
        m.state = h
        m.mean.add_(1)
        raise error

    return between


@pytest.mark.parametrize(
    "error",
    [
        ValueError("boom"),
        RuntimeError("boom"),
        NotImplementedError("boom"),
        TypeError("boom"),
        KeyError("boom"),
        AttributeError("boom"),
        AssertionError(),
        StopIteration("boom"),
        torch.OutOfMemoryError("boom"),
        Bespoke(7, reason="boom"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("real", [False, True], ids=["", "data"])
def test_what_the_module_raises_is_raised(error: BaseException, real: bool, x: Tensor) -> None:
    function = _raise(error)
    module = Beside(lambda m, h: function(m, h if not real or h.sum() > -1 else -h), mean=torch.zeros(5))
    module.state = None
    state, states = state_of(module), random_states()
    with pytest.raises(type(error)) as caught:
        scaling_group(module, x)
    assert caught.value is error
    assert state_of(module) == state
    assert random_states() == states


def test_an_error_that_the_call_makes_is_raised(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        scaling_group(Beside(lambda m, h: m.block(h[:, :2]), block=block()), x)
    with pytest.raises(TypeError, match="forward"):
        scaling_group(Beside(), x, x)
    with pytest.raises(IndexError):
        scaling_group(Beside(lambda m, h: h[99]), x)
