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
``[H + 1]`` where an entry is appended for what belongs to no unit, whose number is H.

Example, a network w_2 relu(w_1 x) of one hidden unit h: w_1 is its fixed skeleton weight, f = w_2 its free one, v_f the
only coordinate, and r_h = 0, because nothing else leads into h. A step that doubles v_f doubles beta_h and w_2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.common.parts import lengths
from lightning_ecopt.common.tensors import Tensors, to_device, updates_by_difference
from lightning_ecopt.kernels import EagerKernels, Elements, Kernels
from lightning_ecopt.kernels.allocation import Allocated, Paths
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
        order: names of all parameters that have rows.
        dtype: of the vectors over units.
        kernels: read and write them.

    Attributes:
        names: of the parameters that have skeleton weights.
        elements: the same in each parameter of ``order``. Slot ``u`` of a vector ``[2H]`` is the fixed skeleton weight
            of unit u, slot ``H + u`` its free one.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        skeleton: Skeleton,
        order: Sequence[str],
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        self._order, self._dtype, self._kernels = list(order), dtype, kernels
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._order}
        fixed = (skeleton.active, skeleton.fixed_coupling, skeleton.fixed_index)
        free = (skeleton.free, skeleton.out_coupling, skeleton.out_index)
        for first, (chosen, coupling, index) in ((0, fixed), (skeleton.num_units, free)):
            for number in coupling[chosen].unique().tolist():
                units = torch.nonzero(chosen & (coupling == number)).reshape(-1)
                place = _flat_index(couplings[number], parameters[couplings[number].parameter], index[units])
                found[couplings[number].parameter].append((first + units, place))
        self.names = [name for name, parts in found.items() if parts]
        counts = [sum(len(slots) for slots, _ in parts) for parts in found.values()]
        pairs = [pair for parts in found.values() for pair in parts]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        device = next(iter(parameters.values())).device
        slots, at = narrow(torch.stack([torch.cat([none, *(pair[k] for pair in pairs)]) for k in (0, 1)])).to(device)
        self.elements = Elements(counts, at, slots, 2 * skeleton.num_units)

    @property
    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter name the slots ``int[k]`` of the skeleton weights in it, and their flat indices ``int64[k]``."""
        of = self.elements
        columns = (column.split(of.counts) for column in (of.slots, of.at.long()))
        return dict(zip(self._order, zip(*columns, strict=True), strict=True))

    def of_free(self, values: Tensor) -> Tensor:
        """What each parameter of ``order`` has, ``[N]``, for units whose free skeleton weight is in it; else zero."""
        of = self.elements
        counts = to_device(torch.tensor(of.counts, device="cpu"), values.device)
        found = torch.zeros(of.size, dtype=self._dtype, device=values.device)
        # At the fixed ones, too: to choose would wait for the device.
        found[of.slots] = values.to(found.dtype).repeat_interleave(counts, output_size=len(of.slots))
        return found.chunk(2)[1]

    def read(self, tensors: Tensors) -> Tensor:
        """The entries of ``tensors`` at the skeleton weights, ``[2H]``; zero for none."""
        return self._kernels.gather([tensors.get(name) for name in self._order], self.elements, self._dtype)

    def write_(self, tensors: Tensors, values: Tensor) -> None:
        """Overwrite these entries with those of a vector, ``[2H]``."""
        self._kernels.scatter_([tensors.get(name) for name in self._order], self.elements, values)

    def write_free_(self, tensors: Tensors, values: Tensor) -> None:
        """Overwrite those at free skeleton weights with those of a vector, ``[H]``, and the others with zeros."""
        self.write_(tensors, torch.cat([torch.zeros_like(values), values]))


def _flat_index(coupling: Coupling, parameter: Tensor, index: Tensor) -> Tensor:
    """Flat indices in a parameter of elements given by their flat indices in the region of a coupling."""
    if lengths(coupling.region) == (parameter.shape or (1,)):
        return index.long()
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
        skeleton_weights: the weights at the skeleton elements, ``[2H]``.
    """

    values: Tensor
    gradient: Tensor
    skeleton_weights: Tensor


class PathCoordinates:
    """The coordinates of one skeleton, from one refresh to the next.

    Args:
        couplings: of the scaling group.
        parameters: the parameters by name; all on one device.
        skeleton: chosen at the start.
        free_start: value c > 0 of the coordinates of free skeleton weights at the start.
        kernels: make the passes over the elements.
        before: the coordinates of the last skeleton for the same parameters, whose rows are taken over if they are the
            same.

    Attributes:
        paths: of the skeleton, with beta, the values of the paths out of the units relative to the start, ``[H + 1]``;
            the last one, of outputs and whatever else is held fixed, is always 1.
        rows: the elements by what they lead into.
        scaled: names of the parameters with elements that lead into units.
    """

    rows: Rows
    scaled: set[str]
    paths: Paths

    def __init__(
        self,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        skeleton: Skeleton,
        free_start: float = 1.0,
        kernels: Kernels | None = None,
        before: PathCoordinates | None = None,
    ) -> None:
        device = next(iter(parameters.values())).device
        self.skeleton, self._couplings = skeleton, couplings
        self.kernels = kernels or EagerKernels()
        if before is not None and before._has_rows_of(couplings, parameters, skeleton):
            self.rows, self.scaled, unit_of_row = before.rows, before.scaled, before.paths.unit_of_row
        else:
            restricted = sharing_memory(coupling.restricted(skeleton.active) for coupling in couplings)
            self.rows = Rows(restricted, parameters)
            into_units = {c.parameter for c in restricted if bool((c.incoming != NO_UNIT).any())}
            self.scaled = into_units.intersection(self.rows.names)
            unit_of_row = self._numbers(self.rows.units())
        root, target = map(self._numbers, (skeleton.root, skeleton.target))
        beta = torch.ones(skeleton.num_units + 1, dtype=self.rows.dtype, device=device)
        self.paths = Paths(unit_of_row, root, target, skeleton.free.to(device), free_start, beta)
        if device.type != "cpu":
            _ = self.paths.to_roots  # made here, so that no step waits for the device
        self.elements = SkeletonElements(
            couplings, parameters, skeleton, self.rows.names, self.rows.dtype, self.kernels
        )

    def _has_rows_of(self, couplings: Sequence[Coupling], parameters: Tensors, skeleton: Skeleton) -> bool:
        """Whether these rows are those that another skeleton would have."""
        is_same = self._couplings is couplings and torch.equal(self.skeleton.active, skeleton.active)
        return is_same and self.rows.fit(parameters)

    def _numbers(self, units: Tensor) -> Tensor:
        """Numbers of units as :class:`Paths` has them, perhaps ``units`` itself: ``NO_UNIT``, -1, becomes H."""
        numbers = units % (self.skeleton.num_units + 1) if bool((units == NO_UNIT).any()) else units
        return numbers.to(self.rows.device, torch.int32)

    def free_weights(self, weights: Tensors, gradients: Tensors) -> FreeWeights:
        """The free skeleton weights with their path gradients."""
        at_weights, at_gradients = self.elements.read(weights), self.elements.read(gradients)
        (sums,) = self.rows.reduced(self.kernels, "products", weights, gradients)
        gradient = self.kernels.free_gradient(self.paths, sums, at_weights, at_gradients)
        return FreeWeights(self.paths.free_values, gradient, at_weights)

    def transform_gradients_(self, gradients: Tensors, free: FreeWeights) -> Callable[[], None]:
        """Inverse chain rule: turn dL/dw into dL/dv in place; returns the way back."""
        before, beta = self.elements.read(gradients), self.paths.beta.clone()
        with ExitStack() as failed:
            failed.callback(self.elements.write_, gradients, before)
            self.multiply_by_beta_(gradients, -1)
            failed.callback(self._multiply_, gradients, beta)
            self.elements.write_free_(gradients, free.gradient)
            way_back = failed.pop_all()
        return way_back.close

    def multiply_by_beta_(self, tensors: Tensors, power: int) -> None:
        """Multiply every element into unit h by beta_h to the ``power``."""
        self._multiply_(tensors, self.paths.beta**power)

    def _multiply_(self, tensors: Tensors, factors: Tensor) -> None:
        own = {name: tensor for name, tensor in tensors.items() if name in self.scaled}
        self.rows.apply_(self.kernels, "affine_", own, times=factors.index_select(0, self.paths.unit_of_row))

    def to_coordinates_(self, weights: Tensors) -> Callable[[float | None], Allocated]:
        """Turn the weights into path coordinates in place.

        Fixed skeleton weights become zero, so that no optimizer moves them.

        Returns:
            The function that turns them back once they have moved, given the largest ratio by which a free skeleton
            weight may move in one step (``None`` for no limit): weight allocation.
        """
        skeleton_weights = self.elements.read(weights)
        touched = self.scaled.union(self.elements.names)
        kept = {name: weights[name].clone() for name in touched if updates_by_difference(weights[name])}
        with ExitStack() as failed:
            for name, value in kept.items():
                failed.callback(weights[name].copy_, value)
            failed.callback(self.elements.write_, weights, skeleton_weights)
            self.multiply_by_beta_(weights, 1)
            failed.callback(self.multiply_by_beta_, weights, -1)
            self.elements.write_free_(weights, self.paths.free_values)
            values = self.elements.read(weights).chunk(2)[1]  # as 16 bits round them
            failed.pop_all()

        def allocate_(max_ratio: float | None) -> Allocated:
            before = {name: weight.clone() for name, weight in kept.items()}
            self.multiply_by_beta_(before, 1)
            factor = self.elements.read(weights).chunk(2)[1] / values
            allocated = self.kernels.allocate_(self.paths, factor, skeleton_weights, max_ratio)
            for name, value in before.items():
                weights[name].sub_(value)
            self.multiply_by_beta_(weights, -1)
            self._multiply_(kept, 1 / allocated.ratio)
            for name, value in kept.items():
                weights[name].add_(value)
            self.elements.write_(weights, allocated.skeleton)
            return allocated

        return allocate_

    def restart_skeleton_(self, tensors: Tensors) -> None:
        """Set the entries of skeleton weights to zero: what momentum knew of them is given up."""
        self.elements.write_(tensors, self.elements.read({}))  # all zeros
