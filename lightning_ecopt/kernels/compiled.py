"""The passes as ``torch.compile`` makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from lightning_ecopt.kernels.eager import PIECE, Coefficient, EagerKernels, Kernels, Shapes, Views

CANNOT_COMPILE = (
    "The step could not be compiled and runs operation by operation, which is slower: {error}. If there is no C++ "
    "compiler, install one; implementation='eager' stops this warning."
)


class CompiledKernels(EagerKernels):
    """The same, compiled by ``torch.compile`` at the first call: every pass reads and writes memory once.

    Where that cannot be done, because there is no C++ compiler for instance, a warning says so, and the passes run
    operation by operation.

    Args:
        affine: whether :meth:`affine_` is to be compiled, too: whether there will be many calls of it.
    """

    def __init__(self, affine: bool = True) -> None:
        self._affine = affine
        self._functions: dict[tuple[str, str], Callable[..., Any]] = {}
        self._can_compile = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}}  # what is compiled cannot be copied

    @property
    def partial(self) -> Kernels:
        """Without compilation: each set of parameters would need its own."""
        return EagerKernels()

    def affine_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`Kernels`."""
        if self._affine:
            super().affine_(*lists, shapes=shapes, **coefficients)
        else:
            EagerKernels().affine_(*lists, shapes=shapes, **coefficients)

    @property
    def _piece(self) -> int | None:
        return None if self._can_compile else PIECE

    def _in_place(
        self,
        function: Callable[..., None],
        lists: Sequence[Views | None],
        shapes: Shapes,
        coefficients: Mapping[str, Coefficient | None],
    ) -> None:
        # Numbers would become part of the code, which would be compiled again when one changes.
        kind = next((view.dtype for view in lists[0] or ()), None)
        tensors = {
            name: torch.tensor(value, dtype=kind) if isinstance(value, float) else value
            for name, value in coefficients.items()
        }
        super()._in_place(function, lists, shapes, tensors)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See :class:`Kernels`."""
        if self._can_compile:
            key = function.__name__, getattr(arguments[0], "__name__", "")
            if key not in self._functions:  # of its own code, to which torch.compile ties what it has compiled
                own = FunctionType(function.__code__.replace(), function.__globals__, key[0])
                self._functions[key] = torch.compile(own, dynamic=False, fullgraph=True)
            try:
                return self._functions[key](*arguments)
            except TorchDynamoException as error:
                warnings.warn(CANNOT_COMPILE.format(error=str(error).strip().splitlines()[0]), stacklevel=2)
                self._can_compile = False
        return function(*arguments)
