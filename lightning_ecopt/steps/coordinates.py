"""Path coordinates: inverse chain rule and weight allocation.

Each active unit h has a *fixed* skeleton weight, one element that leads into h and never moves, and an *outgoing* one,
through which its paths leave. The outgoing skeleton weight of h is *free* unless it is also the fixed one of the unit
into which it leads, the target of h. root(h) is the first unit on the way h, target of h, ... whose outgoing skeleton
weight is free.

Every element that is not a fixed skeleton weight has one basis path: in along fixed skeleton weights, through the
element, out along outgoing skeleton weights. Divided by a constant, its value is the coordinate that is optimised. With
g = dL/dw, and beta_h the value of the path out of unit h relative to the start (1 for outputs):

    ordinary element e into unit h:   v_e = w_e beta_h            dL/dv_e = g_e / beta_h
    r_h = sum of w_e g_e over all elements into h but its fixed skeleton weight
    free skeleton weight f of unit u: dL/dlog|v_f| = w_f g_f - sum of r_h over the h with root(h) = u
    fixed skeleton weights:           none

(The inverse chain rule of Meng et al., arXiv:1802.03713, for any network.) The coordinate of the free skeleton weight
of u is v_f = c beta_u, with c its value at the start. When the optimizer has moved v,

    R_u = v_f' / v_f at units with a free one     R_h = R_root(h)     beta_h' = beta_h R_h
    ordinary: w_e' = v_e' / beta_h'               free f into unit j: w_f' = w_f R_u / R_j

(weight allocation). Dictionaries of tensors have parameter names as keys. Vectors over units are ``[H]``, or
``[H + 1]`` where an entry is appended for what belongs to no unit: the index ``NO_UNIT``, which is -1, finds it.

Example, a network w_2 relu(w_1 x) of one hidden unit h: w_1 is its fixed skeleton weight, f = w_2 its free one, v_f the
only coordinate, and r_h = 0, because nothing else leads into h. A step that doubles v_f doubles beta_h and w_2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.tensors import Tensors, padded, updates_by_difference
from lightning_ecopt.kernels import EagerKernels, Elements, Kernels
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.skeleton import Skeleton, narrow
from lightning_ecopt.symmetry import Coupling
from lightning_ecopt.symmetry.coupling import NO_UNIT, sharing_memory


class SkeletonElements:
    """The skeleton weights of all units, as entries of the parameters.

    Args:
        couplings: of the scaling group.
        parameters: the parameters by name.
        skeleton: the chosen weights.
        dtype: of the vectors over units.
        kernels: read and write them.

    Attributes:
        num_units: number of units H.
        names: of the parameters that have skeleton weights.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        skeleton: Skeleton,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        self.num_units, self._dtype, self._kernels = skeleton.num_units, dtype, kernels
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        fixed = (skeleton.active, skeleton.fixed_coupling, skeleton.fixed_index)
        free = (skeleton.free, skeleton.out_coupling, skeleton.out_index)
        for first, (chosen, coupling, index) in ((0, fixed), (skeleton.num_units, free)):
            for number in coupling[chosen].unique().tolist():
                units = torch.nonzero(chosen & (coupling == number)).reshape(-1)
                place = _flat_index(couplings[number], parameters[couplings[number].parameter], index[units])
                found.setdefault(couplings[number].parameter, []).append((first + units, place))
        self.names = list(found)
        counts = [sum(len(slots) for slots, _ in parts) for parts in found.values()]
        pairs = [pair for parts in found.values() for pair in parts]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        device = next(iter(parameters.values())).device
        slots, at = narrow(torch.stack([torch.cat([none, *(pair[k] for pair in pairs)]) for k in (0, 1)])).to(device)
        self._elements = Elements(counts, at, slots, 2 * self.num_units)

    @property
    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter name the slots ``int[k]`` of the skeleton weights in it, and their flat indices ``int64[k]``.

        Slot ``u`` is the fixed skeleton weight of unit u, slot ``H + u`` its free one.
        """
        of = self._elements
        columns = (column.split(of.counts) for column in (of.slots, of.at.long()))
        return dict(zip(self.names, zip(*columns, strict=True), strict=True))

    def of_free(self, values: Mapping[str, Tensor]) -> Tensor:
        """A number for each parameter, for the units whose free skeleton weight is in it, ``[H]``; else zero."""
        of = self._elements
        found = torch.zeros(of.size, dtype=self._dtype, device=of.at.device)
        for name, slots in zip(self.names, of.slots.split(of.counts), strict=True):
            found[slots] = values[name].to(found.dtype)  # at the fixed ones, too: to choose would wait for the device
        return found[self.num_units :]

    def read(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The entries of ``tensors`` at the fixed and at the free skeleton weights, ``[H]`` each; zero for none."""
        found = self._kernels.gather([tensors.get(name) for name in self.names], self._elements, self._dtype)
        return found[: self.num_units], found[self.num_units :]

    def write_(self, tensors: Tensors, at_fixed: Tensor | None, at_free: Tensor | None) -> None:
        """Overwrite these entries with those of two vectors ``[H]``; ``None`` stands for zeros."""
        values = torch.zeros(self._elements.size, dtype=self._dtype, device=self._elements.at.device)
        for given, part in ((at_fixed, values[: self.num_units]), (at_free, values[self.num_units :])):
            if given is not None:
                part.copy_(given)
        self._kernels.scatter_([tensors.get(name) for name in self.names], self._elements, values)


def _flat_index(coupling: Coupling, parameter: Tensor, index: Tensor) -> Tensor:
    """Flat indices in a parameter of elements given by their flat indices in the region of a coupling."""
    inside = torch.unravel_index(index.long(), coupling.view(parameter).shape)
    flat = torch.zeros_like(index, dtype=torch.int64)
    for part, position, size in zip(coupling.region, inside, parameter.shape or (1,), strict=True):
        flat = flat * size + part.start + position * part.step
    return flat


@dataclass(frozen=True)
class FreeWeights:
    """The coordinates of the free skeleton weights. Entry h belongs to the free skeleton weight that leaves unit h.

    Args:
        values: v_f, ``[H]``; 1 where a unit has no free skeleton weight.
        gradient: dL/dv_f, ``[H]``; 0 where a unit has none.
        skeleton_weights: the weights at the fixed and at the free skeleton elements of each unit, ``[H]`` each.
    """

    values: Tensor
    gradient: Tensor
    skeleton_weights: tuple[Tensor, Tensor]


class PathCoordinates:
    """The coordinates of one skeleton, from one refresh to the next.

    Args:
        couplings: of the scaling group.
        parameters: the parameters by name; all on one device.
        skeleton: chosen at the start.
        free_start: value c > 0 of the coordinates of free skeleton weights at the start.
        kernels: make the passes over the elements.

    Attributes:
        beta: values of the paths out of the units relative to the start, ``[H + 1]``; the last one, of outputs and
            whatever else is held fixed, is always 1.
        rows: the elements by what they lead into.
        scaled: names of the parameters with elements that lead into units.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        skeleton: Skeleton,
        free_start: float = 1.0,
        kernels: Kernels | None = None,
    ) -> None:
        device = next(iter(parameters.values())).device
        self.skeleton = skeleton
        self.free_start = free_start
        self.kernels = kernels or EagerKernels()
        self._is_free = skeleton.free.to(device)
        self._root = skeleton.root.to(device)
        self._target = skeleton.target.to(device)
        restricted = sharing_memory(coupling.restricted(skeleton.active) for coupling in couplings)
        self.rows = Rows(restricted, parameters)
        self._units = self.rows.units() % (skeleton.num_units + 1)  # H for rows that lead into no unit
        self.beta = torch.ones(skeleton.num_units + 1, dtype=self.rows.dtype, device=device)
        self.elements = SkeletonElements(couplings, parameters, skeleton, self.rows.dtype, self.kernels)
        into_units = {c.parameter for c in restricted if bool((c.incoming != NO_UNIT).any())}
        self.scaled = into_units.intersection(self.rows.names)
        slots = torch.cat([padded(self._root, NO_UNIT)[self._units], self._root])
        # NO_UNIT becomes H, past the last unit, which SegmentSum leaves out.
        self._to_roots = SegmentSum(slots % len(self.beta), skeleton.num_units)

    @property
    def free_values(self) -> Tensor:
        """The coordinates v_f of the free skeleton weights, ``[H]``, at the units that they leave; others are 1."""
        return torch.where(self._is_free, self.free_start * self.beta[:-1], 1.0)

    @property
    def weight_scale(self) -> Tensor:
        """By what weights are divided to be coordinates, for each row ``[R]``."""
        return self.beta.index_select(0, self._units).reciprocal_()

    def free_weights(self, weights: Tensors, gradients: Tensors) -> FreeWeights:
        """The free skeleton weights with their path gradients.

        dL/dlog|v_f| is taken first; it is zero for other units.
        """
        skeleton_weights = self.elements.read(weights)
        skeleton_gradients = self.elements.read(gradients)
        fixed, free = (w * g for w, g in zip(skeleton_weights, skeleton_gradients, strict=True))
        (w_times_g,) = self.rows.reduced(self.kernels, "products", weights, gradients)  # [R]
        r = self._to_roots(torch.cat([w_times_g, -fixed]))  # [H], sums of r_h over root(h) = f
        values = self.free_values
        return FreeWeights(values, torch.where(self._is_free, free - r, 0.0) / values, skeleton_weights)

    def transform_gradients_(self, gradients: Tensors, free: FreeWeights) -> Callable[[], None]:
        """Inverse chain rule: turn dL/dw into dL/dv in place; returns the way back."""
        before, beta = self.elements.read(gradients), self.beta.clone()
        with ExitStack() as failed:
            failed.callback(self.elements.write_, gradients, *before)
            self.multiply_by_beta_(gradients, -1)
            failed.callback(self._multiply_, gradients, beta)
            self.elements.write_(gradients, None, free.gradient)
            way_back = failed.pop_all()
        return way_back.close

    def multiply_by_beta_(self, tensors: Tensors, power: int) -> None:
        """Multiply every element into unit h by beta_h to the ``power``."""
        self._multiply_(tensors, self.beta**power)

    def _multiply_(self, tensors: Tensors, factors: Tensor) -> None:
        own = {name: tensor for name, tensor in tensors.items() if name in self.scaled}
        self.rows.apply_(self.kernels, "affine_", own, times=factors.index_select(0, self._units))

    def to_coordinates_(self, weights: Tensors) -> Callable[[float | None], Tensor]:
        """Turn the weights into path coordinates in place.

        Fixed skeleton weights become zero, so that no optimizer moves them.

        Returns:
            The function that turns them back once they have moved, given the largest ratio by which a free skeleton
            weight may move in one step (``None`` for no limit): weight allocation. It returns the units at whose free
            skeleton weight that limit was met, ``bool[H]``.
        """
        skeleton_weights = self.elements.read(weights)
        touched = self.scaled.union(self.elements.names)
        kept = {name: weights[name].clone() for name in touched if updates_by_difference(weights[name])}
        with ExitStack() as failed:
            for name, value in kept.items():
                failed.callback(weights[name].copy_, value)
            failed.callback(self.elements.write_, weights, *skeleton_weights)
            self.multiply_by_beta_(weights, 1)
            failed.callback(self.multiply_by_beta_, weights, -1)
            self.elements.write_(weights, None, self.free_values)
            values = torch.where(self._is_free, self.elements.read(weights)[1], 1.0)
            failed.pop_all()

        def allocate_(max_ratio: float | None) -> Tensor:
            before = {name: weight.clone() for name, weight in kept.items()}
            self.multiply_by_beta_(before, 1)
            moved = self.elements.read(weights)[1]
            ratio, write_skeleton_, guarded = self.allocate(values, moved, max_ratio, skeleton_weights)
            for name, value in before.items():
                weights[name].sub_(value)
            self.multiply_by_beta_(weights, -1)
            self._multiply_(kept, 1 / ratio)
            for name, value in kept.items():
                weights[name].add_(value)
            write_skeleton_(weights)
            return guarded

        return allocate_

    def allocate(
        self, values: Tensor, moved: Tensor, max_ratio: float | None, skeleton_weights: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Callable[[Tensors], None], Tensor]:
        """Take over moved coordinates of the free skeleton weights.

        Args:
            values: what they were, ``[H]``.
            moved: what they are, ``[H]``.
            max_ratio: as for the result of :meth:`to_coordinates_`.
            skeleton_weights: the weights at the fixed and the free elements, ``[H]`` each.

        Returns:
            By what beta was multiplied, ``[H + 1]``; the function that writes the skeleton weights once the others have
            been allocated; and where ``max_ratio`` was met, ``bool[H]``.
        """
        moved = torch.where(self._is_free, moved / values, 1.0)
        allowed = moved if max_ratio is None else moved.clamp(1 / max_ratio, max_ratio)
        allowed = torch.where(moved.isfinite() & (allowed != 0), allowed, 1.0)
        # A weight that the optimizer has spoilt is spoilt, but no beta, and by it no other weight.
        moved_itself = torch.where(moved.isfinite(), allowed, moved)
        ratio = padded(padded(allowed, 1)[self._root], 1)  # [H + 1], R_h = R_root(h)
        self.beta.mul_(ratio)
        at_fixed, at_free = skeleton_weights

        def write_skeleton_(weights: Tensors) -> None:
            self.elements.write_(weights, at_fixed, at_free * moved_itself / ratio[self._target])

        return ratio, write_skeleton_, self._is_free & (allowed != moved)

    def restart_skeleton_(self, tensors: Tensors) -> None:
        """Set the entries of skeleton weights to zero: what momentum knew of them is given up."""
        self.elements.write_(tensors, None, None)
