"""How far a loss is from staying the same when units are rescaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.metrics.base import DTYPE, MetricOfModels, unobserved
from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.invariance import told_by


class InvarianceViolation(MetricOfModels):
    """Measures how far a loss is from staying the same when units are rescaled: the largest violation of all updates.

    The violation of a unit is ``|Q| / A``: of all that its weights could change the loss by, the share that rescaling
    it does change; see :func:`lightning_ecopt.check_invariance`. What rounding explains counts as zero, so that the
    metric is zero while the group is right for the loss. A penalty on the weights or a loss on hidden values gives 0.01
    to 1. Units that cannot be judged, as those without a gradient, are left out.

    Args:
        roundoff: Unit roundoff of what the loss is computed in, such as ``2**-8`` for bfloat16. By default as the types
            of parameters, the digits of gradients and torch's switches tell.
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example::

        violation = InvarianceViolation()
        loss.backward()
        violation.update(group)  # or the callback's group, in on_before_optimizer_step
        violation.compute()
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    largest_violation: Tensor

    def __init__(self, roundoff: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.roundoff = roundoff
        self.add_state("largest_violation", torch.zeros((), dtype=DTYPE, device="cpu"), dist_reduce_fx="max")

    def update(self, group: ScalingGroup) -> None:
        """Measure the violation in the gradients that parameters have, before the step of the optimizer.

        Args:
            group: The units, from :func:`lightning_ecopt.scaling_group` or ``callback.group``.
        """
        with unobserved():
            found = told_by(group, roundoff=self.roundoff)
            broken = torch.where(found.ratio > found.bound, found.ratio, 0.0)
            largest = broken.max() if len(broken) else broken.sum()
        before = self.largest_violation.to(DTYPE)
        self.largest_violation = torch.maximum(before, largest.to(before.device, DTYPE))

    def compute(self) -> Tensor:
        """The largest violation of all updates since the last reset, a scalar."""
        return self.largest_violation
