"""Asks the gradient whether units may be rescaled: what a trace has not seen, or what begins later, shows there.

If the loss does not change when a unit is rescaled, then Q = sum k w g is zero for it, to rounding; see
:mod:`lightning_ecopt.symmetry.derivatives` for the sums, and for the bound. It is asked at the first step, at each
refresh, where weights are about to be rescaled, and at the :data:`LOOKS` steps behind it, whose sums are read once, at
the last of them, and dropped: a term may not be there in each step, and what is wrong keeps its sign more often than
rounding does. Where refreshes follow each other fast, not all are followed by such looks. Units that fail are held
fixed from then on, for all optimizers that share the group.

A gradient is asked only if it belongs to the weights as they are. It does not if somebody has written to them since the
last step (SAM computes gradients elsewhere; constraints, running means and restored weights come between), or if it was
there at the last step and nobody has zeroed it: then it is a sum over several weights. Gradients of other optimizers'
parameters, which another loss may have left, are used on the same conditions.

What is missed: violations below the bound, which is about 4e-5 in float32, 1e-2 in TF32 and 0.08 in 16 bits for a unit
between two layers, and smaller than that part of the largest gradient so far; a term that is in none of the steps that
are looked at; units with clipped elements. Where no trainer tells the precision, a violation of most of the units at
once by up to 2e-2 is taken for computation in 16 bits, as gradients need not show it (what has been divided, added up
or clipped has other digits); :meth:`~lightning_ecopt.EquivalentClassOptimizer.follow_precision` tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import listing
from lightning_ecopt.kernels import EagerKernels, Kernels
from lightning_ecopt.symmetry import DeferredGroup, ScalingGroup
from lightning_ecopt.symmetry.derivatives import LAMBDA, Evidence, roundoff_at, roundoff_of
from lightning_ecopt.symmetry.scales import Operation

#: Steps behind a refresh that are looked at. With the one at the refresh there are five, more than are needed to meet
#: a term of every other step, or half of the batches, with a probability of 97 %, and few beside those of an epoch.
LOOKS = 4
#: Standard deviations of rounding from which on a unit is held fixed if another of its layer is.
PEERS = 2.0
#: The mark of a gradient that a step has used.
USED = "_was_used_by_lightning_ecopt"
BROKEN = (
    "The loss changes when units of {names} are rescaled, by {ratio:.3g} % of their gradient (rounding explains "
    "{bound:.1g} %): {count} of {all} units are held fixed from now on. That is right for a penalty or a loss on "
    "features. Otherwise gradients are not those of the loss: they are changed on purpose (noise, clipping by value, "
    "hooks), cut (features are detached for a probe, or meet a frozen copy) or computed at other weights (SAM through "
    ".data): pass check=None; or a stand-in is wrong (check_stand_in tells), or the backward of an autograd.Function."
)


@dataclass(frozen=True, eq=False)
class LastStep:
    """What a step has left behind, of the optimizer's first parameter with a gradient.

    The gradient that was used gets a mark. A weak reference to it, or to the parameter, would keep ``module.to`` from
    moving sharded parameters: ``torch.utils.swap_tensors`` refuses what has one.

    Args:
        parameter: the parameter.
        version: how often it had been written to.
    """

    parameter: Tensor
    version: int

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> LastStep | None:
        """Of the first of the parameters with a gradient, or the first of all; ``None`` if there are none."""
        p = next((p for p in parameters if p.grad is not None), next(iter(parameters), None))
        if p is None:
            return None
        if p.grad is not None:
            setattr(p.grad, USED, True)
        return cls(p, _version(p))

    def is_over(self, has_zeroed: bool) -> bool:
        """Whether there are other gradients, at the weights that the step has left."""
        if _version(self.parameter) != self.version:
            return False
        return has_zeroed or not hasattr(self.parameter.grad, USED)


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


@dataclass(frozen=True)
class Verdict:
    """Units that may not be rescaled.

    Args:
        units: ``bool[H]``.
        why: for the report.
        message: for the user.
    """

    units: Tensor
    why: Operation
    message: str


def _unknown() -> str | None:
    return None


class GradientCheck:
    """Looks at gradients, and says which units may not be rescaled.

    Args:
        parameters: of the optimizer.

    Attributes:
        violation: the largest |Q| / A of a unit that has been found to break, so far; zero if there is none.
        precision: says in what precision a trainer computes, if somebody knows.
        has_zeroed: whether the optimizer was asked to zero gradients since its last step.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.violation = 0.0
        self.precision: Callable[[], str | None] = _unknown
        self.has_zeroed = False
        self._own: set[int] = set()
        self._last: LastStep | None = None
        self._was_fresh = False  # at the last step; a resumed run and a copy have no step before the next
        self._group: ScalingGroup | None = None  # which the numbers of units belong to
        self._sums: Evidence | None = None  # over the looks since the refresh, until they have been read
        self._largest: Tensor | None = None  # mean of A over units, of all looks at the group so far
        self._left, self._is_first = LOOKS, True
        self.note_step(parameters)

    def note_step(self, parameters: Sequence[Tensor]) -> None:
        """Take note that weights are where the next gradients should be computed."""
        self._last, self.has_zeroed = LastStep.of(parameters), False

    @property
    def is_looking(self) -> bool:
        """Whether the next gradients are looked at in any case."""
        return self._left > 0

    @property
    def _is_fresh(self) -> bool:
        """Whether the gradients of the optimizer's parameters are those of a loss at the weights as they are."""
        return self._was_fresh if self._last is None else self._last.is_over(self.has_zeroed)

    def forget(self) -> None:
        """Decide from the gradients to come alone."""
        self._group, self._left, self._is_first = None, LOOKS, True

    def look(
        self,
        group: ScalingGroup,
        deferred: DeferredGroup,
        parameters: Sequence[Tensor],
        is_refresh: bool,
        is_watched: bool = True,
        kernels: Callable[[], Kernels] = EagerKernels,
    ) -> Verdict | None:
        """Look at the gradients if it is time to, and decide if it is time to, which waits for the device.

        Args:
            group: that is used now.
            deferred: where it comes from.
            parameters: those of the optimizer that are trained.
            is_refresh: whether weights are about to be rescaled.
            is_watched: whether the steps behind that refresh are looked at, too.
            kernels: returns those that add up, if they can.

        Returns:
            The units that break, if any do.
        """
        self._own, self._was_fresh = set(map(id, parameters)), self._is_fresh
        deferred.checks.add(self)
        if not (is_refresh or self._left) or not group.num_units:
            return None
        if len({p.device for p in group.parameters.values()}) > 1:
            return None
        if self._group is not group:
            self._group, self._sums, self._largest = group, None, None  # as in a run that is resumed with it
        known, gradients = roundoff_at(self.precision()), self._gradients(group, deferred.checks)
        now = self._now(group, gradients, known, kernels())
        sums = now if self._sums is None else self._sums + now
        self._left = LOOKS * is_watched if is_refresh else self._left - 1
        self._sums = (now if is_refresh else sums).to(_kept_in(group)) if self._left else None
        if not (is_refresh or self._is_first or self._left == 0):
            return None
        self._is_first = False
        return self._decided(group, deferred, [now, sums], known is not None)

    def _now(
        self,
        group: ScalingGroup,
        gradients: Mapping[str, Tensor | None],
        known: float | None,
        kernels: Kernels,
    ) -> Evidence:
        roundoff = max(known or 0.0, roundoff_of(group.parameters))
        # Gradients that were reset and have not come again: the loss does not depend on these parameters.
        own = self._own if self._was_fresh else set()
        silent = {name for name, p in group.parameters.items() if id(p) in own and p.requires_grad and p.grad is None}
        found = group.derivatives(gradients, roundoff, silent, kernels)
        mean = found.mean_size()
        self._largest = mean if self._largest is None else torch.maximum(self._largest.to(mean.device), mean)
        return found.evidence(self._largest)

    def _gradients(self, group: ScalingGroup, checks: Iterable[GradientCheck]) -> dict[str, Tensor | None]:
        """The gradients at the weights as they are, of all optimizers that share the group."""
        fresh = {key for check in checks if check is not self and check._is_fresh for key in check._own} - self._own
        fresh |= self._own if self._was_fresh else set()
        return {name: p.grad if p.requires_grad and id(p) in fresh else None for name, p in group.parameters.items()}

    def _decided(
        self, group: ScalingGroup, deferred: DeferredGroup, evidences: Sequence[Evidence], is_known: bool
    ) -> Verdict | None:
        ratios = torch.stack([evidence.ratio for evidence in evidences])
        bounds = torch.stack([evidence.bound(is_known=is_known) for evidence in evidences])
        excess = ratios / bounds
        units = deferred.agreed((excess > 1).any(0)).cpu()
        if not bool(units.any()):
            return None
        units = deferred.agreed(_with_peers(group, units, (excess > PEERS / LAMBDA).any(0).cpu()))
        worst = divmod(int(excess.argmax()), group.num_units)
        ratio, bound = float(ratios[worst]), float(bounds[worst])
        self.violation, self._left = max(self.violation, float(ratios[:, units.to(ratios.device)].max())), LOOKS
        names, count = listing(group.scaled_by(units)), int(units.sum())
        message = BROKEN.format(names=names, ratio=100 * ratio, bound=100 * bound, count=count, all=group.num_units)
        return Verdict(units, Operation("gradient", names), message)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike."""
        sums = None if self._sums is None else self._sums.sums.clone()
        largest = None if self._largest is None else self._largest.clone()
        return {
            "sums": sums,
            "largest": largest,
            "left": self._left,
            "violation": self.violation,
            "was_fresh": self._was_fresh,
        }

    def load(self, state: Mapping[str, Any] | None, group: ScalingGroup) -> None:
        """Go on from what :meth:`state_dict` has returned, with the same group; from ``None``, begin anew."""
        device, state = next(iter(group.parameters.values())).device, state or {}
        sums, largest = state.get("sums"), state.get("largest")
        self._group = group
        if sums is not None and sums.shape[1] != group.num_units:
            sums = None
        self._sums = None if sums is None else Evidence(sums.to(device, _kept_in(group), copy=True))
        self._largest = None if largest is None else largest.to(device, copy=True)
        self._left, self._is_first = state.get("left", LOOKS), not state
        self.violation = state.get("violation", 0.0)
        if state:
            self._last, self._was_fresh = None, state.get("was_fresh", False)

    def __getstate__(self) -> dict[str, Any]:  # a copy has other parameters
        return {**vars(self), "_own": set(), "_last": None}


def _with_peers(group: ScalingGroup, units: Tensor, likely: Tensor) -> Tensor:
    """Add the likely ones among the units that couple the same parameters: what breaks one channel breaks others."""
    units = units.clone()
    for each in group.unit_sets():
        if bool(units[each.units].any()):
            units[each.units] |= likely[each.units]
    return units


def _kept_in(group: ScalingGroup) -> torch.dtype:
    """The type in which sums are kept from one look to the next: that of the parameters, but for sixteen bits."""
    kinds = {torch.promote_types(p.dtype, torch.float32) for p in group.parameters.values()}
    return max(kinds, key=lambda kind: torch.finfo(kind).bits)
