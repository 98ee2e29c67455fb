"""A fused step of which the way is known: from the tensors of the parameters straight to the kernels.

In a small network a step takes longer to find what it works on than to work. From one step to the next there are new
gradients and perhaps new rates, but which tensors belong together, and what kernels do with them, stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.kernels import Shapes
from lightning_ecopt.kernels.lines import LineKernels, Step
from lightning_ecopt.kernels.passes import Views
from lightning_ecopt.steps.rows import Rows


class PreparedStep:
    """The passes of a step over whole parameters, each of which has a gradient.

    Args:
        optimizer: the base.
        kernels: address memory.
        parameters: of the base, in the order of their rows.
        entry_names: of the state that the step changes.
        shapes: of the places.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kernels: LineKernels[Any],
        parameters: Sequence[nn.Parameter],
        entry_names: Sequence[str],
        shapes: Shapes,
    ) -> None:
        self._optimizer, self.kernels, self._parameters = optimizer, kernels, parameters
        self._entry_names, self._shapes, self._signs = entry_names, shapes, _signs(optimizer)
        self._plan, self._kinds = None, _kinds(parameters)

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
        """Prepare the next step by one that has just been taken; ``None`` if its passes are of another kind.

        Args:
            optimizer: the base.
            kernels: have made the passes.
            rows: the rows that they went over.
            parameters: of the scaling group, by name.
            gradients: those of the step, by name.
            entry_names: of the state that it has changed.
        """
        names, shapes = rows.whole_parameters()
        own = [parameters[name] for name in names]
        all_of_base = {id(p) for options in optimizer.param_groups for p in options["params"]}
        if not isinstance(kernels, LineKernels) or gradients.keys() != set(names) or all_of_base != set(map(id, own)):
            return None
        prepared = cls(optimizer, kernels, own, entry_names, shapes)
        return None if prepared.step(entry_names, rows.dtype) is None else prepared

    def fits(self) -> bool:
        """Whether the optimizer has the parameters, and the step, that it had."""
        return _signs(self._optimizer) == self._signs

    def step(self, entry_names: Sequence[str] | None, dtype: torch.dtype) -> Step | None:
        """What the next step works on; ``None`` if it needs more than the passes.

        Args:
            entry_names: of the state that it changes.
            dtype: of sums over rows.
        """
        if entry_names != self._entry_names:
            return None
        gradients: list[Any] = [p.grad for p in self._parameters]
        if any(type(gradient) is not Tensor or gradient.layout is not torch.strided for gradient in gradients):
            return None
        lists: list[Views] = [self._parameters, gradients]
        if entry_names:
            state = self._optimizer.state
            states = [state.get(p, {}) for p in self._parameters]
            lists += [[of.get(name) for of in states] for name in entry_names]
            if any(type(entry) is not Tensor for entries in lists[2:] for entry in entries):
                return None
        # It compares types, shapes and strides with those of the step before.
        plan = self.kernels.plan(lists, self._shapes, 0)
        if plan is not self._plan:
            if plan.rest or _kinds(self._parameters) != self._kinds:
                return None
            self._plan = plan
        return Step(plan, lists, self._shapes, dtype)


def _kinds(tensors: Iterable[Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    return [(tensor.dtype, tensor.device) for tensor in tensors]


def _signs(optimizer: Optimizer) -> tuple[Any, ...]:
    """What changes when an optimizer gets other parameters, or another step."""
    return type(optimizer).step, vars(optimizer).get("step"), [len(of["params"]) for of in optimizer.param_groups]
