"""Teaching the trace an operation that it does not know, such as a custom kernel.

An operation without a rule has all that it touches held fixed. A *stand-in* says what else is known of it, in the words
of torch: a function of the same arguments, made of operations that have rules, whose outputs scale in the same way.
Wherever the operation is traced, the stand-in is traced in its place; its values are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

import torch

from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.rules.registry import RULES

StandIn = TypeVar("StandIn", bound=Callable[..., Any])

#: The stand-ins by the names of their operations, as :func:`~lightning_ecopt.symmetry.aten.base_name` has them.
STAND_INS: dict[str, Callable[..., Any]] = {}


def stand_in(operation: Any) -> Callable[[StandIn], StandIn]:
    """Register the decorated function as the stand-in of an operation.

    It is given the operation's arguments, and returns tensors of the same shapes as the operation does. It need not
    compute the same, only scale in the same way: factors of its arguments that multiply its outputs must multiply those
    of the operation as well, by the same. :func:`~lightning_ecopt.symmetry.check_stand_in` finds out. It should draw no
    random numbers. Another stand-in of the same operation takes the place of the first, with a warning.

    Args:
        operation: its name with its namespace, such as ``"mylib::scaled_relu"``, which all overloads have, or the
            operation itself. A library of which nothing is registered yet may be loaded later.

    Raises:
        TypeError: if it is neither a name nor an operation.
        ValueError: if the name has no namespace, if its library has no such operation, or if that has a rule.

    Example::

        @stand_in("mylib::scaled_relu")
        def _(x, slope):
            return x.relu()
    """
    name = operation if isinstance(operation, str) else name_of(operation)
    if name is None:
        raise TypeError(
            f"stand_in takes an operation or its name, as in @stand_in('mylib::scaled_relu'), got {operation!r:.60}"
        )
    namespace, separator, base = name.partition("::")
    if not (namespace and separator and base):
        raise ValueError(f"{name!r} has no namespace; the name of an operation is like 'mylib::scaled_relu'")
    known = short(name)
    if known in RULES:
        raise ValueError(f"the operation {name!r} has a rule already, which is exact")
    there = [each for each in _registered() if each.startswith(f"{namespace}::")]
    if there and name not in there:
        similar = get_close_matches(name, there) or sorted(there)[:3]
        raise ValueError(f"there is no operation {name!r}; did you mean {' or '.join(map(repr, similar))}?")

    def register(function: StandIn) -> StandIn:
        if _code(STAND_INS.get(known, function)) != _code(function):
            warn(f"{name} has a stand-in already; the new one takes its place.")
        STAND_INS[known] = function
        return function

    return register


def name_of(operation: Any) -> str | None:
    """The name of an operation with its namespace, as ``torch.ops`` and ``custom_op`` have it; ``None`` of others."""
    if isinstance(operation, torch._ops.OpOverload):
        return str(operation._schema.name)
    name = getattr(operation, "_qualified_op_name", getattr(operation, "_qualname", None))
    return name if isinstance(name, str) else None


def named_operation(name: str) -> Callable[..., Any]:
    """The operation that has a name.

    Raises:
        ValueError: if none has.
    """
    if name not in _registered():
        similar = " or ".join(map(repr, get_close_matches(name, _registered())))
        raise ValueError(f"there is no operation {name!r}" + (f"; did you mean {similar}?" if similar else ""))
    namespace, _, base = name.partition("::")
    found: Callable[..., Any] = getattr(getattr(torch.ops, namespace), base)
    return found


def short(name: str) -> str:
    """The name as rules and reports have it: without the namespace of torch itself."""
    return name.removeprefix("aten::")


def _registered() -> set[str]:
    return {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}


def _code(function: Callable[..., Any]) -> Any:
    """What is the same of a function that is defined again, as in a notebook."""
    return getattr(function, "__code__", function)
