"""Teaching the trace an operation that it does not know, such as a custom kernel.

An operation without a rule has all that it touches held fixed. A *stand-in* says what else is known of it, in the words
of torch: a function of the same arguments, made of operations that have rules, whose outputs scale in the same way.
Wherever the operation is traced, the stand-in is traced in its place; its values are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_ecopt.symmetry.rules.registry import RULES

StandIn = TypeVar("StandIn", bound=Callable[..., Any])

#: The stand-ins by the names of their operations, as :func:`~lightning_ecopt.symmetry.aten.base_name` has them.
STAND_INS: dict[str, Callable[..., Any]] = {}


def stand_in(name: str) -> Callable[[StandIn], StandIn]:
    """Register the decorated function as the stand-in of an operation.

    It is given the operation's arguments, and returns tensors of the same shapes as the operation does. It need not
    compute the same, only scale in the same way: factors of its arguments that multiply its outputs must multiply those
    of the operation as well, by the same. :func:`~lightning_ecopt.symmetry.check_stand_in` finds out. It should draw no
    random numbers. A later stand-in of the same operation takes the place of an earlier one.

    Args:
        name: the name of the operation with its namespace, such as ``"mylib::scaled_relu"``; all overloads have it.

    Raises:
        ValueError: if the name has no namespace, or if the operation has a rule of its own.

    Example::

        @stand_in("mylib::scaled_relu")
        def _(x, slope):
            return x.relu()
    """
    namespace, separator, base = name.partition("::")
    if not (namespace and separator and base):
        raise ValueError(f"{name!r} has no namespace; the name of an operation is like 'mylib::scaled_relu'")
    known = base if namespace == "aten" else name
    if known in RULES:
        raise ValueError(f"the operation {name!r} has a rule already, which is exact")

    def register(function: StandIn) -> StandIn:
        STAND_INS[known] = function
        return function

    return register
