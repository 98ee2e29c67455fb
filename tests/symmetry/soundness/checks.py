"""Nothing that a model does makes ``scaling_group`` raise or leave a trace, and what it finds is exact."""

from __future__ import annotations

import copy
import math
import multiprocessing
import random
import types
import warnings
from collections import UserDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from tests.networks import mlp
from tests.symmetry.helpers import assert_same, draw_, flat_output


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


class Tagged(Tensor):
    """Stays what it is through every function."""


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


@torch.library.custom_op("lightning_ecopt_tests::thrice", mutates_args=())
def thrice(h: Tensor) -> Tensor:
    return 3 * h


@thrice.register_fake
def _(h: Tensor) -> Tensor:
    return torch.empty_like(h)
