"""The path rule: steps in path coordinates, the rule of the paper (Meng et al., arXiv:1802.03713).

    inverse chain rule    g = dL/dw becomes dL/dv
    the base's step       v becomes v'
    weight allocation     w' = v' / beta'

The formulas are in :mod:`lightning_ecopt.steps.coordinates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import Tensors, ordinary_tensors
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.kernels.lines import LineKernels, Step
from lightning_ecopt.steps.coordinates import FreeWeights, PathCoordinates
from lightning_ecopt.steps.rule import (
    Advance,
    Allocation,
    Coefficients,
    PathStatistics,
    Reparametrization,
    Rule,
    Setting,
)
from lightning_ecopt.steps.skeleton import Skeleton, choose_skeleton
from lightning_ecopt.steps.state import WEIGHT_AVERAGE, StateEntries
from lightning_ecopt.symmetry import Coupling, ScalingGroup

#: The way out where :func:`set_skeleton_to_one_` does not fit.
NOT_PLAIN = (
    "In the paper's networks each unit has one tensor of weights on each side. Leave out others with "
    "group.without(units)."
)


class PathRule:
    """Turns a step of the base optimizer into one in path coordinates, from one refresh to the next.

    Args:
        group: the scaling group.
        parameters: by name, at the representative.
        kernels: make the passes over weights and gradients.
        skeleton: the skeleton weights, chosen at the representative.
        free_start: value at which the coordinates of free skeleton weights start.
        max_ratio: the guard: the coordinate of a free skeleton weight changes by at most this factor in one step, and
            never its sign; ``None`` is the paper's rule.
        before: the rule that was used so far, for the same group and parameters.
    """

    name = "path"
    needs_paths, is_measured = True, False
    _coordinates: PathCoordinates

    @ordinary_tensors()
    def __init__(
        self,
        group: ScalingGroup,
        parameters: Tensors,
        kernels: Kernels,
        skeleton: Skeleton,
        free_start: float,
        max_ratio: float | None,
        before: PathRule | None = None,
    ) -> None:
        self._max_ratio = max_ratio
        former = None if before is None else before._coordinates
        if former is not None and type(former.kernels) is type(kernels):
            kernels = former.kernels  # which have plans
        self._coordinates = PathCoordinates(group.couplings, parameters, skeleton, free_start, kernels, former)
        self.kernels = kernels
        self.rows, self._paths = self._coordinates.rows, self._coordinates.paths
        self._elements = self._coordinates.elements
        self._guarded: Tensor | int = 0

    @staticmethod
    def usable_units(group: ScalingGroup) -> Tensor:
        """Units with something on both sides that are in no product: only those have paths. ``bool[H]``."""
        return group.monomials.simple & ~group.scale_invariant

    @staticmethod
    def check(group: ScalingGroup) -> None:
        """Paths lead through all parameters, so that no rank may hold a part of one only.

        Raises:
            ValueError: if a parameter is sharded.
        """
        if any(map(is_sharded, group.parameters.values())):
            raise ValueError("The rule 'path' needs parameters that are not sharded: use rule='unit', or DDP.")

    @staticmethod
    def check_state(group: ScalingGroup, parameters: Tensors, state: Mapping[str, Any]) -> None:
        """Skeleton weights must be where the network has parameters.

        Raises:
            ValueError: if they are not.
        """
        skeleton = Skeleton.from_state_dict(state["skeleton"])
        if not skeleton.fits(group.couplings, parameters):
            raise ValueError(
                "The checkpoint has skeleton weights that this network has not: load it into the network and the "
                "parameter groups that it was made with."
            )

    @staticmethod
    def idle_statistics(dormant: int) -> PathStatistics:
        """No path has moved."""
        return PathStatistics(1.0, 1.0, 0, dormant)

    @classmethod
    def begin(cls, setting: Setting, entries: StateEntries, before: Rule | None) -> Rule | None:
        """Choose the skeleton anew, with beta = 1.

        Momentum starts anew at the skeleton weights. It could be carried over exactly, as a covector. But the component
        of one skeleton weight is then a sum over all elements that its paths meet; in a gradient they cancel, in
        momentum that was gathered at earlier weights they do not, and training diverges.
        """
        group = setting.group
        usable = setting.active & cls.usable_units(group)
        if not bool(usable.any()):
            return None
        # A path ends at a unit that cannot be used (in a product, or another optimizer's) as at an output. It does not
        # end at a dormant unit: zeros lead there, which are never skeleton weights.
        ends_paths = setting.alive & ~usable
        couplings: Sequence[Coupling] = group.couplings
        if bool(ends_paths.any()) or group.monomials.num_scales > group.num_units:
            couplings = [coupling.restricted(~ends_paths) for coupling in couplings]
        skeleton = choose_skeleton(couplings, setting.weights, usable, setting.skeleton)
        rule = cls._make(setting, skeleton, setting.free_start, before if isinstance(before, cls) else None)
        values = rule._paths.free_values
        for entry in entries.values():
            if entry.degree == WEIGHT_AVERAGE:
                rule._elements.write_free_(entry.tensors, values)
            elif not entry.keep_on_restart:
                rule._coordinates.restart_skeleton_(entry.tensors)
        return rule

    @classmethod
    def resume(cls, setting: Setting, state: Mapping[str, Any], entries: StateEntries) -> PathRule:
        """Go on in the coordinates that were saved, with the base's state in them, bit for bit."""
        skeleton = Skeleton.from_state_dict(state["skeleton"])
        rule = cls._make(setting, skeleton, float(state["free_start"]))
        rule._paths.beta.copy_(state["beta"])
        for name, entry in entries.items():
            for parameter, value in entry.tensors.items():
                value.copy_(state["moments"][name][parameter])
        return rule

    @classmethod
    def _make(cls, setting: Setting, skeleton: Skeleton, free_start: float, before: PathRule | None = None) -> PathRule:
        kernels, max_ratio = setting.kernels, setting.max_path_ratio
        return cls(setting.group, setting.parameters, kernels, skeleton, free_start, max_ratio, before)

    def reparametrization(self, weights: Tensors, gradients: Tensors, to_step: Coefficient) -> Reparametrization:
        """Path coordinates: v = w beta and dL/dv = g / beta; free skeleton weights have their own."""
        scale = self._paths.weight_scale
        return Reparametrization(scale, scale, None, self._coordinates.free_weights(weights, gradients))

    def transform_gradients_(self, here: Reparametrization, gradients: Tensors) -> Callable[[], None]:
        """The inverse chain rule: g becomes dL/dv, in place; returns the way back."""
        return self._coordinates.transform_gradients_(gradients, _free(here))

    def to_coordinates_(
        self, here: Reparametrization, weights: Tensors, entries: StateEntries
    ) -> Callable[[StateEntries], None]:
        """Turn weights into coordinates in place; the way back is weight allocation.

        The base's state is in coordinates already.
        """
        allocate_ = self._coordinates.to_coordinates_(weights)

        def to_weights_(entries: StateEntries) -> None:
            self._guarded = self._guarded + allocate_(self._max_ratio).num_guarded

        return to_weights_

    def allocate(
        self,
        here: Reparametrization,
        weights: Tensors,
        gradients: Tensors,
        entries: Sequence[Tensors],
        advance: Advance,
    ) -> Allocation:
        """Weight allocation, with the free skeleton weights first: beta', and so all other weights, depends on them."""
        free, elements = _free(here), self._elements
        at_free = [elements.read(tensors).chunk(2)[1] for tensors in entries]
        factor = advance(free.values, free.gradient, at_free, elements.of_free) / free.values
        present = self.rows.present(gradients)
        if present is not None:
            factor = torch.where(elements.of_free(present) > 0, factor, 1.0)
        allocated = self.kernels.allocate_(self._paths, factor, free.skeleton_weights, self._max_ratio)
        self._guarded = self._guarded + allocated.num_guarded
        to_weights = self._paths.weight_scale
        # Weights without a gradient have coordinates that do not move; but their unit's beta may have.
        resting = {name: weights[name] for name in self._coordinates.scaled if name not in gradients}
        if resting:
            self.rows.apply_(self.kernels, "affine_", resting, times=to_weights / here.weight_scale)

        def finish_() -> None:
            elements.write_(weights, allocated.skeleton)
            for tensors, values in zip(entries, at_free, strict=True):
                elements.write_free_(tensors, values)

        return Allocation(to_weights, finish_)

    def step_(self, kernels: LineKernels[Any], step: Step, coefficients: Coefficients, to_step: Coefficient) -> None:
        """One call: path gradients, the pass of the base, and weight allocation."""
        guarded = kernels.path_step_(
            step,
            self._paths,
            self._elements.elements,
            lambda scale, to_weights: coefficients(self.rows.spread, Reparametrization(scale, scale), to_weights),
            lambda: coefficients(self._elements.of_free),
            coefficients,
            self._max_ratio,
        )
        self._guarded = self._guarded + guarded

    def average_in_coordinates_(self, weights: Tensors) -> Callable[[], object]:
        """Turn weights into coordinates in place; the way back has no guard."""
        allocate_ = self._coordinates.to_coordinates_(weights)
        return lambda: allocate_(None)

    def commit(self) -> None:
        """Weight allocation has moved beta already."""

    def to_weight_entries_(self, entries: StateEntries, weights: Tensors) -> None:
        """Scale entries of coordinates to entries of weights; what belongs to skeleton weights starts anew."""
        for entry in entries.values():
            self._coordinates.multiply_by_beta_(entry.tensors, entry.degree)
            if entry.degree == WEIGHT_AVERAGE:
                self._elements.write_(entry.tensors, self._elements.read(weights))
            elif not entry.keep_on_restart:
                self._coordinates.restart_skeleton_(entry.tensors)

    def has_weight_entries(self) -> bool:
        """The base's state has entries of coordinates."""
        return False

    def statistics(self, dormant: int) -> PathStatistics:
        """The extremes of beta, and how often the guard was needed."""
        beta = self._paths.beta
        low, high = (float(value) for value in beta[:-1][self._coordinates.skeleton.active.to(beta.device)].aminmax())
        return PathStatistics(low, high, int(self._guarded), dormant)

    def clipped_rows(self) -> None:
        """Gradients are not clipped."""

    def state_dict(self, entries: StateEntries) -> dict[str, Any]:
        """The skeleton, beta ``[H + 1]``, and the base's state in coordinates, under the key ``moments``."""
        return {
            "skeleton": self._coordinates.skeleton.state_dict(),
            "beta": self._paths.beta.clone(),
            "free_start": self._paths.start,
            "moments": {
                name: {parameter: value.clone() for parameter, value in entry.tensors.items()}
                for name, entry in entries.items()
            },
        }


def _free(here: Reparametrization) -> FreeWeights:
    assert here.free is not None  # the path rule made it
    return here.free


@torch.no_grad()
def set_skeleton_to_one_(group: ScalingGroup) -> None:
    """Set the diagonal skeleton weights of a network to one: the start of Meng et al., arXiv:1802.03713.

    Of a multi-layer perceptron with weights w1 ... wL these are w1[i, i], w2[i, i] ... and, in front of C outputs,
    wL[i % C, i]; of a convolution they are at the centre of the kernel. All else stays as it was initialised. So the
    authors' public code starts, for EC-SGD and for the SGD that it is compared with. **This changes the function of the
    network**: call it before training. It is what ``rule="paper"`` is meant for, but any optimizer trains from there.

    Args:
        group: the scaling group of the network, whose weights are changed in place. Biases stay as they are.

    Raises:
        ValueError: if the network is not of the paper's kind: it has no units, some have no weight of two or more axes
            on each side, some are in products of scales, or parameters are sharded. Then nothing has changed.

    Example::

        set_skeleton_to_one_(scaling_group(model, x))
        optimizer = ec_sgd(model, lr=0.1, rule="paper")
    """
    if any(map(is_sharded, group.parameters.values())):
        raise ValueError("set_skeleton_to_one_: the parameters are sharded. Call it before they are.")
    usable = PathRule.usable_units(group)
    if group.num_units == 0:
        raise ValueError("set_skeleton_to_one_: the network has no units that can be rescaled, and so no skeleton.")
    if not bool(usable.all()):
        found = f"{int((~usable).sum())} of {group.num_units} units are in products of scales, or only normalised"
        raise ValueError(f"set_skeleton_to_one_: {found}. {NOT_PLAIN}")
    ones = {name: torch.ones_like(p, device="cpu") for name, p in group.parameters.items()}
    try:
        skeleton = choose_skeleton(group.couplings, ones, usable, "diagonal")
    except ValueError:
        raise ValueError(f"set_skeleton_to_one_: some units have no diagonal weight. {NOT_PLAIN}") from None
    fixed, out = (skeleton.fixed_coupling, skeleton.fixed_index), (skeleton.out_coupling, skeleton.out_index)
    for couplings, index in (fixed, out):
        for number in couplings.unique().tolist():
            coupling = group.couplings[number]
            weight = coupling.view(group.parameters[coupling.parameter].detach())
            places = index[couplings == number].to(weight.device)
            weight[torch.unravel_index(places, weight.shape)] = 1.0
