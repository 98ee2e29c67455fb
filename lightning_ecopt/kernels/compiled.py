"""The passes as ``torch.compile`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch

from lightning_ecopt.common.warn import warn
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.passes import Coefficient, Kernels, Shapes, Views

CANNOT_COMPILE = (
    "The step could not be compiled and runs operation by operation, which is slower: {error}. If there is no C++ "
    "compiler, install one; implementation='eager' stops this warning."
)


class CompiledKernels(EagerKernels):
    """Compiles each pass at its first call, so that it reads and writes memory once instead of once an operation.

    Where that cannot be done, because there is no C++ compiler for instance, a warning says so, and the passes run
    operation by operation from then on.

    Args:
        affine: whether :meth:`affine_` is to be compiled, too. It is worth the time only if there are calls of it in
            every step, as where the base optimizer takes the step itself.
    """

    def __init__(self, affine: bool = True) -> None:
        self._affine = affine
        self._compiled: dict[tuple[Any, Any], Callable[..., Any]] = {}
        self._can_compile = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}  # what is compiled cannot be copied

    @property
    def partial(self) -> Kernels:
        """Kernels that do not compile: each set of parameters would be compiled anew."""
        return EagerKernels()

    def affine_(self, views: Views, *, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        if self._affine:
            super().affine_(views, shapes=shapes, **coefficients)
        else:
            EagerKernels().affine_(views, shapes=shapes, **coefficients)

    @property
    def _cuts(self) -> bool:
        # Compiled operations keep no results in memory, for which pieces are made.
        return not self._can_compile

    def _prepared(
        self, coefficients: Mapping[str, Coefficient], lists: Sequence[Views | None]
    ) -> Mapping[str, Coefficient]:
        # Numbers would become part of the code, which would be compiled again when one changes.
        dtype = next((view.dtype for view in lists[0] or ()), None)
        return {
            name: torch.tensor(value, dtype=dtype, device="cpu") if isinstance(value, float) else value
            for name, value in coefficients.items()
        }

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        if self._can_compile:
            # torch is slow to import its compiler, which those who do not compile should not wait for.
            from torch._dynamo.exc import TorchDynamoException

            try:
                return self._compiled_form(function, arguments)(*arguments)
            except TorchDynamoException as error:
                warn(CANNOT_COMPILE.format(error=str(error).strip().splitlines()[0]))
                self._can_compile = False
        return function(*arguments)

    def _compiled_form(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
        """Return the compiled form of a function; a function that it is given first, an update, is part of it."""
        key = function, arguments[0] if callable(arguments[0]) else None
        if key not in self._compiled:
            # torch.compile ties what it has compiled to a function's code, and limits how often. With code of its
            # own no pass, and no other optimizer, uses up the limit of this one.
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._compiled[key] = torch.compile(own, dynamic=False, fullgraph=True)
        return self._compiled[key]
