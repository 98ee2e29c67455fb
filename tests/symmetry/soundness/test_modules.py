"""What modules do to themselves."""

from __future__ import annotations

import asyncio
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.symmetry.soundness.checks import BESIDE, PLAIN, Beside, block, check, every, odd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]


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
