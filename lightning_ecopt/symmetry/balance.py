"""The member of least sum of squares in an equivalent class.

With ``a_e`` the square of an element ``e`` from unit ``u`` to unit ``h``, the log-scales ``s`` minimise the convex
function

    F(s) = sum_e a_e exp(2 (s_h - s_u)),        s = 0 for what is fixed.

At the minimum the incoming and the outgoing squares of every unit are equal. (The same problem as balancing a matrix by
a diagonal similarity: E. E. Osborne, "On pre-conditioning of matrices", J. ACM 7 (1960).) Where an element is scaled by
a product of powers of units, s_h or s_u is a linear function of the units' log-scales, and F is convex all the same.

Where parameters are sharded, each rank holds its own part of the ``a_e``, and sums over them are added up over the
ranks.

Letters: H units; S scales, that is monomials, of which the first H are the units; I and O count the entries of
``incoming`` (G x A each) and of ``outgoing`` (G x B each) of all squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks
from lightning_ecopt.common.tensors import padded
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.squares import SquaredWeights, in_batches, joined, ranges

#: Most steps of each kind; they end when the balance is good enough, which takes far fewer.
COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000
#: Coarse sweeps end when no log-scale moves by more: there Newton's method converges quadratically.
NEAR = 0.1
#: Sums of squares up to here, and their products with factors, do not overflow in single precision.
SINGLE = 1e30
#: So many steps in single precision may fail to halve the imbalance before all are in double precision.
DOUBTS = 3


# Which units can be balanced ------------------------------------------------------------------------------------------


def alive_units(squares: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> Tensor:
    """Find the units that non-zero elements keep from growing and from shrinking without end, ``bool[H]``.

    In a network without products these are the units that non-zero elements connect to fixed values on both sides: to
    the inputs and to the outputs. A unit with an infinite or undefined element, as after a step that diverged, is not
    alive.
    """
    device = squares[0].roots.device if squares else torch.device("cpu")
    monomials = monomials.to(device)
    broken = torch.zeros(monomials.num_scales + 1, dtype=torch.bool, device=device)
    squares = _examined(joined(squares, monomials.num_scales), broken)
    ranks.any_(broken)
    sound = ~monomials.in_(broken[:-1])
    above, below = torch.zeros_like(sound), torch.zeros_like(sound)
    before, found, most = -1, 0, 2 * int(sound.sum())
    # While F stays below a constant, s_h - s_u is bounded above for every non-zero element from u to h. So s_h is
    # bounded above if s_u is, and s_u below if s_h is: start from what is fixed, and spread until nothing is added.
    while before < found < most:
        caps, floors = (padded(side, True) for side in monomials.bounded(above, below))
        for each in squares:
            open_ = each.joins_into(caps[each.outgoing])
            _set(caps, each.incoming, open_ & ~broken[each.incoming])
        for each in reversed(squares):
            open_ = each.joins_out_of(floors[each.incoming])
            _set(floors, each.outgoing, open_ & ~broken[each.outgoing])
        caps, floors = ranks.any_(torch.stack([caps, floors]))
        monomials.bound_units(above, below, caps[:-1], floors[:-1])
        above &= sound
        below &= sound
        before, found = found, int(above.sum() + below.sum())
    return above & below


def _examined(squares: list[SquaredWeights], broken: Tensor) -> list[SquaredWeights]:
    """Find out which squares are full, and set those that are not finite to zero.

    Args:
        squares: of all regions.
        broken: ``bool[S + 1]``, in which the scales of squares that are not finite are marked.
    """
    found = []
    for each, (smallest, total) in zip(squares, ranges(squares), strict=True):
        if isfinite(total):
            found.append(replace(each, is_full=smallest > 0))
        else:
            undefined = each.undefined()
            broken[each.incoming[undefined.any(2)]] = True
            broken[each.outgoing[undefined.any(1)]] = True
            found.append(each.without(undefined))
    return found


def _set(marks: Tensor, places: Tensor, chosen: Tensor) -> None:
    """Mark the chosen ones of ``places``. The others set the last mark, for fixed values, once more."""
    marks[places.where(chosen, -1)] = True


# Sums of squares ------------------------------------------------------------------------------------------------------


def mean_square(squares: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> Tensor:
    """Sum the squares of the rows that lead into each unit, and divide by the number of these rows: ``[H]``."""
    incoming = torch.cat([each.incoming.reshape(-1) % (monomials.num_scales + 1) for each in squares])
    sums = torch.cat([each.total().reshape(-1) for each in squares])
    rows = torch.cat([sums.new_full((each.incoming.numel(),), each.rows) for each in squares])
    total = SegmentSum(incoming, monomials.num_scales + 1)
    sums, rows = ranks.sum_(torch.stack([total(sums), total(rows)]))
    return (sums / rows)[: monomials.num_units]


def sums_of_squares(squares: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sum the squares that grow and those that shrink with each unit, ``[H]`` both; equal at the balanced member."""
    active = torch.ones(monomials.num_units, dtype=torch.bool, device="cpu")
    here = _Problem(squares, monomials, active, ranks).start()
    return here.incoming, here.outgoing


def imbalances_of(
    squares: Sequence[SquaredWeights], monomials: Monomials, alive: Tensor, invariant: Tensor, ranks: Ranks
) -> Tensor:
    """Compare the norm of what grows with each unit with that of what shrinks, ``[H]``: 1 at the balanced member.

    Args:
        squares: of all regions, on this rank.
        monomials: the scales that the squares refer to.
        alive: ``bool[H]``; the other units have no balance, and count as balanced.
        invariant: ``bool[H]``, units of which nothing shrinks: their mean square is compared with 1.
        ranks: the ranks that hold parts of the weights.
    """
    incoming, outgoing = sums_of_squares(squares, monomials, ranks)
    ratio = torch.where(invariant.to(incoming.device), mean_square(squares, monomials, ranks), incoming / outgoing)
    ratio = torch.where(alive, ratio, 1.0)
    undefined = ranks.any_(torch.tensor(not all(isfinite(total) for _, total in ranges(squares)), device=ratio.device))
    return torch.where(undefined, torch.nan, torch.maximum(ratio, 1 / ratio)).sqrt()


# The minimum ----------------------------------------------------------------------------------------------------------


def resolution_of(parameters: Iterable[Tensor]) -> float:
    """The relative rounding error of weights in the coarsest of their types."""
    return max(torch.finfo(parameter.dtype).eps for parameter in parameters)


def balancing_scale(
    squares: Sequence[SquaredWeights],
    monomials: Monomials,
    active: Tensor,
    resolution: float,
    ranks: Ranks,
    start: Tensor | None = None,
) -> Tensor:
    """Find the log-scales ``[H]`` that balance the active units, and are those of the start for the others.

    Args:
        squares: of all regions, on this rank.
        monomials: the scales that the squares refer to.
        active: ``bool[H]``, the units to move, all of them alive.
        resolution: relative rounding error of the type in which the weights are kept; a balance well below is good
            enough.
        ranks: the ranks that hold parts of the weights; all of them get the same result.
        start: log-scales ``[H]``; by default zero.
    """
    problem = _Problem(squares, monomials, active, ranks)
    here = problem.start() if start is None else problem.at(start)
    tolerance = max(64 * torch.finfo(here.scale.dtype).eps, resolution / 64)
    return _newton(problem, _coarse(problem, here), tolerance).scale


def _coarse(problem: _Problem, here: _Point) -> _Point:
    """Sweep over all units at once, with steps that can only lower F however the units hang together."""
    reach = problem.monomials.reach
    for _ in range(COARSE_SWEEPS):
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 bounds F by a sum with one term per unit, which is least where
        # exp(8 a) = out / in. With products the 2 becomes the largest sum of exponents, 2 * reach.
        step = torch.where(problem.active, (here.outgoing.log() - here.incoming.log()) / (8 * reach), 0.0)
        if float(step.abs().max()) < NEAR:
            break
        here = problem.at(here.scale + step)
    return here


def _newton(problem: _Problem, here: _Point, tolerance: float) -> _Point:
    """Take Newton steps, halved until F does not rise, to a relative imbalance below ``tolerance``.

    The gradient, which says when the balance is good, is always exact. The Hessian is taken in single precision, which
    serves as well unless it hardly differs from a singular one: where that has not halved the imbalance, the next step
    is exact.
    """
    is_rough, failed, before = True, 0, torch.inf
    for _ in range(NEWTON_STEPS):
        imbalance = (here.incoming - here.outgoing) / (here.incoming + here.outgoing)
        error = float(torch.where(problem.active, imbalance, 0.0).abs().max())
        if error < tolerance:
            break
        failed += is_rough and error > before / 2
        is_rough, before = failed < DOUBTS and not (is_rough and error > before / 2), error
        step = problem.newton_step(here, min(0.1, max(error, 1e-4)), is_rough)
        step /= max(1.0, float(step.abs().max()))
        there = problem.at(here.scale + step)
        while float(there.value) > float(here.value) * (1 + tolerance):
            step /= 2
            there = problem.at(here.scale + step)
        here = there
    return here


@dataclass(frozen=True, eq=False)
class _Point:
    """F and its derivatives at some log-scales.

    Args:
        scale: ``[H]``, the log-scales of the units.
        value: F.
        rises: ``[I]``, the factors exp(2 s_h) of the squares by their incoming scales.
        falls: ``[O]``, the factors exp(-2 s_u) of the squares by their outgoing scales.
        into: ``[I]``, sums of the rescaled squares for each incoming scale.
        out: ``[O]``, sums of the rescaled squares for each outgoing scale.
        incoming: ``[H]``, sums of the squares that grow with each unit.
        outgoing: ``[H]``, sums of the squares that shrink with each unit.
    """

    scale: Tensor
    value: Tensor
    rises: Tensor
    falls: Tensor
    into: Tensor
    out: Tensor
    incoming: Tensor
    outgoing: Tensor


class _Problem:
    """F, its gradient and its Hessian."""

    def __init__(self, squares: Sequence[SquaredWeights], monomials: Monomials, active: Tensor, ranks: Ranks) -> None:
        device, fixed = squares[0].roots.device, monomials.num_scales
        self.monomials, self.active, self.ranks = monomials.to(device), active.to(device), ranks
        self.squares, self.rough = self._prepared(joined(squares, fixed), fixed)
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

    def start(self) -> _Point:
        """Evaluate F at the weights as they are."""
        return self.at(torch.zeros(len(self.active), dtype=self.squares[0].dtype, device=self.active.device))

    def at(self, scale: Tensor) -> _Point:
        """Evaluate F at the weights rescaled by the log-scales ``scale``, ``[H]``."""
        factors = padded(2 * self.monomials.of(scale), 0).exp()  # [S + 1]
        rises, falls = factors[self.above], 1 / factors[self.below]
        into, out = self._sums(falls, rises)
        into, out = rises * into, falls * out
        value = self.ranks.sum_(into.sum())
        return _Point(scale, value, rises, falls, into, out, *self.monomials.collect_parts(*self._collect(into, out)))

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

    def newton_step(self, here: _Point, accuracy: float, is_rough: bool) -> Tensor:
        """Solve ``(D - A) z = (out - in) / 2``, where D - A is a quarter of the Hessian and D its diagonal.

        By conjugate gradients, until the error is ``accuracy`` of what it was.

        Args:
            here: where F is expanded.
            accuracy: of the solution.
            is_rough: whether products with A are taken in single precision.
        """

        def apply(z: Tensor) -> Tensor:
            scales = padded(self.monomials.of(z), 0)  # [S + 1]
            above, below = scales[self.above], scales[self.below]
            into, out = self._sums(here.falls * below, here.rises * above, is_rough)
            rising, falling = self._collect(above * here.into - here.rises * into, here.falls * out - below * here.out)
            return torch.where(self.active, self.monomials.collect(rising - falling), 0.0)

        diagonal = torch.where(self.active, here.incoming + here.outgoing, 1.0)
        residual = torch.where(self.active, here.outgoing - here.incoming, 0.0) / 2
        z = torch.zeros_like(residual)
        conditioned = residual / diagonal
        direction = conditioned.clone()
        product = residual @ conditioned
        target = accuracy**2 * float(product)
        for _ in range(CONJUGATE_GRADIENT_STEPS):
            image = apply(direction)
            curvature = direction @ image
            if not float(curvature) > 0:  # rounding is all that is left
                break
            length = product / curvature
            z += length * direction
            residual -= length * image
            conditioned = residual / diagonal
            previous, product = product, residual @ conditioned
            if float(product) <= target:
                break
            direction = conditioned + (product / previous) * direction
        return z
