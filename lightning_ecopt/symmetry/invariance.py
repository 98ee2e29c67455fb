"""Does a loss stay the same when units are rescaled? A question that its gradient answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.symmetry.group import ScalingGroup


@dataclass(frozen=True, eq=False)
class Invariance:
    """What a gradient tells of the units of a group. It is true if no unit breaks.

    Args:
        group: the scaling group.
        ratio: |Q| / A of each unit, ``[H]``: how much of its gradient would change the loss if it were rescaled.
        bound: the largest ratio that rounding explains, ``[H]``; infinite for units that cannot be judged.
    """

    group: ScalingGroup
    ratio: Tensor
    bound: Tensor

    @property
    def broken(self) -> Tensor:
        """Units that change the loss, ``bool[H]``; for :meth:`~lightning_ecopt.ScalingGroup.without`."""
        return (self.ratio > self.bound).cpu()

    @property
    def judged(self) -> Tensor:
        """Units of which the gradient can tell something, ``bool[H]``."""
        return self.bound.isfinite().cpu()

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that broken units scale."""
        return self.group.scaled_by(self.broken)

    def __bool__(self) -> bool:
        return not bool(self.broken.any())

    def __str__(self) -> str:
        if self:
            return f"rescaling any of {int(self.judged.sum())} units does not change the loss"
        worst = int(torch.where(self.broken, (self.ratio / self.bound).cpu(), 0.0).argmax())
        return (
            f"rescaling {int(self.broken.sum())} of {self.group.num_units} units, of {listing(self.parameters)}, "
            f"changes the loss: by {float(self.ratio[worst]):.2g} of their gradient, where rounding explains "
            f"{float(self.bound[worst]):.1g}"
        )


def check_invariance(
    group: ScalingGroup, loss: Tensor | Callable[[], Tensor] | None = None, *, roundoff: float | None = None
) -> Invariance:
    """Ask the gradient of a loss whether the loss stays the same when the units of a group are rescaled.

    A trace of the network cannot know what a loss does with it: penalties on weights, losses on hidden features, and
    weights that are used elsewhere break units. One backward pass shows it, for the batch that the loss is computed
    from; see :mod:`lightning_ecopt.symmetry.derivatives` for the sums, and for what rounding explains: about 1e-5 in
    float32, a tenth in 16 bits. So double precision is not needed, but 16 bits hide small violations.

    Args:
        group: the scaling group.
        loss: a scalar, or a function that computes it; gradients of parameters are left alone, and parameters that it
            does not depend on count as such. By default the gradients that parameters have are used, as after
            ``loss.backward()``; then units of a parameter without a gradient are not judged.
        roundoff: unit roundoff of what the loss is computed in, such as ``2**-8`` for bfloat16; by default as the
            types of parameters, the digits of gradients and torch's switches tell.

    Raises:
        ValueError: if a loss is given for sharded parameters, which have gradients after ``backward()`` only.

    Example::

        group = scaling_group(model, x)
        assert check_invariance(group, lambda: loss_function(model(x), y))
        penalty = 1e-3 * model[0].weight.abs().sum()
        print(check_invariance(group, loss_function(model(x), y) + penalty))  # rescaling 8 of 8 units, of ...
    """
    gradients = None if loss is None else _gradients(group, loss)
    found = group.derivatives(gradients, roundoff)
    evidence = found.evidence(found.mean_size())
    return Invariance(group, evidence.ratio, evidence.bound(is_known=roundoff is not None))


def _gradients(group: ScalingGroup, loss: Tensor | Callable[[], Tensor]) -> dict[str, Tensor | None]:
    if any(map(is_sharded, group.parameters.values())):
        raise ValueError(
            "Sharded parameters have gradients after loss.backward() only: call that, and leave out the loss."
        )
    with torch.enable_grad():
        value: Any = loss() if callable(loss) else loss
        found = torch.autograd.grad(value, list(group.parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(group.parameters.items(), found, strict=True)
    }
