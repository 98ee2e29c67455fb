"""A fused step of which all is known but the numbers: the next one looks only whether its tensors are the same.

In a small network a step takes longer to find what it works on than to work. From one step to the next there are new
gradients and perhaps new rates; weights and state stay where they are, and types, shapes and strides what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.kernels import Coefficient, Shapes
from lightning_ecopt.kernels.clipping import Clipping, RowGradients
from lightning_ecopt.kernels.lines import LineKernels
from lightning_ecopt.kernels.passes import Product
from lightning_ecopt.steps.rows import Rows


class _Own(NamedTuple):
    """What a step knows of one parameter.

    Args:
        parameter: as the optimizer has it.
        at: the address of its elements.
        kind: type, shape and strides of its gradient.
        entries: of its state, by name, with their addresses.
    """

    parameter: nn.Parameter
    at: int
    kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]
    entries: list[tuple[str, Tensor, int]]


class PreparedStep:
    """The passes of a step over whole parameters, each of which has a gradient.

    Args:
        optimizer: the base.
        kernels: address memory.
        parameters: of the base, in the order of their rows.
        gradients: of a step that has been taken.
        entry_names: of the state that it has changed.
        shapes: of the places.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kernels: LineKernels[Any],
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        entry_names: Sequence[str],
        shapes: Shapes,
    ) -> None:
        self._optimizer, self._kernels, self._signs = optimizer, kernels, _signs(optimizer)
        self._entry_names = entry_names
        states = [[optimizer.state[p][name] for p in parameters] for name in entry_names]
        self._parameters, self._states = parameters, states
        self._own = [
            _Own(p, p.data_ptr(), (g.dtype, g.shape, g.stride()), [])
            for p, g in zip(parameters, gradients, strict=True)
        ]
        for name, state in zip(entry_names, states, strict=True):
            for own, entry in zip(self._own, state, strict=True):
                own.entries.append((name, entry, entry.data_ptr()))
        self._sums = kernels.plan([gradients], shapes, 2)
        self._update = kernels.plan([parameters, gradients, *states], shapes, 0)

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        kernels: object,
        rows: Rows,
        parameters: Mapping[str, nn.Parameter],
        gradients: Tensors,
        entry_names: Sequence[str],
    ) -> PreparedStep | None:
        """Prepare the passes of a step that has just been taken; ``None`` if they are of another kind.

        Args:
            optimizer: the base.
            kernels: have made the passes.
            rows: the rows that they went over.
            parameters: of the scaling group, by name.
            gradients: those of the step, by name.
            entry_names: of the state that it has changed.
        """
        names, shapes = rows.whole_parameters()
        own = {name: parameters[name] for name in names}
        all_of_base = {id(p) for options in optimizer.param_groups for p in options["params"]}
        if gradients.keys() != own.keys() or all_of_base != set(map(id, own.values())):
            return None
        if not isinstance(kernels, LineKernels) or any(_gradient(p) is not gradients[name] for name, p in own.items()):
            return None
        prepared = cls(optimizer, kernels, list(own.values()), [gradients[name] for name in names], entry_names, shapes)
        return None if prepared._sums.rest or prepared._update.rest else prepared

    def gradients(self, entry_names: Sequence[str] | None) -> list[Tensor] | None:
        """The gradients of the next step; ``None`` if anything else is not as it was.

        Args:
            entry_names: of the state that the next step changes.
        """
        if entry_names != self._entry_names or _signs(self._optimizer) != self._signs:
            return None
        states, found = self._optimizer.state, []
        for p, at, kind, entries in self._own:
            gradient = _gradient(p)
            if gradient is None or (gradient.dtype, gradient.shape, gradient.stride()) != kind or p.data_ptr() != at:
                return None
            found.append(gradient)
            state = states.get(p, {}) if entries else {}
            for name, entry, place in entries:
                if state.get(name) is not entry or entry.data_ptr() != place:
                    return None
        return found

    def take(
        self,
        gradients: Sequence[Tensor],
        rows: Callable[[Tensor, Tensor], RowGradients],
        coefficients: Callable[[Clipping], Mapping[str, Coefficient | Product]],
        dtype: torch.dtype,
    ) -> Clipping:
        """Take the step; see :meth:`~lightning_ecopt.kernels.lines.LineKernels.step_`."""
        lists = [self._parameters, gradients, *self._states]
        return self._kernels.step_(self._sums, self._update, lists, rows, coefficients, dtype)


def _gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of a parameter, if it is an ordinary tensor with strides."""
    gradient = parameter.grad
    return gradient if type(gradient) is Tensor and gradient.layout is torch.strided else None


def _signs(optimizer: Optimizer) -> tuple[Any, ...]:
    """What changes when an optimizer gets other parameters, or another step."""
    return type(optimizer).step, vars(optimizer).get("step"), [len(of["params"]) for of in optimizer.param_groups]
