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
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lightning_ecopt.symmetry.scales import Scales
from lightning_ecopt.symmetry.segments import SegmentSum
from lightning_ecopt.symmetry.shards import Ranks

COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Flow:
    """Squares between scales, as a batch of matrices, so that sums over them are products of matrices and vectors.

    Args:
        mass: ``[G, A, B]``; G counts what changes with both sides, as the groups of a convolution.
        incoming: scales ``[G, A]``, -1 for ground.
        outgoing: scales ``[G, B]``, likewise.
        rows: how many rows of the weights belong to each entry of ``incoming``.
    """

    mass: Tensor
    incoming: Tensor
    outgoing: Tensor
    rows: float

    @classmethod
    def of(cls, weight: Tensor, incoming: Tensor, outgoing: Tensor) -> Flow:
        """The squares of a weight that leads from ``outgoing`` to ``incoming``, scales that broadcast to it."""
        shapes = incoming.shape, outgoing.shape
        mass = weight.square().sum_to_size(torch.broadcast_shapes(*shapes))
        varies = [[size > 1 for size in shape] for shape in shapes]
        both = [k for k in range(mass.ndim) if varies[0][k] and varies[1][k]]
        first, second = ([k for k in range(mass.ndim) if own[k] and k not in both] for own in varies)
        rest = [k for k in range(mass.ndim) if not varies[0][k] and not varies[1][k]]
        count = prod(mass.shape[k] for k in both)
        sizes = (count, prod(mass.shape[k] for k in first), prod(mass.shape[k] for k in second))
        return cls(
            mass.permute(*both, *first, *second, *rest).reshape(sizes),
            incoming.permute(*both, *first, *second, *rest).reshape(count, -1),
            outgoing.permute(*both, *first, *second, *rest).reshape(count, -1),
            len(weight) / incoming.numel(),
        )

    @classmethod
    def nothing(cls, dtype: torch.dtype, device: torch.device) -> Flow:
        """Of a weight that other ranks hold."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return cls(torch.zeros(1, 0, 0, dtype=dtype, device=device), none, none, 0.0)

    def into(self, values: Tensor) -> Tensor:
        """Sums ``[G, A]`` of mass times values of the outgoing side, ``[G, B]``."""
        return torch.bmm(self.mass, values[..., None])[..., 0]

    def out_of(self, values: Tensor) -> Tensor:
        """Sums ``[G, B]`` of mass times values of the incoming side, ``[G, A]``."""
        return torch.bmm(values[:, None], self.mass)[:, 0]


def alive_units(flows: Sequence[Flow], scales: Scales, ranks: Ranks) -> Tensor:
    """Units that non-zero elements keep from growing and from shrinking without end, ``bool[H]``.

    In a plain network they are those which non-zero elements connect to ground on both sides. A unit with an infinite
    or undefined element, as after a step that diverged, is not alive.
    """
    device = flows[0].mass.device if flows else torch.device("cpu")
    scales = scales.to(device)
    broken = torch.zeros(scales.num_scales + 1, dtype=torch.bool, device=device)
    for flow in flows:
        sums = flow.into(torch.ones_like(flow.outgoing, dtype=flow.mass.dtype))
        if not bool(sums.isfinite().all()):
            unsound = ~flow.mass.isfinite()
            broken[flow.incoming[unsound.any(2)]] = True
            broken[flow.outgoing[unsound.any(1)]] = True
    ranks.any_(broken)
    sound = ~scales.in_(broken[:-1])
    flows = [flow if not bool(broken[flow.incoming].any()) else _finite(flow) for flow in flows]
    above, below = torch.zeros_like(sound), torch.zeros_like(sound)
    count = -1
    while count != (count := int(above.sum()) + int(below.sum())):
        caps, floors = scales.bounded(above, below)
        ground = caps.new_ones(1)  # index -1 is the last
        caps, floors = torch.cat([caps, ground]), torch.cat([floors, ground])
        # What non-zero elements connect to something bounded is bounded itself.
        for flow in flows:
            open_ = flow.into(caps[flow.outgoing].to(flow.mass.dtype)) > 0
            caps[flow.incoming[open_ & ~broken[flow.incoming]]] = True
            ranks.any_(caps)
        for flow in reversed(flows):
            open_ = flow.out_of(floors[flow.incoming].to(flow.mass.dtype)) > 0
            floors[flow.outgoing[open_ & ~broken[flow.outgoing]]] = True
            ranks.any_(floors)
        scales.bound_units(above, below, caps[:-1], floors[:-1])
        above &= sound
        below &= sound
    return above & below


def _finite(flow: Flow) -> Flow:
    """Without elements that are not finite."""
    return replace(flow, mass=flow.mass.masked_fill(~flow.mass.isfinite(), 0.0))


def mean_square(flows: Sequence[Flow], scales: Scales, ranks: Ranks) -> Tensor:
    """Sums of squares of the rows that lead into each unit, divided by the number of rows, ``[H]``."""
    incoming = torch.cat([flow.incoming.reshape(-1) % (scales.num_scales + 1) for flow in flows])
    squares = torch.cat([flow.mass.sum(2).reshape(-1) for flow in flows])
    rows = torch.cat([squares.new_full((flow.incoming.numel(),), flow.rows) for flow in flows])
    total = SegmentSum(incoming, scales.num_scales + 1)
    squares, rows = ranks.sum_(torch.stack([total(squares), total(rows)]))
    return (squares / rows)[: scales.num_units]


def sums_of_squares(flows: Sequence[Flow], scales: Scales, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sums of squares that grow and that shrink with each unit, ``[H]`` both; equal at the balanced member."""
    device = flows[0].mass.device
    active = torch.ones(scales.num_units, dtype=torch.bool, device=device)
    problem = _Problem(flows, scales.to(device), active, ranks)
    return problem.sums(torch.zeros(scales.num_units, dtype=flows[0].mass.dtype, device=device))


def balancing_scale(flows: Sequence[Flow], scales: Scales, active: Tensor, resolution: float, ranks: Ranks) -> Tensor:
    """The log-scales ``[H]`` that balance the ``active`` units (``bool[H]``, all alive); zero for the others.

    Coarse sweeps, each of which can only lower F however the units hang together, then Newton steps to rounding.

    Args:
        flows: the squares.
        scales: that the flows refer to.
        active: the units to move.
        resolution: of the type in which the weights are kept; a balance well below is good enough.
        ranks: that hold the parts of the weights; all of them get the same result.
    """
    device = flows[0].mass.device
    active = active.to(device)
    problem = _Problem(flows, scales.to(device), active, ranks)
    scale = torch.zeros(len(active), dtype=flows[0].mass.dtype, device=device)
    tolerance = max(64 * torch.finfo(scale.dtype).eps, resolution / 64)

    reach = problem.scales.reach
    for _ in range(COARSE_SWEEPS):
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 separates the units; the bound is least where
        # exp(8 a) = out / in. So for more terms, with the sum of their exponents for 2.
        incoming, outgoing = problem.sums(scale)
        step = torch.where(active, (outgoing.log() - incoming.log()) / (8 * reach), 0.0)
        scale += step
        if float(step.abs().max()) < 0.01:
            break

    for _ in range(NEWTON_STEPS):
        incoming, outgoing = problem.sums(scale)
        total = torch.where(active, incoming + outgoing, 1.0)
        imbalance = torch.where(active, incoming - outgoing, 0.0)
        error = float((imbalance / total).abs().max())
        if error < tolerance:
            break
        step = -0.5 * problem.solve(scale, imbalance, total)
        step /= max(1.0, float(step.abs().max()))
        before = float(problem.value(scale))
        while float(problem.value(scale + step)) > before * (1 + tolerance):
            step /= 2
        scale += step
    return scale


class _Problem:
    """F, its gradient and its Hessian."""

    def __init__(self, flows: Sequence[Flow], scales: Scales, active: Tensor, ranks: Ranks) -> None:
        self.flows = [self._prepared(flow, scales.num_scales + 1) for flow in flows]
        self.scales, self.active, self.ranks = scales, active, ranks
        size = scales.num_scales + 1
        self._incoming = SegmentSum(torch.cat([flow.incoming.reshape(-1) for flow in self.flows]), size)
        self._outgoing = SegmentSum(torch.cat([flow.outgoing.reshape(-1) for flow in self.flows]), size)

    @staticmethod
    def _prepared(flow: Flow, size: int) -> Flow:
        """With ground as the last scale, without what does not change and what is not finite, which joins no units."""
        incoming, outgoing = flow.incoming % size, flow.outgoing % size
        mass = flow.mass
        if bool(torch.isin(flow.incoming[flow.incoming >= 0], flow.outgoing).any()):
            mass = mass.masked_fill(
                (incoming[:, :, None] == outgoing[:, None]) & (incoming < size - 1)[:, :, None], 0.0
            )
        if not bool(mass.sum().isfinite()):
            mass = mass.masked_fill(~mass.isfinite(), 0.0)
        return Flow(mass, incoming, outgoing, flow.rows)

    def _factors(self, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the two sides of each flow multiply its squares by."""
        rises = torch.cat([2 * self.scales.of(scale), scale.new_zeros(1)]).exp()
        return [(rises[flow.incoming], 1 / rises[flow.outgoing]) for flow in self.flows]

    def _collect(self, into: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sums ``[S]`` of what leads into, and of what comes out of, each scale."""
        rising, falling = (torch.cat([value.reshape(-1) for value in values]) for values in (into, out))
        rising, falling = self.ranks.sum_(torch.stack([self._incoming(rising)[:-1], self._outgoing(falling)[:-1]]))
        return rising, falling

    def value(self, scale: Tensor) -> Tensor:
        parts = zip(self.flows, self._factors(scale), strict=True)
        here = torch.stack([(first * flow.into(second)).sum() for flow, (first, second) in parts]).sum()
        return self.ranks.sum_(here)

    def sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares that grow and that shrink with each unit, ``[H]`` both."""
        parts = list(zip(self.flows, self._factors(scale), strict=True))
        into = [first * flow.into(second) for flow, (first, second) in parts]
        out = [second * flow.out_of(first) for flow, (first, second) in parts]
        return self.scales.collect_parts(*self._collect(into, out))

    def solve(self, scale: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        """Solve ``(D - A) z = right``, a quarter of the Hessian, by conjugate gradients with its diagonal D."""
        parts = list(zip(self.flows, self._factors(scale), strict=True))
        totals = [(first * flow.into(second), second * flow.out_of(first)) for flow, (first, second) in parts]

        def apply(z: Tensor) -> Tensor:
            padded = torch.cat([self.scales.of(z), z.new_zeros(1)])
            into, out = [], []
            for (flow, (first, second)), (above, below) in zip(parts, totals, strict=True):
                here, there = padded[flow.incoming], padded[flow.outgoing]
                into.append(here * above - first * flow.into(second * there))
                out.append(second * flow.out_of(first * here) - there * below)
            rising, falling = self._collect(into, out)
            return torch.where(self.active, self.scales.collect(rising - falling), 0.0)

        z = torch.zeros_like(right)
        residual = right.clone()
        conditioned = residual / diagonal
        direction = conditioned.clone()
        product = residual @ conditioned
        target = 1e-8 * float(product)
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
