"""What a step rule is: in which coordinates the base optimizer takes its step.

A rule turns a step of any optimizer into one in the equivalent-class space. It says where the base takes the step, at
v = w / weight_scale, and which gradients g_v it is shown there:

    g_v = grad_scale g + grad_shift         before the step
    w'  = to_weights v'                     after the step

In the path rule these are the paper's inverse chain rule, g_v = dL/dv = g / beta, and its weight allocation. In the
unit rule g_v is g, centred and clipped, and the step in v is scaled to the size of the row when it comes back to w.

``weight_scale``, ``grad_scale``, ``grad_shift`` and ``to_weights`` are vectors over rows, ``[R]``. A row is all the
elements of one parameter that lead into one unit; see :class:`~lightning_ecopt.steps.rows.Rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.kernels.lines import LineKernels, OfPass, Step
from lightning_ecopt.steps.coordinates import FreeWeights
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.state import StateEntries
from lightning_ecopt.symmetry import ScalingGroup

#: How the base's step in a parameter depends on its gradients. ``"linear"``: twice the gradients make a step of twice
#: the length, as in SGD. ``"own size"``: each element's step has a size of its own, as in Adam. ``"whole"``: the step
#: is made of the parameter as a whole, as in Muon, which makes all singular values of a matrix equal.
StepKind = Literal["linear", "own size", "whole"]


@dataclass(frozen=True)
class PathStatistics:
    """Whether the path rule is healthy, since the last refresh.

    Args:
        min_path_value: smallest value of a path out of a unit, relative to the start of the period.
        max_path_value: largest value of a path out of a unit, relative to the start of the period.
        guarded_paths: how often the guard limited the move of a free skeleton weight.
        dormant_units: units without a path of non-zero elements, which are treated in weight space.
    """

    min_path_value: float
    max_path_value: float
    guarded_paths: int
    dormant_units: int


@dataclass(frozen=True)
class UnitStatistics:
    """Whether the unit rule is healthy, since the start of training.

    Args:
        clipped_share: share of the gradients of rows that were clipped to their running size.
        dormant_units: units without a path of non-zero elements, which were not balanced.
    """

    clipped_share: float
    dormant_units: int


@dataclass(frozen=True)
class Setting:
    """What a rule is made of, at a refresh or from a checkpoint.

    Args:
        group: the scaling group.
        weights: of the whole group by name, at the representative: what this rank holds of them, on one device.
        parameters: those of the base optimizer by name, sharded if they are.
        kernels: make the passes over weights and gradients.
        alive: units on a path of non-zero elements, ``bool[H]``.
        exclusive: units that scale trainable parameters of this optimizer alone, ``bool[H]``.
        is_balanced: whether the representative is the balanced member.
        kinds: of the base's steps in its parameters, by name.
        means: returns the means of gradients that the base's momentum holds, by parameter name.
        skeleton: how the path rule chooses skeleton weights.
        free_start: value at which the path rule starts the coordinates of free skeleton weights.
        max_path_ratio: the path rule's guard.
    """

    group: ScalingGroup
    weights: Tensors
    parameters: Tensors
    kernels: Kernels
    alive: Tensor
    exclusive: Tensor
    is_balanced: bool
    kinds: Mapping[str, StepKind]
    means: Callable[[], Tensors]
    skeleton: str
    free_start: float
    max_path_ratio: float | None

    @property
    def active(self) -> Tensor:
        """Units that are balanced and optimised, ``bool[H]``."""
        return self.alive & self.exclusive


@dataclass(frozen=True)
class Reparametrization:
    """Coordinates ``v = w / weight_scale`` for one step, and gradients ``grad_scale * g + grad_shift`` in them.

    Args:
        weight_scale: ``[R]``, not zero.
        grad_scale: ``[R]``, not zero.
        grad_shift: ``[R]``; ``None`` stands for zero.
        free: the free skeleton weights of the path rule, whose coordinates are not ``w / weight_scale``.
    """

    weight_scale: Tensor
    grad_scale: Tensor
    grad_shift: Tensor | None = None
    free: FreeWeights | None = None


#: Lets the base optimizer move coordinates that are no weights, one number for each unit:
#: ``advance(values, gradient, entries, spread)`` returns the moved ``values [H]`` and changes ``entries``, a list of
#: state vectors ``[H]``, in place. ``spread`` makes numbers for units, ``[H]``, of what each parameter has, ``[N]``.
Advance = Callable[[Tensor, Tensor, Sequence[Tensor], Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Allocation:
    """The way from coordinates back to weights: ``w' = to_weights * v'``.

    Args:
        to_weights: ``[R]``; ``None`` if it is the ``weight_scale`` of the reparametrization.
        finish_: puts elements right that have coordinates of their own, once all others are weights again.
    """

    to_weights: Tensor | None = None
    finish_: Callable[[], None] = lambda: None


class Coefficients(Protocol):
    """Gives the coefficients of a fused step."""

    def __call__(
        self,
        spread: Callable[[Tensor], Tensor],
        here: Reparametrization | None = None,
        to_weights: Tensor | None = None,
    ) -> OfPass:
        """Of a pass over rows or units.

        Args:
            spread: makes values of what the pass goes over of what each parameter has, ``[N]``.
            here: the coordinates; ``None`` if what the pass goes over is coordinates already.
            to_weights: what coordinates are multiplied by afterwards; ``None`` if it is ``here.weight_scale``.
        """


class Rule(Protocol):
    """A step rule, from one refresh to the next (the unit rule: for the whole run).

    A step of the base optimizer is taken in one of two ways, which agree to rounding. *Wrapped*: gradients and weights
    are moved to coordinates in memory (:meth:`transform_gradients_`, :meth:`to_coordinates_`), the base's own ``step``
    runs, and the way back is taken. *Fused*: one pass over weights, gradients and state does all three, with the
    coefficients of :meth:`reparametrization` and :meth:`allocate`.

    Attributes:
        name: of the option that chooses the rule, which checkpoints have, too.
        needs_paths: whether units without paths, in products or powers, are left in weight space; for the report.
        rows: the rows that the rule's vectors run over.
        kernels: make the passes over weights and gradients.
        is_measured: whether a step keeps what :meth:`clipped_rows` tells.
    """

    name: str
    needs_paths: bool
    is_measured: bool
    rows: Rows
    kernels: Kernels

    @staticmethod
    def usable_units(group: ScalingGroup) -> Tensor:
        """Units whose freedom the rule can use, ``bool[H]``."""

    @staticmethod
    def check(group: ScalingGroup) -> None:
        """Raise ``ValueError`` if the rule does not work for the parameters of a group."""

    @staticmethod
    def check_state(group: ScalingGroup, parameters: Tensors, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a saved state belongs to another network.

        Args:
            group: the scaling group.
            parameters: the base optimizer's own, by name.
            state: what :meth:`state_dict` has returned.
        """

    @staticmethod
    def idle_statistics(dormant: int) -> PathStatistics | UnitStatistics:
        """The statistics while there is nothing for the rule to do."""

    @classmethod
    def begin(cls, setting: Setting, entries: StateEntries, before: Rule | None) -> Rule | None:
        """The rule from a refresh on; ``entries`` are those of weights, and become those of coordinates.

        Args:
            setting: the network at its representative.
            entries: the base optimizer's state.
            before: the rule that was used until the refresh.

        Returns:
            ``None`` if the network has no units that the rule can use.
        """

    @classmethod
    def resume(cls, setting: Setting, state: Mapping[str, Any], entries: StateEntries) -> Rule:
        """The rule that :meth:`state_dict` saved; the state has been checked."""

    def reparametrization(self, weights: Tensors, gradients: Tensors, to_step: Coefficient) -> Reparametrization:
        """Where the base optimizer takes its next step; changes no weight, no gradient and no state.

        Args:
            weights: by parameter name.
            gradients: by parameter name; parameters without a gradient are missing.
            to_step: momentum of the base times ``to_step`` has the size of one gradient. A number, or one for each row,
                ``[R]``.
        """

    def transform_gradients_(self, here: Reparametrization, gradients: Tensors) -> Callable[[], None]:
        """Turn gradients of weights into those of coordinates, in place; returns the way back."""

    def to_coordinates_(
        self, here: Reparametrization, weights: Tensors, entries: StateEntries
    ) -> Callable[[StateEntries], None]:
        """Turn weights, and averages of weights, into coordinates in place; returns the way back."""

    def allocate(
        self,
        here: Reparametrization,
        weights: Tensors,
        gradients: Tensors,
        entries: Sequence[Tensors],
        advance: Advance,
    ) -> Allocation:
        """The way back of a fused step; moves the coordinates that are no weights with ``advance``.

        Args:
            here: the coordinates of the step.
            weights: by parameter name, still the weights before the step.
            gradients: by parameter name.
            entries: the base's state, one mapping by parameter name for each entry of the fused step.
            advance: takes the base's step for one coordinate of each unit.
        """

    def average_in_coordinates_(self, weights: Tensors) -> Callable[[], object]:
        """Move weights to where the base averages them between steps; returns the way back."""

    def commit(self) -> None:
        """Take note that the step of the last :meth:`reparametrization` has been taken."""

    def to_weight_entries_(self, entries: StateEntries, weights: Tensors) -> None:
        """Turn state entries of coordinates into entries of weights, in place.

        Entries of coordinates that no weight has become zero.
        """

    def has_weight_entries(self) -> bool:
        """Whether the base's state has entries of weights already, so that :meth:`to_weight_entries_` does nothing."""

    def statistics(self, dormant: int) -> PathStatistics | UnitStatistics:
        """Whether all is well. Waits for the device."""

    def clipped_rows(self) -> Tensor | None:
        """The rows whose gradients were clipped in the last step, ``bool[R]``, if that was measured.

        Returns:
            ``None`` if it was not, or the rule clips none.
        """

    def state_dict(self, entries: StateEntries) -> dict[str, Any]:
        """What :meth:`resume` needs, with copies of ``entries`` if they are not those of weights."""

    def step_(self, kernels: LineKernels[Any], step: Step, coefficients: Coefficients, to_step: Coefficient) -> None:
        """Take a fused step of whole parameters, each of which has a gradient, by one call of kernels.

        Args:
            kernels: address memory.
            step: what they work on; its places are the rows.
            coefficients: of the pass of the base; the same object as long as they stay the same.
            to_step: that of :meth:`reparametrization`.
        """
