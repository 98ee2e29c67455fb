"""The sum of squares F of a network as a function of the log-scales of its units, with its derivatives.

See :mod:`lightning_ecopt.symmetry.balance` for the formula. Letters: H units; S scales, that is monomials, of which the
first H are the units; I and O count the entries of ``incoming`` (G x A each) and of ``outgoing`` (G x B each) of all
squares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks
from lightning_ecopt.common.tensors import are_few, padded, widest
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.squares import SquaredWeights, in_batches, in_one_matrix, joined, ranges

#: Sums of squares up to here, and their products with factors, do not overflow in single precision.
SINGLE = 1e30
#: Most scales of a small network whose squares are added up for each pair of them: a product with so many numbers takes
#: less time than the calls that it saves.
FEW_SCALES = 512


@dataclass(frozen=True, eq=False)
class Point:
    """F and its gradient at some log-scales.

    Args:
        scale: ``[H]``, the log-scales of the units.
        value: F.
        incoming: ``[H]``, sums of the squares that grow with each unit.
        outgoing: ``[H]``, sums of the squares that shrink with each unit.
        rises: ``[I]``, the factors exp(2 s_h) of the squares by their incoming scales.
        falls: ``[O]``, the factors exp(-2 s_u) of the squares by their outgoing scales.
        into: ``[I]``, sums of the rescaled squares for each incoming scale.
        out: ``[O]``, sums of the rescaled squares for each outgoing scale.
    """

    scale: Tensor
    value: Tensor
    incoming: Tensor
    outgoing: Tensor
    rises: Tensor
    falls: Tensor
    into: Tensor
    out: Tensor


class Objective(ABC):
    """F.

    Args:
        monomials: the scales that the squares refer to.
        active: ``bool[H]``, the units that may be rescaled.
    """

    def __init__(self, monomials: Monomials, active: Tensor) -> None:
        self.monomials, self.active = monomials, active

    def start(self) -> Point:
        """Evaluate F at the weights as they are."""
        device = self.active.device
        return self.at(torch.zeros(len(self.active), dtype=widest(device), device=device))

    @abstractmethod
    def at(self, scale: Tensor) -> Point:
        """Evaluate F at the weights rescaled by the log-scales ``scale``, ``[H]``."""

    @abstractmethod
    def hessian(self, here: Point, is_rough: bool) -> Callable[[Tensor], Tensor]:
        """Return the product of a quarter of the Hessian with log-scales, ``[H]`` to ``[H]``.

        Args:
            here: where F is expanded.
            is_rough: whether single precision will do, where it takes less time.
        """


def objective_of(squares: Sequence[SquaredWeights], monomials: Monomials, active: Tensor, ranks: Ranks) -> Objective:
    """Return F in the form that takes the least time.

    Args:
        squares: of all regions, on this rank.
        monomials: the scales that the squares refer to.
        active: ``bool[H]``, the units that may be rescaled.
        ranks: the ranks that hold parts of the weights.
    """
    device, fixed = squares[0].roots.device, monomials.num_scales
    monomials, active = monomials.to(device), active.to(device)
    if fixed <= FEW_SCALES and not ranks.are_several and are_few(each.roots for each in squares):
        return InOneMatrix(in_one_matrix(squares, fixed), monomials, active)
    return ByRegion(joined(squares, fixed), monomials, active, ranks)


class InOneMatrix(Objective):
    """F of a small network.

    Args:
        squares: ``[S + 1, S + 1]``, the sums of squares by their incoming and by their outgoing scale.
        monomials: the scales.
        active: ``bool[H]``, the units that may be rescaled.
    """

    def __init__(self, squares: Tensor, monomials: Monomials, active: Tensor) -> None:
        super().__init__(monomials, active)
        self.squares = squares

    def at(self, scale: Tensor) -> Point:
        """See :class:`Objective`."""
        rises = padded(2 * self.monomials.of(scale), 0).exp()  # [S + 1]
        falls = 1 / rises
        into, out = rises * (self.squares @ falls), falls * (rises @ self.squares)
        parts = self.monomials.collect_parts(into[:-1], out[:-1])
        return Point(scale, into.sum(), *parts, rises, falls, into, out)

    def hessian(self, here: Point, is_rough: bool) -> Callable[[Tensor], Tensor]:
        """See :class:`Objective`."""

        def apply(z: Tensor) -> Tensor:
            scales = padded(self.monomials.of(z), 0)  # [S + 1]
            into = here.rises * (self.squares @ (here.falls * scales))
            out = here.falls * ((here.rises * scales) @ self.squares)
            return self.monomials.collect(((here.into + here.out) * scales - into - out)[:-1])

        return apply


class ByRegion(Objective):
    """F of any network, from products of the squares of each region with vectors.

    Args:
        squares: of all regions, :func:`~lightning_ecopt.symmetry.squares.joined`.
        monomials: the scales.
        active: ``bool[H]``, the units that may be rescaled.
        ranks: the ranks that hold parts of the weights.
    """

    def __init__(self, squares: list[SquaredWeights], monomials: Monomials, active: Tensor, ranks: Ranks) -> None:
        super().__init__(monomials, active)
        self.ranks, fixed = ranks, monomials.num_scales
        self.squares, self.rough = self._prepared(squares, fixed)
        self.above = torch.cat([each.incoming.reshape(-1) for each in self.squares])  # [I]
        self.below = torch.cat([each.outgoing.reshape(-1) for each in self.squares])  # [O]
        self._incoming, self._outgoing = SegmentSum(self.above, fixed), SegmentSum(self.below, fixed)

    @staticmethod
    def _prepared(squares: list[SquaredWeights], fixed: int) -> tuple[list[SquaredWeights], list[SquaredWeights]]:
        """Leave out elements that are not finite, and those with one scale on both sides, which never change.

        Returns:
            The squares, and the same ones in single precision where that fits them.
        """
        totals = [total for _, total in ranges(squares)]
        shared = [torch.isin(each.incoming.where(each.incoming != fixed, -1), each.outgoing).any() for each in squares]
        for number, joins in enumerate(torch.stack(shared).tolist()):
            if not isfinite(totals[number]):
                squares[number] = squares[number].without(squares[number].undefined())
            if joins:
                same = squares[number].incoming[:, :, None] == squares[number].outgoing[:, None]
                squares[number] = squares[number].without(same)
        squares = in_batches(squares)
        fits = all(total < SINGLE for total in totals)
        return squares, [replace(each, dtype=torch.float32) if fits and not each.is_kept else each for each in squares]

    def at(self, scale: Tensor) -> Point:
        """See :class:`Objective`."""
        factors = padded(2 * self.monomials.of(scale), 0).exp()  # [S + 1]
        rises, falls = factors[self.above], 1 / factors[self.below]
        into, out = self._sums(falls, rises)
        into, out = rises * into, falls * out
        value = self.ranks.sum_(into.sum())
        parts = self.monomials.collect_parts(*self._collect(into, out))
        return Point(scale, value, *parts, rises, falls, into, out)

    def _sums(self, right: Tensor, left: Tensor, is_rough: bool = False) -> tuple[Tensor, Tensor]:
        """Multiply the squares by ``right [O]`` from the right, giving ``[I]``, and by ``left [I]``, giving ``[O]``."""
        squares = self.rough if is_rough else self.squares
        rights = right.split([each.outgoing.numel() for each in squares])
        lefts = left.split([each.incoming.numel() for each in squares])
        into: list[Tensor] = []
        out: list[Tensor] = []
        for each, values, others in zip(squares, rights, lefts, strict=True):
            sides = values.view_as(each.outgoing), others.view_as(each.incoming)
            for sums, side in zip((into, out), each.both_ways(*(side.to(each.dtype) for side in sides)), strict=True):
                sums.append(side.reshape(-1).to(right.dtype))
        return torch.cat(into), torch.cat(out)

    def _collect(self, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Add up ``into [I]`` and ``out [O]`` for each scale, over all ranks: ``[S]`` both."""
        rising, falling = self.ranks.sum_(torch.stack([self._incoming(into), self._outgoing(out)]))
        return rising, falling

    def hessian(self, here: Point, is_rough: bool) -> Callable[[Tensor], Tensor]:
        """See :class:`Objective`."""

        def apply(z: Tensor) -> Tensor:
            scales = padded(self.monomials.of(z), 0)  # [S + 1]
            above, below = scales[self.above], scales[self.below]
            into, out = self._sums(here.falls * below, here.rises * above, is_rough)
            rising, falling = self._collect(above * here.into - here.rises * into, here.falls * out - below * here.out)
            return self.monomials.collect(rising - falling)

        return apply
