"""What makes a step of the base optimizer one in the equivalent-class space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.steps.coordinates import FreeWeights
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.state import Moments


@dataclass(frozen=True)
class PathStatistics:
    """Whether all is well in path coordinates, since the last refresh.

    Args:
        min_beta: smallest value of a path out of a unit, relative to the start.
        max_beta: the largest.
        guarded_paths: how often the guard limited the move of a path.
        dormant_units: units without a path of non-zero elements, which are treated in weight space.
    """

    min_beta: float
    max_beta: float
    guarded_paths: int
    dormant_units: int


@dataclass(frozen=True)
class UnitStatistics:
    """Whether all is well with unit steps, since the start.

    Args:
        clipped: share of the gradients of rows that were clipped.
        dormant_units: units without a path of non-zero elements, which were not balanced.
    """

    clipped: float
    dormant_units: int


@dataclass(frozen=True)
class Frame:
    """Where the base optimizer takes a step: at the weights divided by ``scale``, with gradients ``times * g + plus``.

    Args:
        scale: over the rows of the rule, ``[R]``, as all that follow.
        times: positive.
        plus: ``None`` for zero.
        free: what the rule of paths holds apart.
    """

    scale: Tensor
    times: Tensor
    plus: Tensor | None = None
    free: FreeWeights | None = None


class Rule(Protocol):
    """A rule is made at a refresh, when the weights are at their representative; moments are those of weights then.

    Attributes:
        rows: over which its vectors are.
        kernels: what it makes passes over weights and gradients with.
    """

    rows: Rows
    kernels: Kernels

    def frame(self, weights: Tensors, gradients: Tensors, average: Coefficient) -> Frame:
        """One pass over the gradients, which stay as they are.

        Args:
            weights: by parameter name.
            gradients: likewise; those that there are.
            average: by what momentum of the base becomes a mean, for all rows or for each: 1 - momentum for SGD.
        """

    def show_(self, frame: Frame, gradients: Tensors) -> Callable[[], None]:
        """Turn the gradients into what the base optimizer is shown instead; returns the way back."""

    def enter_(self, frame: Frame, weights: Tensors, moments: Moments) -> Callable[[Moments], None]:
        """Move weights, and averages of weights, to where the base optimizer takes its step; returns the way back."""

    def visit_(self, weights: Tensors) -> Callable[[], object]:
        """Move weights to where averages of them are between steps, so that they can be mixed; returns the way back."""

    def accept(self) -> None:
        """The base optimizer's step has been taken without an error."""

    def leave_(self, weights: Tensors, moments: Moments) -> None:
        """Turn the moments into those of weights; zero in directions that mean something under this rule alone."""

    def statistics(self, dormant: int) -> PathStatistics | UnitStatistics:
        """Whether all is well. Waits for the device."""

    def state_dict(self, moments: Moments) -> dict[str, Any]:
        """What the rule needs to go on, with the moments if :meth:`leave_` would change them."""

    def load_state_dict(self, state: Mapping[str, Any], moments: Moments) -> None:
        """Go on from a saved state."""
