"""Does a loss stay the same when units are rescaled? A question that its gradient answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.symmetry.group import ScalingGroup

NO_PARAMETER = "The loss depends on no parameter of this group"


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

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def __str__(self) -> str:
        if self:
            judged, all_units = int(self.judged.sum()), self.group.num_units
            rest = f"; {all_units - judged} have no gradient that tells" if judged < all_units else ""
            of_all = f"{judged} of {all_units}" if rest else f"{judged}"
            return f"rescaling any of {of_all} units does not change the loss{rest}"
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
    from; see :mod:`lightning_ecopt.symmetry.derivatives` for the sums, and for what rounding explains: about 4e-5 in
    float32, a tenth in 16 bits. So double precision is not needed, but 16 bits hide small violations.

    Args:
        group: the scaling group.
        loss: a scalar, or a function that computes it; gradients of parameters are left alone, and parameters that it
            does not depend on count as such. By default the gradients that parameters have are used, as after
            ``loss.backward()``; then units of a parameter without a gradient are not judged.
        roundoff: unit roundoff of what the loss is computed in, such as ``2**-8`` for bfloat16; by default as the
            types of parameters, the digits of gradients and torch's switches tell.

    Raises:
        TypeError: if the group is a module, or the loss is no tensor.
        ValueError: if the gradient tells nothing of any unit, as that of another network's loss; or if a loss is given
            for sharded parameters, which have gradients after ``backward()`` only.

    Example::

        group = scaling_group(model, x)
        assert check_invariance(group, lambda: loss_function(model(x), y))
        penalty = 1e-3 * model[0].weight.abs().sum()
        print(check_invariance(group, loss_function(model(x), y) + penalty))  # rescaling 8 of 8 units, of ...
    """
    if not isinstance(group, ScalingGroup):
        raise TypeError(
            f"check_invariance takes a scaling group, got {type(group).__name__}. Of a module it is "
            "scaling_group(module, example_input); of an optimizer, optimizer.group."
        )
    gradients = None if loss is None else _gradients(group, loss)
    found = told_by(group, gradients, roundoff)
    if group.num_units and not bool(found.judged.any()):
        raise ValueError(
            "The gradient tells nothing of any unit of this group: it is missing, zero or not finite. Call "
            "loss.backward() first, or pass the loss."
        )
    return found


def told_by(
    group: ScalingGroup, gradients: Mapping[str, Tensor | None] | None = None, roundoff: float | None = None
) -> Invariance:
    """What gradients tell of the units of a group, be it nothing.

    Args:
        group: the scaling group.
        gradients: by parameter name; by default those that parameters have.
        roundoff: as for :func:`check_invariance`.
    """
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
        if not isinstance(value, Tensor):
            given = "a function that returned " if callable(loss) else ""
            raise TypeError(f"The loss is a scalar tensor, or a function that returns one; got {given}{value!r:.60}.")
        if not value.requires_grad:
            raise ValueError(f"{NO_PARAMETER}: it has no gradient. Is it detached, or computed under no_grad?")
        found = torch.autograd.grad(value, list(group.parameters.values()), retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError(f"{NO_PARAMETER}: is it of another network, or of a copy of this one?")
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(group.parameters.items(), found, strict=True)
    }
