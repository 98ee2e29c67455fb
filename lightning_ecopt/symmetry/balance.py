"""The member of least sum of squares in an equivalent class.

With ``a`` the squares of the elements from unit ``u`` to unit ``h``, the log-scales ``s`` minimise the convex function

    F(s) = sum_e a_e exp(2 (s_h - s_u)),        s = 0 for ground,

where for every unit the incoming and the outgoing squares are equal. (The same problem as balancing a matrix by a
diagonal similarity: E. E. Osborne, "On pre-conditioning of matrices", J. ACM 7 (1960).) Where scales are products of
powers of units, s_h and s_u are linear in the units; F is convex all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.symmetry.scales import Scales
from lightning_ecopt.symmetry.segments import SegmentSum

COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Flow:
    """Squares between units: ``mass`` with the shape to which the unit numbers ``incoming`` and ``outgoing`` broadcast.

    ``-1`` stands for ground. To each entry of ``incoming`` belong as many ``rows`` of the weights.
    """

    mass: Tensor
    incoming: Tensor
    outgoing: Tensor
    rows: float


def alive_units(flows: Sequence[Flow], scales: Scales) -> Tensor:
    """Units that non-zero elements keep from growing and from shrinking without end, ``bool[H]``.

    In a plain network they are those which non-zero elements connect to ground on both sides. A unit with an infinite
    or undefined element, as after a step that diverged, is not alive.
    """
    device = flows[0].mass.device if flows else torch.device("cpu")
    scales = scales.to(device)
    broken = torch.zeros(scales.num_scales + 1, dtype=torch.bool, device=device)
    for flow in flows:
        unsound = ~flow.mass.isfinite()
        for ids in (flow.incoming, flow.outgoing):
            broken[ids[unsound.to(flow.mass.dtype).sum_to_size(ids.shape) > 0]] = True
    sound = ~scales.in_(broken[:-1])
    above, below = torch.zeros_like(sound), torch.zeros_like(sound)
    count = -1
    while count != (count := int(above.sum()) + int(below.sum())):
        caps, floors = scales.bounded(above, below)
        ground = caps.new_ones(1)  # index -1 is the last
        caps, floors = torch.cat([caps, ground]), torch.cat([floors, ground])
        _spread_bounds(caps, [(f.mass, f.outgoing, f.incoming) for f in flows], broken)
        _spread_bounds(floors, [(f.mass, f.incoming, f.outgoing) for f in reversed(flows)], broken)
        scales.bound_units(above, below, caps[:-1], floors[:-1])
        above &= sound
        below &= sound
    return above & below


def _spread_bounds(bounded: Tensor, edges: Sequence[tuple[Tensor, Tensor, Tensor]], broken: Tensor) -> None:
    """Bound, in place, what a non-zero element connects to a bounded source; each edge: mass, source, target."""
    for mass, source, target in edges:
        open_ = ((mass > 0) & bounded[source]).to(mass.dtype).sum_to_size(target.shape) > 0
        bounded[target[open_ & ~broken[target]]] = True


def mean_square(flows: Sequence[Flow], scales: Scales) -> Tensor:
    """Sums of squares of the rows that lead into each unit, divided by the number of rows, ``[H]``."""
    incoming = torch.cat([flow.incoming.reshape(-1) % (scales.num_scales + 1) for flow in flows])
    squares = torch.cat([flow.mass.sum_to_size(flow.incoming.shape).reshape(-1) for flow in flows])
    rows = torch.cat([squares.new_full((flow.incoming.numel(),), flow.rows) for flow in flows])
    total = SegmentSum(incoming, scales.num_scales + 1)
    return (total(squares) / total(rows))[: scales.num_units]


def balancing_scale(flows: Sequence[Flow], scales: Scales, active: Tensor) -> Tensor:
    """The log-scales ``[H]`` that balance the ``active`` units (``bool[H]``, all alive); zero for the others.

    Coarse sweeps, each of which can only lower F however the units hang together, then Newton steps to rounding.
    """
    device = flows[0].mass.device
    active = active.to(device)
    problem = _Problem(flows, scales.to(device), active)
    scale = torch.zeros(len(active), dtype=flows[0].mass.dtype, device=device)
    tolerance = 64 * torch.finfo(scale.dtype).eps

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

    def __init__(self, flows: Sequence[Flow], scales: Scales, active: Tensor) -> None:
        # An element from a scale to itself does not change; one that is not finite joins units at rest.
        self.flows = [
            Flow(
                flow.mass.masked_fill(
                    (flow.incoming == flow.outgoing) & (flow.incoming >= 0) | ~flow.mass.isfinite(), 0.0
                ),
                flow.incoming % (scales.num_scales + 1),  # ground is the last
                flow.outgoing % (scales.num_scales + 1),
                flow.rows,
            )
            for flow in flows
        ]
        self.scales, self.active = scales, active
        size = scales.num_scales + 1
        self._incoming = SegmentSum(torch.cat([flow.incoming.reshape(-1) for flow in self.flows]), size)
        self._outgoing = SegmentSum(torch.cat([flow.outgoing.reshape(-1) for flow in self.flows]), size)

    def _squares(self, scale: Tensor) -> list[Tensor]:
        padded = self._padded(scale)
        return [f.mass * (2 * (padded[f.incoming] - padded[f.outgoing])).exp() for f in self.flows]

    def _padded(self, scale: Tensor) -> Tensor:
        return torch.cat([self.scales.of(scale), scale.new_zeros(1)])

    def _collect(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sums ``[S]`` of what leads into, and of what comes out of, each scale."""
        into = [value.sum_to_size(f.incoming.shape).reshape(-1) for value, f in zip(values, self.flows, strict=True)]
        out = [value.sum_to_size(f.outgoing.shape).reshape(-1) for value, f in zip(values, self.flows, strict=True)]
        return self._incoming(torch.cat(into))[:-1], self._outgoing(torch.cat(out))[:-1]

    def value(self, scale: Tensor) -> Tensor:
        return torch.stack([squares.sum() for squares in self._squares(scale)]).sum()

    def sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares that grow and that shrink with each unit, ``[H]`` both."""
        return self.scales.collect_parts(*self._collect(self._squares(scale)))

    def solve(self, scale: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        """Solve ``(D - A) z = right``, a quarter of the Hessian, by conjugate gradients with its diagonal D."""
        squares = self._squares(scale)

        def apply(z: Tensor) -> Tensor:
            padded = self._padded(z)
            pulls = [s * (padded[f.incoming] - padded[f.outgoing]) for s, f in zip(squares, self.flows, strict=True)]
            into, out = self._collect(pulls)
            return torch.where(self.active, self.scales.collect(into - out), 0.0)

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
