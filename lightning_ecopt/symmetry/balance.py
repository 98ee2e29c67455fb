"""The member of least sum of squares in an equivalent class.

With ``a`` the squares of the elements from unit ``u`` to unit ``h``, the log-scales ``s`` minimise the convex function

    F(s) = sum_e a_e exp(2 (s_h - s_u)),        s = 0 for ground,

where for every unit the incoming and the outgoing squares are equal. (The same problem as balancing a matrix by a
diagonal similarity: E. E. Osborne, "On pre-conditioning of matrices", J. ACM 7 (1960).)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.symmetry.segments import SegmentSum

COARSE_SWEEPS = 40
NEWTON_STEPS = 50
CONJUGATE_GRADIENT_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Flow:
    """Squares between units: ``mass`` with the shape to which the unit numbers ``incoming`` and ``outgoing`` broadcast.

    ``-1`` stands for ground.
    """

    mass: Tensor
    incoming: Tensor
    outgoing: Tensor


def alive_units(flows: Sequence[Flow], num_units: int) -> Tensor:
    """Units that non-zero elements connect to ground on both sides, ``bool[H]``.

    A unit with an infinite or undefined element, as after a step that diverged, is not alive.
    """
    device = flows[0].mass.device if flows else torch.device("cpu")
    sound = torch.ones(num_units + 1, dtype=torch.bool, device=device)
    for flow in flows:
        broken = ~flow.mass.isfinite()
        for units in (flow.incoming, flow.outgoing):
            sound[units[broken.to(flow.mass.dtype).sum_to_size(units.shape) > 0]] = False
    sound[-1] = True  # ground, which is index -1
    forward = _reached([(f.mass, f.outgoing, f.incoming) for f in flows], sound)
    backward = _reached([(f.mass, f.incoming, f.outgoing) for f in reversed(flows)], sound)
    return forward & backward


def _reached(edges: Sequence[tuple[Tensor, Tensor, Tensor]], sound: Tensor) -> Tensor:
    """Units that can be reached from ground through edges of non-zero mass, each from its source to its target."""
    reached = torch.zeros_like(sound)
    reached[-1] = True
    count = -1
    while count != (count := int(reached.sum())):
        for mass, source, target in edges:
            open_ = ((mass > 0) & reached[source]).to(mass.dtype).sum_to_size(target.shape) > 0
            reached[target[open_]] = True
            reached &= sound
    return reached[:-1]


def balancing_scale(flows: Sequence[Flow], active: Tensor) -> Tensor:
    """The log-scales ``[H]`` that balance the ``active`` units (``bool[H]``, all alive); zero for the others.

    Coarse sweeps, each of which can only lower F however the units hang together, then Newton steps to rounding.
    """
    num_units = len(active)
    padded = torch.cat([active, active.new_zeros(1)])
    problem = _Problem(
        [
            Flow(
                # An element from a unit to itself does not change; one that is not finite joins units at rest.
                flow.mass.masked_fill(
                    (flow.incoming == flow.outgoing) & (flow.incoming >= 0) | ~flow.mass.isfinite(), 0.0
                ),
                flow.incoming.where(padded[flow.incoming], -1) % (num_units + 1),
                flow.outgoing.where(padded[flow.outgoing], -1) % (num_units + 1),
            )
            for flow in flows
        ],
        num_units,
    )
    scale = torch.zeros(num_units, dtype=flows[0].mass.dtype, device=active.device)
    tolerance = 64 * torch.finfo(scale.dtype).eps

    for _ in range(COARSE_SWEEPS):
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 separates the units; the bound is least where
        # exp(8 a) = out / in.
        incoming, outgoing = problem.sums(scale)
        step = torch.where(active, (outgoing.log() - incoming.log()) / 8, 0.0)
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
    """F, its gradient and its Hessian. Unit numbers are in 0 ... H, where H is ground."""

    def __init__(self, flows: Sequence[Flow], num_units: int) -> None:
        self.flows = flows
        self._incoming = SegmentSum(torch.cat([flow.incoming.reshape(-1) for flow in flows]), num_units + 1)
        self._outgoing = SegmentSum(torch.cat([flow.outgoing.reshape(-1) for flow in flows]), num_units + 1)

    def _squares(self, scale: Tensor) -> list[Tensor]:
        padded = torch.cat([scale, scale.new_zeros(1)])
        return [f.mass * (2 * (padded[f.incoming] - padded[f.outgoing])).exp() for f in self.flows]

    def _collect(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sums ``[H]`` of what leads into, and of what comes out of, each unit."""
        into = [value.sum_to_size(f.incoming.shape).reshape(-1) for value, f in zip(values, self.flows, strict=True)]
        out = [value.sum_to_size(f.outgoing.shape).reshape(-1) for value, f in zip(values, self.flows, strict=True)]
        return self._incoming(torch.cat(into))[:-1], self._outgoing(torch.cat(out))[:-1]

    def value(self, scale: Tensor) -> Tensor:
        return torch.stack([squares.sum() for squares in self._squares(scale)]).sum()

    def sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares into and out of each unit, ``[H]`` both."""
        return self._collect(self._squares(scale))

    def solve(self, scale: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        """Solve ``(D - A) z = right``, a quarter of the Hessian, by conjugate gradients with its diagonal D."""
        squares = self._squares(scale)

        def apply(z: Tensor) -> Tensor:
            padded = torch.cat([z, z.new_zeros(1)])
            pulls = [s * (padded[f.incoming] - padded[f.outgoing]) for s, f in zip(squares, self.flows, strict=True)]
            into, out = self._collect(pulls)
            return into - out

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
