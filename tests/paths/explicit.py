"""Path coordinates by their definition, one unit at a time.

Nothing of the package is used but which elements a skeleton has chosen, and which units each element leads between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ecopt import ScalingGroup
from lightning_ecopt.steps.skeleton import Skeleton
from lightning_ecopt.symmetry.coupling import NO_UNIT

Place = tuple[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]


def place_of(group: ScalingGroup, number: int, flat: int) -> Place:
    """Parameter name and index of the element with a flat index in the region of a coupling."""
    coupling = group.couplings[number]
    shape = group.parameters[coupling.parameter].shape
    positions = [range(*part.indices(size)) for part, size in zip(coupling.region, shape, strict=True)]
    index: list[int] = []
    for axis in reversed(positions):
        flat, k = divmod(flat, len(axis))
        index.insert(0, axis[k])
    return coupling.parameter, tuple(index)


def ends(group: ScalingGroup, active: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For every element of every parameter the active unit into which it leads, and that from which it comes."""
    into = {name: torch.full(p.shape, NO_UNIT) for name, p in group.parameters.items()}
    from_ = {name: torch.full(p.shape, NO_UNIT) for name, p in group.parameters.items()}
    for coupling in group.couplings:
        for table, units in ((into, coupling.incoming), (from_, coupling.outgoing)):
            table[coupling.parameter][coupling.region] = units
    for table in (into, from_):
        for units in table.values():
            for unit in units.unique().tolist():
                if unit != NO_UNIT and not active[unit]:
                    units[units == unit] = NO_UNIT
    return into, from_


class ExplicitPaths:
    """The map from path coordinates to weights, and the one back.

    Args:
        group: of the network.
        skeleton: its skeleton weights.
        weights: where the network is.
        beta: values of the paths out of the units there, relative to the start; by default they are at the start.
        free_start: the coordinates of free skeleton weights at the start.
    """

    def __init__(
        self,
        group: ScalingGroup,
        skeleton: Skeleton,
        weights: Tensors,
        beta: Tensor | None = None,
        free_start: float = 1.0,
    ) -> None:
        self.free_start = free_start
        self.units = [unit for unit in range(group.num_units) if skeleton.active[unit]]
        self.num_units = group.num_units
        self.into, self.from_ = ends(group, skeleton.active)
        self.fixed: dict[int, Place] = {}
        self.out: dict[int, Place] = {}
        for unit in self.units:
            self.fixed[unit] = place_of(group, int(skeleton.fixed_coupling[unit]), int(skeleton.fixed_index[unit]))
            self.out[unit] = place_of(group, int(skeleton.out_coupling[unit]), int(skeleton.out_index[unit]))
        self.free = [unit for unit in self.units if not self._leads_through_fixed(unit)]
        now = [1.0] * self.num_units if beta is None else beta[: self.num_units].tolist()
        self.start = {name: weight.clone() for name, weight in weights.items()}
        for unit in self.free:
            name, index = self.out[unit]
            target = int(self.into[name][index])
            self.start[name][index] *= (1.0 if target == NO_UNIT else now[target]) / now[unit]
        self.v = {name: weight.clone() for name, weight in weights.items()}
        for name, value in self.v.items():
            for unit in self.units:
                value[self.into[name] == unit] *= now[unit]
        for name, index in self.fixed.values():
            self.v[name][index] = 0.0
        for unit in self.free:
            name, index = self.out[unit]
            self.v[name][index] = free_start * now[unit]

    def _leads_through_fixed(self, unit: int) -> bool:
        name, index = self.out[unit]
        target = int(self.into[name][index])
        return target != NO_UNIT and self.fixed[target] == self.out[unit]

    def _beta(self, v: Tensors) -> list[Tensor]:
        """Values of the paths out of all units relative to the start, and 1 for outputs."""
        one = torch.ones((), dtype=torch.float64)
        beta = [one] * (self.num_units + 1)
        for unit in self.units:
            at = unit
            while self._leads_through_fixed(at):
                name, index = self.out[at]
                at = int(self.into[name][index])
            name, index = self.out[at]
            beta[unit] = v[name][index] / self.free_start
        return beta

    def weights(self, v: Tensors) -> dict[str, Tensor]:
        """The weights as a differentiable function of the path coordinates."""
        beta = self._beta(v)
        stacked = torch.stack(beta)
        result = {name: value / stacked[self.into[name]] for name, value in v.items()}
        for name, index in self.fixed.values():
            result[name][index] = self.start[name][index]
        for unit in self.free:
            name, index = self.out[unit]
            result[name][index] = self.start[name][index] * beta[unit] / beta[int(self.into[name][index])]
        return result

    def paths(self, weights: Tensors) -> dict[str, Tensor]:
        """The path coordinates as a differentiable function of all weights, the fixed skeleton weights among them."""
        one = torch.ones((), dtype=torch.float64)
        inward, outward = [one] * (self.num_units + 1), [one] * (self.num_units + 1)
        for unit in self.units:
            at = unit
            while at != NO_UNIT:
                name, index = self.fixed[at]
                inward[unit] = inward[unit] * (weights[name][index] / self.start[name][index])
                at = int(self.from_[name][index])
            at = unit
            while at != NO_UNIT:
                name, index = self.out[at]
                outward[unit] = outward[unit] * (weights[name][index] / self.start[name][index])
                at = int(self.into[name][index])
        a, b = torch.stack(inward), torch.stack(outward)
        result = {name: a[self.from_[name]] * weight * b[self.into[name]] for name, weight in weights.items()}
        for name, index in self.fixed.values():
            result[name][index] = 0.0
        for unit in self.free:
            name, index = self.out[unit]
            result[name][index] = self.free_start * a[unit] * b[unit]
        return result
