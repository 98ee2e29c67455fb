"""Names of a package that are imported when they are asked for, so that nobody waits for what he does not use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a package (PEP 562), which also find the modules in it.

    Args:
        package: the ``__name__`` of the package.
        modules: for each name the module of the package that has it.

    Example::

        __getattr__, __dir__ = lazy_names(__name__, {"PathNorm": "path_norm"})
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in modules:
            found = getattr(import_module(f"{package}.{modules[name]}"), name)
            setattr(sys.modules[package], name, found)  # next time without this function
            return found
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:  # noqa: N807
        inside = (module.name for module in iter_modules(sys.modules[package].__path__))
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith("__")), *modules, *inside})

    return __getattr__, __dir__
