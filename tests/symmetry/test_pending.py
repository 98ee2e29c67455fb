"""What waits on a module for its next call looks like the method that it stands for."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import ec_adamw, ec_sgd, scaling_group
from lightning_ecopt.symmetry import GroupFromNextCall


class Tagger(nn.Module):
    """A model whose ``forward`` others look at, as Hugging Face's Trainer does to choose the columns of a data set."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, input_ids: Tensor, double: bool = False) -> Tensor:
        """Tag them."""
        if double:
            input_ids = 2 * input_ids
        return self.net(input_ids)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Decorated(Tagger):
    @logged
    def forward(self, input_ids: Tensor, double: bool = False) -> Tensor:
        return super().forward(input_ids, double)


X = torch.eye(4)
LOOKS: dict[str, Callable[[Any], Any]] = {
    "signature": inspect.signature,
    "signature of what it wraps": lambda method: inspect.signature(getattr(method, "__wrapped__", method)),
    "argument specification of what it wraps": lambda m: inspect.getfullargspec(getattr(m, "__wrapped__", m)),
    "is a method": inspect.ismethod,
    "source": inspect.getsource,
    "owner": lambda method: method.__self__,
    "function": lambda method: inspect.unwrap(method.__func__),
    "code": lambda method: method.__code__,
    "name": lambda method: (method.__name__, method.__qualname__, method.__module__, method.__doc__),
}


@pytest.mark.parametrize("kind", [Tagger, Decorated])
@pytest.mark.parametrize("look", LOOKS)
def test_it_looks_like_the_method(kind: type[Tagger], look: str) -> None:
    model = kind()
    expected = LOOKS[look](model.forward)
    ec_adamw(model)
    assert "forward" in vars(model)  # something waits
    assert LOOKS[look](model.forward) == expected


def test_a_method_that_the_user_has_set_on_the_instance_keeps_its_signature() -> None:
    model = Tagger()
    model.forward = functools.partial(model.forward, double=True)  # type: ignore[method-assign]
    expected, value = inspect.signature(model.forward), model(X)
    pending = GroupFromNextCall(model, "forward")
    assert inspect.signature(model.forward) == expected
    assert isinstance(model.forward, functools.partial)
    assert torch.equal(model(X), value)
    assert pending.group is not None
    assert type(model.forward) is functools.partial


@pytest.mark.parametrize("first", ["module", "optimizer"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_pair_of_module_and_optimizer_is_copied_and_waits(way: str, first: str) -> None:
    model = Tagger()
    pair = {"module": model, "optimizer": ec_adamw(model)}
    if first == "optimizer":
        pair = dict(reversed(pair.items()))
    twin = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for module, optimizer in ((each["module"], each["optimizer"]) for each in (twin, pair)):
        before = module.net[0].weight.clone()
        module(X).square().sum().backward()
        optimizer.step()
        assert optimizer.group is not None
        assert not torch.equal(before, module.net[0].weight)
        assert "forward" not in vars(module)


def test_a_pickle_holds_the_method_and_waits_no_more() -> None:
    model = Tagger()
    pending = GroupFromNextCall(model, "forward")
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(X), model.net(X))
    assert pending.group is None
    model(X)
    assert pending.group is not None


def test_a_deep_copy_waits_for_a_call_of_its_own() -> None:
    model = Tagger()
    pending = GroupFromNextCall(model, "forward")
    twin, own = copy.deepcopy((model, pending))
    twin(X)
    assert own.group is not None
    assert pending.group is None
    assert set(map(id, own.group.parameters.values())) == set(map(id, twin.parameters()))
    assert "forward" not in vars(twin)
    assert "forward" in vars(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_model_that_is_waited_for_can_be_scripted() -> None:
    model = Tagger()
    pending = GroupFromNextCall(model, "forward")
    assert torch.equal(torch.jit.script(model)(X), model(X))
    assert pending.group is not None


@pytest.mark.parametrize("inner", [False, True], ids=["wrapped", "in place"])
def test_the_call_of_a_compiled_model_is_watched(inner: bool) -> None:
    model = Tagger()
    pending = GroupFromNextCall(model, "forward")
    if inner:
        model.compile(backend="eager")
        model(X)
    else:
        torch.compile(model, backend="eager")(X)
    assert pending.group is not None
    assert pending.group.num_units == scaling_group(Tagger(), X).num_units


@pytest.mark.parametrize("inner", [False, True])
def test_another_optimizer_of_the_same_module_takes_nothing_away(inner: bool) -> None:
    """As when a cell of a notebook runs twice, or there is one of a part of the module already."""
    model = Tagger()
    ec_sgd(model.net if inner else model, lr=0.03)
    optimizer = ec_sgd(model, lr=0.03)
    model(X).square().sum().backward()
    optimizer.step()
    assert optimizer.group.num_units == 8
