"""The member of an equivalent class where gains are one, as most networks are initialised."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks, local, whole_shape
from lightning_ecopt.common.tensors import widest
from lightning_ecopt.symmetry.balance import balancing_scale, resolution_of
from lightning_ecopt.symmetry.coupling import NO_UNIT, couplings_here
from lightning_ecopt.symmetry.group import ScalingGroup


@torch.no_grad()
def scale_to_gains_of_one(group: ScalingGroup, active: Tensor) -> Tensor | None:
    """Find the log-scales ``[H]`` that lead from the present weights to where gains are one.

    The gains that lead into a unit and out of none, as those of a normalisation layer, get the geometric mean one. All
    other active units are balanced, given that. So the member depends on the class alone, as the balanced one does. A
    vector that leads out of units, as the scale of a layer between two ReLUs, is balanced; so is a single number. If
    parameters are sharded, call it on all ranks.

    Args:
        group: of the weights.
        active: ``bool[H]``, the units to move, all of them alive.

    Returns:
        ``None`` if no gain leads into an active unit.

    Example::

        log_scale = scale_to_gains_of_one(group, group.alive())
        group.rescale_(weights, log_scale)  # RMSNorm's gains are one, as they were when the network was made
    """
    ranks = Ranks(group.parameters)
    shapes = {name: whole_shape(parameter) for name, parameter in group.parameters.items()}
    vectors = {name for name, shape in shapes.items() if len(shape) == 1 and shape[0] > 1}
    gains = [each for each in group.couplings if each.parameter in vectors and not each.additive]
    if not gains:
        return None
    device = local(next(iter(group.parameters.values()))).device
    active = active.to(device)
    units = [torch.zeros(0, dtype=torch.int64, device=device)]
    logs = [torch.zeros(0, dtype=widest(device), device=device)]
    for coupling in couplings_here(gains, group.parameters):
        parameter = group.parameters[coupling.parameter]
        if ranks.counts(parameter):
            here = coupling.to(device).restricted(active)
            values = here.view(local(parameter.detach())).to(widest(device)).abs().log()
            # The scales of the coupling itself: a product, which `here` has none of, leads out, too.
            counted = values.isfinite() & (coupling.outgoing.to(device).expand(values.shape) == NO_UNIT)
            units.append(here.incoming.expand(values.shape).where(counted, -1).long())
            logs.append(values.where(counted, 0.0))
    number = torch.cat(units) % (group.num_units + 1)
    values = torch.cat(logs)
    sum_up = SegmentSum(number, group.num_units + 1)
    sums, counts = ranks.sum_(torch.stack([sum_up(values), sum_up(torch.ones_like(values))]))[:, :-1]
    if not bool((counts > 0).any()):
        return None
    start = -sums / counts.clamp(min=1)
    others = active & (counts == 0) & ~group.scale_invariant.to(device)
    resolution = resolution_of(group.parameters.values())
    return balancing_scale(group.squares(ranks), group.monomials, others, resolution, ranks, start)
