"""The member of least sum of squares in an equivalent class.

With ``a_e`` the square of an element ``e`` from unit ``u`` to unit ``h``, the log-scales ``s`` minimise the convex
function

    F(s) = sum_e a_e exp(2 (s_h - s_u)),        s = 0 for what is fixed.

At the minimum the incoming and the outgoing squares of every unit are equal. (The same problem as balancing a matrix by
a diagonal similarity: E. E. Osborne, "On pre-conditioning of matrices", J. ACM 7 (1960).) Where an element is scaled by
a product of powers of units, s_h or s_u is a linear function of the units' log-scales, and F is convex all the same.

Where parameters are sharded, each rank holds its own part of the ``a_e``, and sums over them are added up over the
ranks.

Letters: H units; S scales, that is monomials, of which the first H are the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks
from lightning_ecopt.common.tensors import padded
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.objective import Objective, Point, objective_of
from lightning_ecopt.symmetry.squares import SquaredWeights, joined, ranges

#: Most steps of each kind; they end when the balance is good enough, which takes far fewer.
COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000
#: Coarse sweeps end when no log-scale moves by more: there Newton's method converges quadratically.
NEAR = 0.1
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
    sums, rows = ranks.sum_(total(torch.stack([sums, rows])))
    return (sums / rows)[: monomials.num_units]


def sums_of_squares(squares: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sum the squares that grow and those that shrink with each unit, ``[H]`` both; equal at the balanced member."""
    active = torch.ones(monomials.num_units, dtype=torch.bool, device="cpu")
    here = objective_of(squares, monomials, active, ranks).start()
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
    objective = objective_of(squares, monomials, active, ranks)
    here = objective.start() if start is None else objective.at(start)
    tolerance = max(64 * torch.finfo(here.scale.dtype).eps, resolution / 64)
    return _newton(objective, _coarse(objective, here), tolerance).scale


def _coarse(objective: Objective, here: Point) -> Point:
    """Sweep over all units at once, with steps that can only lower F however the units hang together."""
    reach = objective.monomials.reach
    for _ in range(COARSE_SWEEPS):
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 bounds F by a sum with one term per unit, which is least where
        # exp(8 a) = out / in. With products the 2 becomes the largest sum of exponents, 2 * reach.
        step = torch.where(objective.active, (here.outgoing.log() - here.incoming.log()) / (8 * reach), 0.0)
        if float(step.abs().max()) < NEAR:
            break
        here = objective.at(here.scale + step)
    return here


def _newton(objective: Objective, here: Point, tolerance: float) -> Point:
    """Take Newton steps, halved until F does not rise, to a relative imbalance below ``tolerance``.

    The gradient, which says when the balance is good, is always exact. The Hessian is taken in single precision, which
    serves as well unless it hardly differs from a singular one: where that has not halved the imbalance, the next step
    is exact.
    """
    is_rough, failed, before = True, 0, torch.inf
    for _ in range(NEWTON_STEPS):
        imbalance = (here.incoming - here.outgoing) / (here.incoming + here.outgoing)
        error = float(torch.where(objective.active, imbalance, 0.0).abs().max())
        if error < tolerance:
            break
        failed += is_rough and error > before / 2
        is_rough, before = failed < DOUBTS and not (is_rough and error > before / 2), error
        step = _newton_step(objective, here, min(0.1, max(error, 1e-4)), is_rough)
        step /= max(1.0, float(step.abs().max()))
        there = objective.at(here.scale + step)
        while float(there.value) > float(here.value) * (1 + tolerance):
            step /= 2
            there = objective.at(here.scale + step)
        here = there
    return here


def _newton_step(objective: Objective, here: Point, accuracy: float, is_rough: bool) -> Tensor:
    """Solve ``(D - A) z = (out - in) / 2``, where D - A is a quarter of the Hessian and D its diagonal.

    By conjugate gradients, until the error is ``accuracy`` of what it was.

    Args:
        objective: F.
        here: where F is expanded.
        accuracy: of the solution.
        is_rough: whether products with A may be taken in single precision.
    """
    active, times_hessian = objective.active, objective.hessian(here, is_rough)
    diagonal = torch.where(active, here.incoming + here.outgoing, 1.0)
    residual = torch.where(active, here.outgoing - here.incoming, 0.0) / 2
    z = torch.zeros_like(residual)
    conditioned = residual / diagonal
    direction = conditioned.clone()
    product = float(residual @ conditioned)
    target = accuracy**2 * product
    for _ in range(CONJUGATE_GRADIENT_STEPS):
        image = torch.where(active, times_hessian(direction), 0.0)
        curvature = float(direction @ image)
        if not curvature > 0:  # rounding is all that is left
            break
        z.add_(direction, alpha=product / curvature)
        residual.sub_(image, alpha=product / curvature)
        conditioned = residual / diagonal
        previous, product = product, float(residual @ conditioned)
        if product <= target:
            break
        direction.mul_(product / previous).add_(conditioned)
    return z
