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
_SIMPLE = frozenset({str, bytes, int, float, complex, bool, type(None)})  # of these long lists are made
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

        assert tensors_in({"x": [a, (b, None)], "y": "text"}) == [a, b]
    """
    return [item for item in walk(structure, objects=objects) if is_a(item, Tensor)]


def named_tensors_in(structure: Any, name: str, *, objects: bool = False) -> list[tuple[str, Tensor]]:
    """Find all tensors in a nested structure, each with the expression that leads to it.

    Args:
        structure: mappings, sequences, sets and data classes, of each other and of tensors.
        name: what the expressions begin with.
        objects: whether to look into other objects too: their attributes, closures of functions, iterators that wait.

    Example::

        assert named_tensors_in({"x": [a, (b, None)]}, "output") == [("output['x'][0]", a), ("output['x'][1][0]", b)]
    """
    found = _walk(structure, objects)
    return [(name + _expression(path), item) for path, item in found if is_a(item, Tensor)]


def walk(structure: Any, *, objects: bool) -> Iterator[Any]:
    """Yield the structure and all in it, each object once; plain values, such as numbers, are left out."""
    return (item for _, item in _walk(structure, objects))


# The steps to an object, the last one first: a kind of step, the index, key or name, and the steps before.
_Path = tuple[str, Any, Any] | None
_ELEMENT, _ATTRIBUTE = "[", "."


def _walk(structure: Any, objects: bool) -> Iterator[tuple[_Path, Any]]:
    seen: set[int] = set()
    waiting: list[tuple[_Path, Any]] = [(None, structure)]
    while waiting:
        path, item = waiting.pop()
        if item is None or is_a(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        yield path, item
        waiting.extend(((kind, key, path), value) for kind, key, value in reversed(_parts(item, objects)))


def _expression(path: _Path) -> str:
    """Write the steps to an object as an expression, such as ``['x'][0].y``."""
    text = ""
    while path is not None:
        kind, key, path = path
        if kind == _ELEMENT:
            key = f"{key!r}]" if type(key) in (int, str) else "...]"
        text = f"{kind}{key}{text}"
    return text


def _parts(item: Any, objects: bool) -> list[tuple[str, Any, Any]]:
    """What an object holds: for each part the kind of step to it, and its index, key or name."""
    if is_a(item, Tensor):
        own = dictionary(item).items() if objects else ()
        return [(_ATTRIBUTE, name, v) for name, v in own if is_a(v, Tensor | dict | list | tuple)]
    parts = _elements(item)
    if objects:
        parts += _referred(item)
    elif dataclasses.is_dataclass(type(item)):
        parts += _attributes(item)
    return parts


def contents(container: Any) -> list[Any]:
    """The elements of a sequence or set, the values of a mapping, without numbers and texts; else nothing."""
    return [value for _, _, value in _elements(container)]


def _elements(container: Any) -> list[tuple[str, Any, Any]]:
    found = elements(container)
    if not found and is_a(container, Mapping) and not is_a(container, dict):
        try:
            found = list(container.items())
        except Exception:  # whatever a user's class may raise
            return []
    return [
        (_ELEMENT, element[0] if len(element) > 1 else k, element[-1])
        for k, element in enumerate(found)
        if type(element[-1]) not in _SIMPLE
    ]


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


def _referred(item: Any) -> list[tuple[str, Any, Any]]:
    """The attributes of an object, and what it holds out of sight until it is called or iterated."""
    if is_a(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
        names = ("__closure__", "__defaults__", "__kwdefaults__")
        return _named(zip(names, (cells, item.__defaults__, item.__kwdefaults__), strict=True))
    if is_a(item, types.MethodType):
        return _named({"__self__": item.__self__, "__func__": item.__func__}.items())
    if is_a(item, functools.partial):
        return _named((name, getattr(functools.partial, name).__get__(item)) for name in ("func", "args", "keywords"))
    if is_a(item, types.GeneratorType):
        return _named(item.gi_frame.f_locals.items() if item.gi_frame is not None else ())
    if is_a(item, Iterator):
        return [(_ELEMENT, ..., value) for value in gc.get_referents(item)]
    return _attributes(item)


def _named(attributes: Iterable[tuple[str, Any]]) -> list[tuple[str, Any, Any]]:
    return [(_ATTRIBUTE, name, value) for name, value in attributes]


def dictionary(item: Any) -> dict[str, Any]:
    """The attributes of an object by name, without those in slots: its own dictionary, if it has any."""
    try:
        own = object.__getattribute__(item, "__dict__")
    except Exception:  # there is none, or a class has put a property of this name in its place
        return {}
    return own if is_a(own, dict) else {}


def _attributes(item: Any) -> list[tuple[str, Any, Any]]:
    """The attributes of an object, from its dictionary and from its slots."""
    found = _named(dictionary(item).items())
    for kind in type(item).__mro__:
        for name, slot in list(vars(kind).items()) if "__slots__" in vars(kind) else ():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # it has not been set
                    found.append((_ATTRIBUTE, name, slot.__get__(item)))
    return found
