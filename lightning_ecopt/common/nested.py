"""Find what nested structures hold: mappings, sequences, sets, data classes and, on request, any other objects.

Objects of users may have a length, an equality or attributes that raise. So the class of an object is taken from
``type``, containers are read by the methods of the built-in class that they derive from, and what raises nevertheless
holds nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = str | bytes | int | float | complex | type | types.ModuleType | torch.dtype | torch.device
CONTAINERS = (dict, list, set, deque)
_ADDING: dict[Any, Callable[..., Any]] = {
    OrderedDict: OrderedDict.__setitem__,
    dict: dict.__setitem__,
    list: list.append,
    set: set.add,
    deque: deque.append,
}
_ITERATED: tuple[Any, ...] = (list, tuple, set, frozenset, deque)


def is_a(item: Any, kind: Any) -> bool:
    """Whether an object is of a class or one of a union; ``isinstance`` would ask the object for its ``__class__``."""
    return issubclass(type(item), kind)


def tensors_in(structure: Any, *, objects: bool = False) -> list[Tensor]:
    """Find all tensors in a nested structure.

    Args:
        structure: mappings, sequences, sets and data classes, of each other and of tensors.
        objects: whether to look into other objects too: their attributes, closures of functions, iterators that wait.

    Example::

        assert tensors_in({"x": [a, (b, None)], "y": "text"}) == [a, b]  # in any order
    """
    return [item for item in walk(structure, objects=objects) if is_a(item, Tensor)]


def walk(structure: Any, *, objects: bool) -> Iterator[Any]:
    """Yield the structure and all in it, each object once; plain values, such as numbers, are left out."""
    seen: set[int] = set()
    waiting = [structure]
    while waiting:
        item = waiting.pop()
        if item is None or is_a(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if is_a(item, Tensor):
            waiting.extend(v for v in contents(dictionary(item)) if objects and is_a(v, Tensor | dict | list | tuple))
            continue
        waiting.extend(contents(item))
        if objects:
            waiting.extend(_referred(item))
        elif dataclasses.is_dataclass(type(item)):
            waiting.extend(_attributes(item))


def contents(container: Any) -> list[Any]:
    """The elements of a sequence or set, the values of a mapping; nothing of any other object."""
    found = elements(container)
    if not found and is_a(container, Mapping) and not is_a(container, dict):
        try:
            return list(container.values())
        except Exception:  # whatever a user's class may raise
            return []
    return [element[-1] for element in found]


def elements(container: Any) -> list[tuple[Any, ...]]:
    """What a built-in container holds, in its order: pairs of a key and a value, or tuples of one element."""
    if is_a(container, dict):
        return list(OrderedDict.items(container) if is_a(container, OrderedDict) else dict.items(container))
    kind = next((kind for kind in _ITERATED if is_a(container, kind)), None)
    return [] if kind is None else [(element,) for element in kind.__iter__(container)]


def put_back(container: Any, content: list[tuple[Any, ...]]) -> None:
    """Give a mutable built-in container the :func:`elements` that it had, if it has others now."""
    now, before = ([id(part) for element in one for part in element] for one in (elements(container), content))
    if now != before:
        kind, add = next((kind, add) for kind, add in _ADDING.items() if is_a(container, kind))
        kind.clear(container)  # of the built-in class, whatever one that derives from it does
        for element in content:
            add(container, *element)


def _referred(item: Any) -> Iterable[Any]:
    """The attributes of an object, and what it holds out of sight until it is called or iterated."""
    if is_a(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
        return [*cells, item.__defaults__, item.__kwdefaults__]
    if is_a(item, types.MethodType):
        return [item.__self__, item.__func__]
    if is_a(item, functools.partial):
        parts = (functools.partial.func, functools.partial.args, functools.partial.keywords)
        return [part.__get__(item) for part in parts]
    if is_a(item, types.GeneratorType):
        return list(item.gi_frame.f_locals.values()) if item.gi_frame is not None else []
    if is_a(item, Iterator):
        return gc.get_referents(item)
    return _attributes(item)


def dictionary(item: Any) -> dict[str, Any]:
    """The attributes of an object by name, without those in slots: its own dictionary, if it has any."""
    try:
        own = object.__getattribute__(item, "__dict__")
    except Exception:  # there is none, or a class has put a property of this name in its place
        return {}
    return own if is_a(own, dict) else {}


def _attributes(item: Any) -> list[Any]:
    """The attributes of an object, from its dictionary and from its slots."""
    found = contents(dictionary(item))
    for kind in type(item).__mro__:
        for slot in list(vars(kind).values()) if "__slots__" in vars(kind) else ():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # it has not been set
                    found.append(slot.__get__(item))
    return found
