"""What nested structures and modules hold, and how to put it back."""

from __future__ import annotations

import copy
import random
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ecopt.common.nested import _walk


@contextmanager
def attributes_kept(module: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Put all attributes back, what lists, dictionaries and the like among them hold, and all sources of randomness.

    Args:
        module: whose attributes, with those of its submodules; parameters and buffers are among them.
        replaced: tensors that stand for others in the meantime, by ``id`` of these.
    """
    held = _held(module)
    containers = [item for item in held if isinstance(item, _CONTAINERS)]
    with _randomness_kept(held), _arrays_kept(held), _contents_kept(containers):
        for container in containers:
            if isinstance(container, list | dict):
                for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
                    if id(value) in replaced:
                        container[key] = replaced[id(value)]
        yield


@contextmanager
def _contents_kept(containers: list[Any]) -> Iterator[None]:
    before = [(container, copy.copy(container)) for container in containers]
    try:
        yield
    finally:
        for container, content in before:
            if list(map(id, _flat(container))) != list(map(id, _flat(content))):
                container.clear()
                if isinstance(container, list | deque):
                    container.extend(content)
                else:
                    container.update(content)


def _flat(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


_CONTAINERS = (dict, list, set, deque)
_KINDS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


def _held(module: nn.Module) -> list[Any]:
    """What a module and its submodules keep: containers, arrays, generators and tensors."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(part) for part in module.modules()]
    while waiting:
        item = waiting.pop()
        if id(item) in found:
            continue
        if type(item) in _KINDS:
            found[id(item)] = item
            waiting.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, types.SimpleNamespace | UserDict | UserList):
            waiting.append(vars(item))
        elif isinstance(item, np.ndarray | np.random.Generator | torch.Generator | Tensor):
            found[id(item)] = item
    return list(found.values())


@contextmanager
def _arrays_kept(held: list[Any]) -> Iterator[None]:
    before = [(array, array.copy()) for array in held if isinstance(array, np.ndarray)]
    try:
        yield
    finally:
        for array, values in before:
            if array.flags.writeable:
                array[...] = values


@contextmanager
def _randomness_kept(held: list[Any]) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    own = [(item, item.get_state()) for item in held if isinstance(item, torch.Generator)]
    others = [(item, item.bit_generator.state) for item in held if isinstance(item, np.random.Generator)]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in own:
            generator.set_state(state)
        for other, values in others:
            other.bit_generator.state = values


@contextmanager
def inputs_kept(inputs: Any) -> Iterator[None]:
    """Put what the inputs of a call hold back: values of tensors, contents of containers and attributes of objects."""
    parts = [part for item in _walk(inputs, objects=True) for part in (item, getattr(item, "__dict__", None))]
    containers = [part for part in parts if isinstance(part, _CONTAINERS)]
    with _contents_kept(containers), _tensors_kept([part for part in parts if isinstance(part, Tensor)]):
        yield


@contextmanager
def values_kept(module: nn.Module) -> Iterator[None]:
    """Put what a module holds back: values of parameters, gradients, buffers and attributes, and what is random."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    tensors = [item for item in _held(module) if isinstance(item, Tensor)]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    gradients = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    with torch.random.fork_rng(devices), attributes_kept(module, {}), _tensors_kept(tensors):
        try:
            yield
        finally:
            for parameter, required, gradient in gradients:
                parameter.requires_grad_(required)
                parameter.grad = gradient


@contextmanager
def _tensors_kept(tensors: list[Tensor]) -> Iterator[None]:
    before = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                if tensor.layout is not torch.strided or not torch.equal(tensor, values):
                    tensor.copy_(values)
