"""The member of least sum of squares in an equivalent class.

With ``a`` the squares of the elements from unit ``u`` to unit ``h``, the log-scales ``s`` minimise the convex function

    F(s) = sum_e a_e exp(2 (s_h - s_u)),        s = 0 for ground,

where for every unit the incoming and the outgoing squares are equal. (The same problem as balancing a matrix by a
diagonal similarity: E. E. Osborne, "On pre-conditioning of matrices", J. ACM 7 (1960).) Where scales are products of
powers of units, s_h and s_u are linear in the units; F is convex all the same.

Where the parameters are sharded each rank holds its own part of ``a``, and sums over it are added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.squares import SquaredWeights, are_finite, joined

COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000


def alive_units(flows: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> Tensor:
    """Units that non-zero elements keep from growing and from shrinking without end, ``bool[H]``.

    In a plain network they are those which non-zero elements connect to ground on both sides. A unit with an infinite
    or undefined element, as after a step that diverged, is not alive.
    """
    device = flows[0].roots.device if flows else torch.device("cpu")
    monomials = monomials.to(device)
    flows = joined(flows, monomials.num_scales)
    broken = torch.zeros(monomials.num_scales + 1, dtype=torch.bool, device=device)
    for number, finite in enumerate(are_finite(flows)):
        if not finite:
            undefined = flows[number].undefined()
            broken[flows[number].incoming[undefined.any(2)]] = True
            broken[flows[number].outgoing[undefined.any(1)]] = True
            flows[number] = flows[number].without(undefined)
    ranks.any_(broken)
    sound = ~monomials.in_(broken[:-1])
    above, below = torch.zeros_like(sound), torch.zeros_like(sound)
    before, found, most = -1, 0, 2 * int(sound.sum())
    while before < found < most:
        caps, floors = (torch.cat([side, side.new_ones(1)]) for side in monomials.bounded(above, below))
        # What non-zero elements connect to something bounded is bounded itself.
        for flow in flows:
            open_ = flow.into(caps[flow.outgoing].to(flow.dtype)) > 0
            _set(caps, flow.incoming, open_ & ~broken[flow.incoming])
        for flow in reversed(flows):
            open_ = flow.out_of(floors[flow.incoming].to(flow.dtype)) > 0
            _set(floors, flow.outgoing, open_ & ~broken[flow.outgoing])
        caps, floors = ranks.any_(torch.stack([caps, floors]))
        monomials.bound_units(above, below, caps[:-1], floors[:-1])
        above &= sound
        below &= sound
        before, found = found, int(above.sum() + below.sum())
    return above & below


def _set(marks: Tensor, places: Tensor, chosen: Tensor) -> None:
    """Mark the chosen ones of ``places``; the last of ``marks``, which is ground, is marked already."""
    marks[places.where(chosen, -1)] = True


def mean_square(flows: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> Tensor:
    """Sums of squares of the rows that lead into each unit, divided by the number of rows, ``[H]``."""
    incoming = torch.cat([flow.incoming.reshape(-1) % (monomials.num_scales + 1) for flow in flows])
    squares = torch.cat([flow.into(torch.ones_like(flow.outgoing, dtype=flow.dtype)).reshape(-1) for flow in flows])
    rows = torch.cat([squares.new_full((flow.incoming.numel(),), flow.rows) for flow in flows])
    total = SegmentSum(incoming, monomials.num_scales + 1)
    squares, rows = ranks.sum_(torch.stack([total(squares), total(rows)]))
    return (squares / rows)[: monomials.num_units]


def sums_of_squares(flows: Sequence[SquaredWeights], monomials: Monomials, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sums of squares that grow and that shrink with each unit, ``[H]`` both; equal at the balanced member."""
    active = torch.ones(monomials.num_units, dtype=torch.bool)
    here = _Problem(flows, monomials, active, ranks).start()
    return here.incoming, here.outgoing


def balancing_scale(
    flows: Sequence[SquaredWeights], monomials: Monomials, active: Tensor, resolution: float, ranks: Ranks
) -> Tensor:
    """The log-scales ``[H]`` that balance the ``active`` units (``bool[H]``, all alive); zero for the others.

    Coarse sweeps, each of which can only lower F however the units hang together, then Newton steps to rounding.

    Args:
        flows: the squares.
        monomials: that the flows refer to.
        active: the units to move.
        resolution: of the type in which the weights are kept; a balance well below is good enough.
        ranks: that hold the parts of the weights; all of them get the same result.
    """
    problem = _Problem(flows, monomials, active, ranks)
    active, here = problem.active, problem.start()
    tolerance = max(64 * torch.finfo(here.scale.dtype).eps, resolution / 64)

    reach = problem.monomials.reach
    for _ in range(COARSE_SWEEPS):
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 separates the units; the bound is least where
        # exp(8 a) = out / in. So for more terms, with the sum of their exponents for 2.
        step = torch.where(active, (here.outgoing.log() - here.incoming.log()) / (8 * reach), 0.0)
        if float(step.abs().max()) < 0.1:
            break
        here = problem.at(here.scale + step)

    for _ in range(NEWTON_STEPS):
        error = float(
            torch.where(active, (here.incoming - here.outgoing) / (here.incoming + here.outgoing), 0.0).abs().max()
        )
        if error < tolerance:
            break
        step = problem.newton_step(here, min(0.1, max(error, 1e-4)))
        step /= max(1.0, float(step.abs().max()))
        there = problem.at(here.scale + step)
        while float(there.value) > float(here.value) * (1 + tolerance):
            step /= 2
            there = problem.at(here.scale + step)
        here = there
    return here.scale


@dataclass(frozen=True, eq=False)
class _Point:
    """F and its derivatives at some log-scales, N and M counting the incoming and the outgoing scales of all flows.

    Args:
        scale: the log-scales of the units, ``[H]``.
        value: of F.
        rises: what the incoming sides multiply squares by, ``[N]``.
        falls: what the outgoing sides multiply them by, ``[M]``.
        into: sums of squares for each incoming scale, ``[N]``.
        out: sums of squares for each outgoing scale, ``[M]``.
        incoming: sums of squares that grow with each unit, ``[H]``.
        outgoing: sums of squares that shrink with each unit, ``[H]``.
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

    def __init__(self, flows: Sequence[SquaredWeights], monomials: Monomials, active: Tensor, ranks: Ranks) -> None:
        device, ground = flows[0].roots.device, monomials.num_scales
        self.monomials, self.active, self.ranks = monomials.to(device), active.to(device), ranks
        self.flows = self._prepared(joined(flows, ground), ground)
        self.above = torch.cat([flow.incoming.reshape(-1) for flow in self.flows])
        self.below = torch.cat([flow.outgoing.reshape(-1) for flow in self.flows])
        self._incoming, self._outgoing = SegmentSum(self.above, ground), SegmentSum(self.below, ground)

    @staticmethod
    def _prepared(flows: list[SquaredWeights], ground: int) -> list[SquaredWeights]:
        """Without what does not change and what is not finite, which joins no units."""
        finite = are_finite(flows)
        shared = [torch.isin(flow.incoming.where(flow.incoming != ground, -1), flow.outgoing).any() for flow in flows]
        for number, joins in enumerate(torch.stack(shared).tolist()):
            if not finite[number]:
                flows[number] = flows[number].without(flows[number].undefined())
            if joins:
                same = flows[number].incoming[:, :, None] == flows[number].outgoing[:, None]
                flows[number] = flows[number].without(same)
        return flows

    def start(self) -> _Point:
        """The weights as they are."""
        return self.at(torch.zeros(len(self.active), dtype=self.flows[0].dtype, device=self.active.device))

    def at(self, scale: Tensor) -> _Point:
        """The weights rescaled by ``scale``, ``[H]``."""
        factors = torch.cat([2 * self.monomials.of(scale), scale.new_zeros(1)]).exp()
        rises, falls = factors[self.above], 1 / factors[self.below]
        into, out = self._sums(falls, rises)
        into, out = rises * into, falls * out
        value = self.ranks.sum_(into.sum())
        return _Point(scale, value, rises, falls, into, out, *self.monomials.collect_parts(*self._collect(into, out)))

    def _sums(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over squares times ``right [M]`` for each incoming scale, and times ``left [N]`` for each outgoing."""
        rights = right.split([flow.outgoing.numel() for flow in self.flows])
        lefts = left.split([flow.incoming.numel() for flow in self.flows])
        into, out = zip(
            *(
                flow.both_ways(values.view_as(flow.outgoing), others.view_as(flow.incoming))
                for flow, values, others in zip(self.flows, rights, lefts, strict=True)
            ),
            strict=True,
        )
        return torch.cat([sums.reshape(-1) for sums in into]), torch.cat([sums.reshape(-1) for sums in out])

    def _collect(self, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Sums ``[S]`` of what leads into, and of what comes out of, each scale."""
        rising, falling = self.ranks.sum_(torch.stack([self._incoming(into), self._outgoing(out)]))
        return rising, falling

    def newton_step(self, here: _Point, accuracy: float) -> Tensor:
        """Solve ``(D - A) z = (out - in) / 2``, where D - A is a quarter of the Hessian and D its diagonal.

        By conjugate gradients, until the error is ``accuracy`` of what it was.
        """

        def apply(z: Tensor) -> Tensor:
            padded = torch.cat([self.monomials.of(z), z.new_zeros(1)])
            above, below = padded[self.above], padded[self.below]
            into, out = self._sums(here.falls * below, here.rises * above)
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
            length = product / (direction @ image)
            z += length * direction
            residual -= length * image
            conditioned = residual / diagonal
            previous, product = product, residual @ conditioned
            if float(product) <= target:
                break
            direction = conditioned + (product / previous) * direction
        return z
