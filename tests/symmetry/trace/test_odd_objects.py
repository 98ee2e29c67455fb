"""Whatever a module, an input or an output holds besides tensors, a trace goes on and puts back what it can."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import ECSGD, ec_sgd, scaling_group
from lightning_ecopt.common.nested import elements, put_back, tensors_in
from tests.networks import mlp
from tests.selection import few

METHODS = (
    *("__len__", "__iter__", "__eq__", "__hash__", "__bool__", "__getattr__", "__contains__", "__getitem__"),
    *("__copy__", "__deepcopy__", "__reduce_ex__", "keys", "values", "items", "copy", "clear", "update", "extend"),
)
BASES = (tuple, list, dict, set, frozenset, deque, OrderedDict, UserDict, UserList, SimpleNamespace, object, np.ndarray)


def fails(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


def odd(base: type) -> Any:
    """An object of a class derived from ``base``, whose methods raise."""
    kind = type("Odd", (base,), dict.fromkeys(METHODS, fails))
    if base is np.ndarray:
        return np.zeros(2).view(kind)
    made = kind.__new__(kind, (1, 2)) if base in (tuple, frozenset) else kind.__new__(kind)
    if base in (UserDict, UserList):
        vars(made)["data"] = base((1, 2) if base is UserList else {"a": 1}).data
    return made


class NoClass:
    @property
    def __class__(self) -> Any:
        raise NotImplementedError


class NoDictionary:
    @property
    def __dict__(self) -> Any:
        raise NotImplementedError


class NoSlots:
    __slots__ = ("full", "unset")

    def __init__(self) -> None:
        self.full = 1

    def __getattribute__(self, name: str) -> Any:
        raise NotImplementedError


class NoValues(Mapping[str, Any]):
    __getitem__ = __iter__ = __len__ = fails


ODD: list[Any] = [
    *(pytest.param(lambda base=base: odd(base), id=base.__name__) for base in BASES),
    *(pytest.param(kind, id=kind.__name__) for kind in (NoClass, NoDictionary, NoSlots, NoValues)),
]
FEW = few(ODD, ["tuple", "dict", "ndarray", "NoClass", "NoDictionary", "NoValues"])


class Holder(nn.Module):
    def __init__(self, item: Any) -> None:
        super().__init__()
        self.net = mlp(4, 6, 2)
        vars(self)["item"], vars(self)["nested"] = item, [item, {"key": item}]

    def forward(self, x: Tensor, item: Any) -> Any:
        vars(self)["late"] = item
        return self.net(x), item


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("make", FEW)
def test_objects_that_raise_in_attributes_inputs_and_outputs(make: Any) -> None:
    item, x = make(), torch.eye(4)
    assert scaling_group(Holder(item), x, item).num_units == 6
    for optimizer_of in (lambda m: ECSGD(m.parameters(), lr=0.1), lambda m: ec_sgd(m, lr=0.1)):
        module = Holder(item)
        optimizer = optimizer_of(module)
        module(x, item)[0].sum().backward()
        optimizer.step()
        assert optimizer.group is not None
        assert optimizer.group.num_units == 6


@pytest.mark.parametrize("base", [list, dict, set, deque, OrderedDict, Counter])
def test_contents_are_put_back_past_methods_that_raise(base: Any) -> None:
    kind = type("Odd", (base,), dict.fromkeys(METHODS, fails))
    container = kind.__new__(kind)
    keyed = issubclass(base, dict)
    add = {list: list.append, set: set.add, deque: deque.append}.get(base)
    set_item = OrderedDict.__setitem__ if base is OrderedDict else dict.__setitem__
    for number in (3, 1, 2):
        set_item(container, number, torch.ones(1)) if keyed else add(container, number)
    content = elements(container)
    (OrderedDict if base is OrderedDict else dict if keyed else base).clear(container)
    put_back(container, content)
    assert [element[0] for element in elements(container)] == [element[0] for element in content]
    assert len(tensors_in(container)) == (3 if keyed else 0)


def test_an_error_of_ours_in_a_real_call_holds_all_fixed_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ecopt.symmetry.memory import Memory

    read = Memory.read

    def failing(self: Memory, tensor: Tensor) -> Any:
        if tuple(tensor.shape) == (4, 6):
            raise KeyError("ours")
        return read(self, tensor)

    monkeypatch.setattr(Memory, "read", failing)
    for optimizer_of in (lambda m: ECSGD(m.parameters(), lr=0.1), lambda m: ec_sgd(m, lr=0.1)):
        module = mlp(4, 6, 2)
        optimizer = optimizer_of(module)
        with pytest.warns(UserWarning, match="so all parameters are held fixed: KeyError"):
            module(torch.eye(4)).sum().backward()
        with pytest.warns(UserWarning, match="no scaling freedoms"):
            optimizer.step()
        assert optimizer.group is not None
        assert optimizer.group.num_units == 0
        assert optimizer.group.unseen == ()
    with pytest.warns(UserWarning, match="so all parameters are held fixed: KeyError"):
        assert scaling_group(module, torch.eye(4)).num_units == 0
