"""Path coordinates: inverse chain rule and weight allocation.

Every element that is not an incoming skeleton weight has one basis path: in along fixed skeleton weights, through the
element, out along outgoing skeleton weights. Divided by a constant, its value is the coordinate that is optimised.
With g = dL/dw, and beta_h the value of the path out of unit h relative to the start (1 for outputs):

    ordinary element e into unit h:   v_e = w_e beta_h            dL/dv_e = g_e / beta_h
    r_h = sum of w_e g_e over all elements into h but its fixed skeleton weight
    free skeleton weight f:           dL/dlog|v_f| = w_f g_f - sum of r_h over the h with root(h) = f
    fixed skeleton weights:           none

(The inverse chain rule of Meng et al., arXiv:1802.03713, for any network.) The coordinate of a free skeleton weight is
v_f = c beta_h, where h is the unit that it leaves and c its value at the start. When the optimizer has moved v,

    R_f = v_f' / v_f     R_h = R_root(h)     beta_h' = beta_h R_h
    ordinary: w_e' = v_e' / beta_h'          free f into unit j:  w_f' = w_f R_f / R_j

(weight allocation). Dictionaries of tensors have parameter names as keys; vectors over units have length H, and H + 1
where an entry for ground, index -1, is appended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.paths.skeleton import Skeleton
from lightning_ecopt.symmetry import Coupling, SegmentSum

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Elements:
    """One element of some parameter for each of some units.

    Args:
        places: for each parameter name the units ``int[k]`` and the index of their elements, one ``int[k]`` per axis.
    """

    places: Mapping[str, tuple[Tensor, tuple[Tensor, ...]]]

    @classmethod
    def locate(
        cls,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        chosen: Tensor,
        coupling: Tensor,
        index: Tensor,
    ) -> Elements:
        """Elements given for the units where ``chosen`` by number of coupling and flat index in its region."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for number in coupling[chosen].unique().tolist():
            units = torch.nonzero(chosen & (coupling == number)).reshape(-1)
            one = couplings[number]
            shape = parameters[one.parameter].shape or (1,)
            region = one.view(parameters[one.parameter]).shape
            inside = torch.unravel_index(index[units], region)
            axes = [part.start + position * part.step for part, position in zip(one.region, inside, strict=True)]
            flat = torch.zeros_like(units)
            for axis, size in zip(axes, shape, strict=True):
                flat = flat * size + axis
            found.setdefault(one.parameter, []).append((units, flat))
        places = {}
        for name, parts in found.items():
            device = parameters[name].device
            units, flat = (torch.cat(column) for column in zip(*parts, strict=True))
            at = torch.unravel_index(flat, parameters[name].shape) if parameters[name].ndim else ()
            places[name] = (units.to(device), tuple(axis.to(device) for axis in at))
        return cls(places)

    def read(self, tensors: Tensors, into: Tensor) -> Tensor:
        """The elements as a vector ``[H]`` of the type of ``into``; zero for units without one."""
        result = torch.zeros_like(into)
        for name, (units, at) in self.places.items():
            if name in tensors:
                result[units] = tensors[name][at].to(into.dtype).reshape(units.shape)
        return result

    def write_(self, tensors: Tensors, values: Tensor | float) -> None:
        """Overwrite the elements with the entries of a vector ``[H]``, or with a number."""
        for name, (units, at) in self.places.items():
            if name in tensors:
                tensor = tensors[name]
                if isinstance(values, Tensor):
                    tensor[at] = values[units].to(tensor.dtype).reshape(tensor[at].shape)
                else:
                    tensor[at] = values


@dataclass(frozen=True, eq=False)
class Allocation:
    """What weight allocation did.

    Args:
        ratio: R_h, ``[H + 1]``.
        guarded: whether the move of a free skeleton weight was limited, ``bool[H]``.
    """

    ratio: Tensor
    guarded: Tensor


class PathCoordinates:
    """The coordinates of one skeleton, from one refresh to the next.

    Args:
        couplings: of the scaling group.
        parameters: the parameters by name; all on one device.
        skeleton: chosen at the start.
        free_start: value c > 0 of the coordinates of free skeleton weights at the start.

    Attributes:
        beta: values of the paths out of the units relative to the start, ``[H + 1]``; the last is ground, always 1.
    """

    def __init__(
        self, couplings: Sequence[Coupling], parameters: Tensors, skeleton: Skeleton, free_start: float = 1.0
    ) -> None:
        device = next(iter(parameters.values())).device
        self.skeleton = skeleton
        self.free_start = free_start
        self.couplings = [coupling.restricted(skeleton.active).to(device) for coupling in couplings]
        self._scaled = [coupling for coupling in self.couplings if bool((coupling.incoming >= 0).any())]
        active, free = skeleton.active, skeleton.free
        self.fixed = Elements.locate(couplings, parameters, active, skeleton.fixed_coupling, skeleton.fixed_index)
        self.free = Elements.locate(couplings, parameters, free, skeleton.out_coupling, skeleton.out_index)
        self._is_free = free.to(device)
        self._root = skeleton.root.to(device)  # -1 leads to the entry of ground
        self._target = skeleton.target.to(device)
        dtype = torch.promote_types(
            torch.float32, max((p.dtype for p in parameters.values()), key=lambda kind: torch.finfo(kind).bits)
        )
        self.beta = torch.ones(skeleton.num_units + 1, dtype=dtype, device=device)
        num_units = skeleton.num_units
        ground = num_units  # a group of its own, dropped
        slots = [coupling.incoming.reshape(-1) for coupling in self._scaled]
        root = torch.cat([torch.where(self._root < 0, ground, self._root), self._root.new_full((1,), ground)])
        self._to_roots = SegmentSum(torch.cat([root[ids] for ids in slots] + [root[:-1]]), num_units + 1)

    @property
    def free_values(self) -> Tensor:
        """The coordinates v_f of the free skeleton weights, ``[H]``, at the units that they leave; others are 1."""
        return torch.where(self._is_free, self.free_start * self.beta[:-1], 1.0)

    def _incoming_flow(self, weights: Tensors, covectors: Tensors) -> Tensor:
        """For each free skeleton weight the sum of r_h over the h with root(h) = f, ``[H]``."""
        parts = []
        for coupling in self._scaled:
            covector = covectors.get(coupling.parameter)
            if covector is None:
                parts.append(self.beta.new_zeros(coupling.incoming.numel()))
                continue
            flow = coupling.view(weights[coupling.parameter]) * coupling.view(covector)
            parts.append(flow.sum_to_size(coupling.incoming.shape).reshape(-1).to(self.beta.dtype))
        held = self.beta[:-1]
        parts.append(-self.fixed.read(weights, held) * self.fixed.read(covectors, held))
        return self._to_roots(torch.cat(parts))[:-1]

    def log_gradient(self, weights: Tensors, gradients: Tensors) -> Tensor:
        """dL/dlog|v_f| for the free skeleton weights, ``[H]``; zero for other units."""
        units = self.beta[:-1]
        own = self.free.read(weights, units) * self.free.read(gradients, units)
        return torch.where(self._is_free, own - self._incoming_flow(weights, gradients), 0.0)

    def gradients(self, weights: Tensors, gradients: Tensors) -> dict[str, Tensor]:
        """Inverse chain rule: dL/dv as new tensors, for the parameters with a gradient whose dL/dv is another."""
        at_free = self.log_gradient(weights, gradients) / self.free_values
        touched = {coupling.parameter for coupling in self._scaled} | self.fixed.places.keys() | self.free.places.keys()
        result = {name: gradient.clone() for name, gradient in gradients.items() if name in touched}
        self.scale_(result, -1)
        self.fixed.write_(result, 0.0)
        self.free.write_(result, at_free)
        return result

    def scale_(self, tensors: Tensors, power: int) -> None:
        """Multiply every element into unit h by beta_h to the ``power``."""
        factors = self.beta if power == 1 else self.beta.reciprocal()
        for coupling in self._scaled:
            tensor = tensors.get(coupling.parameter)
            if tensor is not None:
                coupling.view(tensor).mul_(factors[coupling.incoming].to(tensor.dtype))

    def enter_(self, weights: Tensors) -> Callable[[float | None], Allocation]:
        """Turn the weights into path coordinates in place; fixed skeleton weights become zero: nothing moves them.

        Returns:
            The function that turns them back once they have moved, given the largest ratio by which a free skeleton
            weight may move in one step (``None`` for no limit): weight allocation.
        """
        units = self.beta[:-1]
        at_fixed, at_free = self.fixed.read(weights, units), self.free.read(weights, units)
        values = self.free_values
        self.scale_(weights, 1)
        self.fixed.write_(weights, 0.0)
        self.free.write_(weights, values)

        def leave_(max_ratio: float | None) -> Allocation:
            moved = torch.where(self._is_free, self.free.read(weights, units) / values, 1.0)
            allowed = moved if max_ratio is None else moved.clamp(1 / max_ratio, max_ratio)
            allowed = torch.where(moved.isfinite() & (allowed != 0), allowed, 1.0)
            # A weight that the optimizer has spoilt is spoilt, but no beta, and by it no other weight.
            moved_itself = torch.where(moved.isfinite(), allowed, moved)
            own = torch.cat([allowed, allowed.new_ones(1)])
            ratio = own[torch.cat([self._root, self._root.new_full((1,), -1)])]
            self.beta.mul_(ratio)
            self.scale_(weights, -1)
            self.fixed.write_(weights, at_fixed)
            self.free.write_(weights, at_free * moved_itself / ratio[self._target])
            return Allocation(ratio, self._is_free & (allowed != moved))

        return leave_

    def restart_skeleton_(self, tensors: Tensors) -> None:
        """Set the entries of skeleton weights to zero: what momentum knew of them is given up."""
        self.fixed.write_(tensors, 0.0)
        self.free.write_(tensors, 0.0)
