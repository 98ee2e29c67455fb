"""Tensors of other kinds, and what is done to their memory."""

from __future__ import annotations

import random
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import scaling_group
from tests.networks import ResidualMLP, ResNet, mlp, norm_cnn
from tests.symmetry.helpers import assert_same, draw_
from tests.symmetry.soundness.checks import (
    BESIDE,
    PLAIN,
    Beside,
    Tagged,
    Wrapped,
    block,
    call,
    check,
    every,
    freedoms,
    odd,
    random_states,
    seed_all,
    state_of,
    survive,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]

# Tensors of other kinds -----------------------------------------------------------------------------------------------


class Counted(Tensor):
    """Sees every function."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


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
