"""Steps in path coordinates: the rule of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.steps import PathCoordinates, Skeleton
from lightning_ecopt.steps.coordinates import FreeWeights
from lightning_ecopt.steps.rule import Frame, PathStatistics
from lightning_ecopt.steps.state import Moments
from lightning_ecopt.symmetry import ScalingGroup


class PathRule:
    """The inverse chain rule before, weight allocation after the base optimizer's step.

    Meng et al., arXiv:1802.03713; the formulas are in :mod:`lightning_ecopt.steps.coordinates`.

    Args:
        group: the scaling group.
        parameters: by name, at the representative.
        kernels: what passes over weights and gradients are made with.
        skeleton: chosen there.
        free_start: value at which the coordinates of free skeleton weights start.
        max_ratio: the guard.
    """

    def __init__(
        self,
        group: ScalingGroup,
        parameters: Tensors,
        kernels: Kernels,
        skeleton: Skeleton,
        free_start: float,
        max_ratio: float | None,
    ) -> None:
        self._max_ratio = max_ratio
        self._coordinates = PathCoordinates(group.couplings, parameters, skeleton, free_start, kernels)
        self.kernels = kernels
        self.rows, self.scaled = self._coordinates.rows, self._coordinates.scaled
        self.elements = self._coordinates.elements
        self._guarded = torch.zeros((), dtype=torch.int64, device=self._coordinates.beta.device)

    def frame(self, weights: Tensors, gradients: Tensors, average: Coefficient) -> Frame:
        """Path coordinates."""
        scale = self._coordinates.scale
        return Frame(scale, scale, None, self._coordinates.free_weights(weights, gradients))

    def show_(self, frame: Frame, gradients: Tensors) -> Callable[[], None]:
        """Inverse chain rule."""
        assert frame.free is not None
        return self._coordinates.gradients_(gradients, frame.free)

    def enter_(self, frame: Frame, weights: Tensors, moments: Moments) -> Callable[[Moments], None]:
        """Into path coordinates, where moments are already; the way back is weight allocation."""
        leave_weights_ = self._coordinates.enter_(weights)

        def leave_(moments: Moments) -> None:
            self._guarded += leave_weights_(self._max_ratio).sum()

        return leave_

    def allocate(self, free: FreeWeights, moved: Tensor) -> tuple[Tensor, Callable[[Tensors], None]]:
        """Take over moved coordinates ``[H]`` of the free skeleton weights.

        Returns:
            What coordinates are multiplied by to be weights again, for each row ``[R]``; and the function that writes
            the skeleton weights once the others have been allocated.
        """
        _, write_skeleton_, guarded = self._coordinates.allocate(
            free.values, moved, self._max_ratio, free.skeleton_weights
        )
        self._guarded += guarded.sum()
        return self._coordinates.scale, write_skeleton_

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
                self.elements.write_(moment.tensors, torch.zeros_like(values), values)
            elif not moment.lasting:
                self._coordinates.restart_skeleton_(moment.tensors)

    def leave_(self, weights: Tensors, moments: Moments) -> None:
        """Back to weights, but for the skeleton weights, where nothing is known."""
        for moment in moments.values():
            self._coordinates.scale_(moment.tensors, moment.power)
            if moment.power == -1:
                self.elements.write_(moment.tensors, *self.elements.read(weights))
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
