"""The vector work of a step in path coordinates; :mod:`lightning_ecopt.steps.coordinates` says why.

Vectors over units are ``[H]``, or ``[H + 1]`` where the last entry is for what belongs to no unit; the number H stands
for no unit. Vectors over skeleton elements are ``[2H]``: of all units the fixed ones, then the free ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.tensors import padded


@dataclass(frozen=True, eq=False)
class Paths:
    """The paths of one skeleton.

    Args:
        unit_of_row: the unit that each row leads into, ``int32[R]``.
        root: the first unit with a free skeleton weight on the way out of each unit, ``int32[H]``.
        target: the unit into which the outgoing skeleton weight of each unit leads, ``int32[H]``.
        is_free: units whose outgoing skeleton weight is free, ``bool[H]``.
        start: value at which the coordinates of free skeleton weights start.
        beta: values of the paths out of the units relative to the start, ``[H + 1]``; steps change it in place.
    """

    unit_of_row: Tensor
    root: Tensor
    target: Tensor
    is_free: Tensor
    start: float
    beta: Tensor

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The free coordinates as one block of a pass; kept, as plans are looked up by this very object."""
        return ((self.num_units,),)

    @property
    def num_units(self) -> int:
        """The number H of units."""
        return len(self.is_free)

    @property
    def free_values(self) -> Tensor:
        """The coordinates v_f of the free skeleton weights, ``[H]``, at the units that they leave; others are 1."""
        return torch.where(self.is_free, self.start * self.beta[:-1], 1.0)

    @property
    def weight_scale(self) -> Tensor:
        """By what weights are divided to be coordinates, for each row ``[R]``."""
        return self.beta.index_select(0, self.unit_of_row).reciprocal_()

    @cached_property
    def to_roots(self) -> SegmentSum:
        """Sums over rows and units with the same root. To make it waits for the device; in C it is not needed."""
        roots = torch.cat([padded(self.root, self.num_units)[self.unit_of_row], self.root])
        return SegmentSum(roots, self.num_units)


class Allocated(NamedTuple):
    """What follows from the free coordinates that have moved.

    Args:
        skeleton: the skeleton weights, ``[2H]``.
        ratio: by what beta was multiplied, ``[H + 1]``.
        num_guarded: at how many units the guard was needed.
    """

    skeleton: Tensor
    ratio: Tensor
    num_guarded: Tensor | int


def free_gradient(paths: Paths, sums: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
    """The gradients dL/dv_f of the free coordinates, ``[H]``; 0 at units that have none.

    Args:
        paths: of the skeleton.
        sums: of w g over the elements of each row, ``[R]``.
        weights: at the skeleton elements, ``[2H]``.
        gradients: there, ``[2H]``.
    """
    fixed, free = (weights * gradients).chunk(2)
    r = paths.to_roots(torch.cat([sums, -fixed]))  # [H], sums of r_h over root(h) = u
    return torch.where(paths.is_free, free - r, 0.0) / paths.free_values


def allocate_(paths: Paths, factor: Tensor, weights: Tensor, max_ratio: float | None) -> Allocated:
    """Take over free coordinates that have moved: beta changes in place.

    Args:
        paths: of the skeleton.
        factor: by what the free coordinates were multiplied, ``[H]``; not looked at where units have none.
        weights: at the skeleton elements before the step, ``[2H]``.
        max_ratio: the guard: a coordinate changes by at most this factor, and never its sign; ``None`` for no guard.
    """
    factor = torch.where(paths.is_free, factor, 1.0)
    if max_ratio is None:
        allowed = factor
    else:
        allowed = factor.clamp(1 / max_ratio, min(max_ratio, torch.finfo(factor.dtype).max))
    allowed = torch.where(factor.isfinite() & (allowed != 0), allowed, 1.0)
    # A weight that the optimizer has spoilt is spoilt, but no beta, and by it no other weight.
    itself = torch.where(factor.isfinite(), allowed, factor)
    ratio = padded(padded(allowed, 1)[paths.root], 1)  # [H + 1], R_h = R_root(h)
    paths.beta.mul_(ratio)
    fixed, free = weights.chunk(2)
    skeleton = torch.cat([fixed, free * itself / ratio[paths.target]])
    return Allocated(skeleton, ratio, (paths.is_free & (allowed != factor)).sum())
