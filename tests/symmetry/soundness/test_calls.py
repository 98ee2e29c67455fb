"""Inputs and outputs of any structure, the caller, and what the module raises."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.symmetry import scaling_group
from tests.networks import mlp
from tests.symmetry.soundness.checks import (
    BESIDE,
    PLAIN,
    Beside,
    Tagged,
    Wrapped,
    block,
    check,
    random_states,
    state_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]

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
