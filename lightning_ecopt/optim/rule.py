"""What makes a step of the base optimizer one in the equivalent-class space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_ecopt.optim.state import Moments

Tensors = Mapping[str, Tensor]


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


class Rule(Protocol):
    """A rule is made at a refresh, when the weights are at their representative; moments are those of weights then."""

    def gradients_(self, weights: Tensors, gradients: Tensors) -> None:
        """Turn copies of the gradients into what the base optimizer is shown instead."""

    def enter_(self, weights: Tensors, moments: Moments, average: Mapping[str, float]) -> Callable[[Moments], None]:
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
