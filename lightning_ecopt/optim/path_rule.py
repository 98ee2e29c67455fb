"""Steps in path coordinates: the rule of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_ecopt.optim.rule import PathStatistics, Tensors
from lightning_ecopt.optim.state import Moments
from lightning_ecopt.paths import PathCoordinates, Skeleton
from lightning_ecopt.symmetry import ScalingGroup


class PathRule:
    """The inverse chain rule before, weight allocation after the base optimizer's step.

    Meng et al., arXiv:1802.03713; the formulas are in :mod:`lightning_ecopt.paths.coordinates`.

    Args:
        group: the scaling group.
        parameters: by name, at the representative.
        skeleton: chosen there.
        free_start: value at which the coordinates of free skeleton weights start.
        max_ratio: the guard.
    """

    def __init__(
        self, group: ScalingGroup, parameters: Tensors, skeleton: Skeleton, free_start: float, max_ratio: float | None
    ) -> None:
        self._max_ratio = max_ratio
        self._coordinates = PathCoordinates(group.couplings, parameters, skeleton, free_start)
        self._guarded = torch.zeros((), dtype=torch.int64, device=self._coordinates.beta.device)

    def gradients_(self, weights: Tensors, gradients: Tensors) -> None:
        """Inverse chain rule."""
        self._coordinates.gradients_(weights, gradients)

    def enter_(self, weights: Tensors, moments: Moments, average: Mapping[str, float]) -> Callable[[Moments], None]:
        """Into path coordinates, where moments are already; the way back is weight allocation."""
        leave_weights_ = self._coordinates.enter_(weights)

        def leave_(moments: Moments) -> None:
            self._guarded += leave_weights_(self._max_ratio).sum()

        return leave_

    def visit_(self, weights: Tensors) -> Callable[[], object]:
        """Into path coordinates, and back without a guard."""
        leave_weights_ = self._coordinates.enter_(weights)
        return lambda: leave_weights_(None)

    def accept(self) -> None:
        """Nothing: the way back has moved beta."""

    def start_(self, moments: Moments) -> None:
        """Take moments of weights for those of path coordinates, which start anew at the skeleton weights.

        Momentum could be carried over exactly, as a covector. But the component of one skeleton weight is then a sum
        over all the elements that its paths meet; in a gradient they cancel, in momentum that was gathered along the
        way they do not, and training diverges.
        """
        values = self._coordinates.free_values
        for moment in moments.values():
            if moment.power == -1:
                self._coordinates.elements.write_(moment.tensors, torch.zeros_like(values), values)
            elif not moment.lasting:
                self._coordinates.restart_skeleton_(moment.tensors)

    def leave_(self, weights: Tensors, moments: Moments) -> None:
        """Back to weights, but for the skeleton weights, where nothing is known."""
        for moment in moments.values():
            self._coordinates.scale_(moment.tensors, moment.power)
            if moment.power == -1:
                self._coordinates.elements.write_(moment.tensors, *self._coordinates.elements.read(weights))
            elif not moment.lasting:
                self._coordinates.restart_skeleton_(moment.tensors)

    def statistics(self, dormant: int) -> PathStatistics:
        """The extremes of beta, and how often the guard was needed."""
        active = self._coordinates.skeleton.active.to(self._guarded.device)
        low, high = (float(value) for value in self._coordinates.beta[:-1][active].aminmax())
        return PathStatistics(low, high, int(self._guarded), dormant)

    def state_dict(self, moments: Moments) -> dict[str, Any]:
        """The skeleton, beta, and the moments in path coordinates."""
        return {
            "skeleton": self._coordinates.skeleton.state_dict(),
            "beta": self._coordinates.beta.clone(),
            "free_start": self._coordinates.free_start,
            "moments": {
                entry: {name: value.clone() for name, value in moment.tensors.items()}
                for entry, moment in moments.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], moments: Moments) -> None:
        """Go on in the very coordinates that were saved; the skeleton must be that of the state."""
        self._coordinates.beta.copy_(state["beta"])
        for entry, moment in moments.items():
            for name, value in moment.tensors.items():
                value.copy_(state["moments"][entry][name])
