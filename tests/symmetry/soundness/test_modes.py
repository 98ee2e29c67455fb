"""Compilers and other modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ecopt.symmetry import scaling_group
from tests.symmetry.helpers import assert_same, draw_
from tests.symmetry.soundness.checks import BESIDE, PLAIN, Beside, block, call, check, every, freedoms, odd, thrice

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]


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
