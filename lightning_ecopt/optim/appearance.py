"""As what an equivalent-class optimizer is seen: as an optimizer of its own class, and as one of its base's.

Pipelines ask ``isinstance(optimizer, torch.optim.Adam)``. Lightning's own wrappers answer by a class made for the
occasion, of their own class and that of the optimizer; so it is here.
"""

from __future__ import annotations

from functools import lru_cache
from types import new_class
from typing import Any


class _OfBase:
    """What the class of the base has beyond ours, in a class of both: what ``optimizer.name`` finds in the base.

    Lightning's and Fabric's wrappers derive their class from it, and would have methods of the base called on them.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else optimizer.__getattr__(self._name)


def seen_as(own: type, base: type) -> type:
    """The class that ``optimizer.__class__`` is: a subclass of both, or ``own`` if that cannot be."""
    return own if issubclass(own, base) else _of_both(own, base)  # type: ignore[arg-type]  # classes are hashable


@lru_cache(64)
def _of_both(own: type, base: type) -> type:
    beyond = {name: _OfBase(name) for name in dir(base) if not name.startswith("_") and not hasattr(own, name)}
    body = {"__module__": own.__module__, "__doc__": own.__doc__, **beyond}
    try:
        return new_class(own.__name__, (own, base), exec_body=lambda namespace: namespace.update(body))
    except Exception:  # classes with slots cannot be joined, and others may not want subclasses
        return own
