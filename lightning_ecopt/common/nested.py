"""Find what nested structures hold: mappings, sequences, sets, data classes and, on request, any other objects."""

from __future__ import annotations

import dataclasses
import functools
import gc
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = str | bytes | int | float | complex | type | types.ModuleType | torch.dtype | torch.device


def tensors_in(structure: Any, *, objects: bool = False) -> list[Tensor]:
    """Find all tensors in a nested structure.

    Args:
        structure: mappings, sequences, sets and data classes, of each other and of tensors.
        objects: whether to look into other objects too: their attributes, closures of functions, iterators that wait.

    Example::

        assert tensors_in({"x": [a, (b, None)], "y": "text"}) == [a, b]  # in any order
    """
    return [item for item in walk(structure, objects=objects) if isinstance(item, Tensor)]


def walk(structure: Any, *, objects: bool) -> Iterator[Any]:
    """Yield the structure and all in it, each object once; plain values, such as numbers, are left out."""
    seen: set[int] = set()
    waiting = [structure]
    while waiting:
        item = waiting.pop()
        if item is None or isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, Tensor):
            waiting.extend(v for v in vars(item).values() if objects and isinstance(v, Tensor | dict | list | tuple))
            continue
        if isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting.extend(item)
        if objects:
            waiting.extend(_referred(item))
        elif dataclasses.is_dataclass(item):
            waiting.extend(_attributes(item).values())


def _referred(item: Any) -> list[Any]:
    """The attributes of an object, and what it holds out of sight until it is called or iterated."""
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
        return [*cells, item.__defaults__, item.__kwdefaults__]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, item.args, item.keywords]
    if isinstance(item, types.GeneratorType):
        return list(item.gi_frame.f_locals.values()) if item.gi_frame is not None else []
    if isinstance(item, Iterator):
        return gc.get_referents(item)
    return list(_attributes(item).values())


def _attributes(item: Any) -> dict[str, Any]:
    """The attributes of an object by name, from its dictionary and from its slots."""
    slots = [name for kind in type(item).__mro__ for name in _as_tuple(getattr(kind, "__slots__", ()))]
    found = {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return {**found, **getattr(item, "__dict__", {})}


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
