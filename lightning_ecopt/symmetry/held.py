"""Units that are held fixed from some step on, although the traced calls leave them free.

A trace knows the loss of one call. When something shows later that a unit may not be rescaled, it leaves the group.
What is kept is not the number of the unit, which means nothing in another group, but one *mark* for each: an element of
a parameter, and the side on which the unit scales it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.symmetry.coupling import NO_UNIT, Coupling
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.scales import Operation

#: Name of a parameter, index of an element, and whether the unit multiplies it (``True``) or divides it.
Mark = tuple[str, tuple[int, ...], bool]


class HeldUnits:
    """The units of a network that are held fixed, whichever of its parameters are trained.

    Example::

        held = HeldUnits()
        held.add(group, units, Operation("the gradient", ""))
        group = held.applied(group)
    """

    def __init__(self) -> None:
        self._marks: dict[Mark, Operation] = {}

    def __bool__(self) -> bool:
        return bool(self._marks)

    def add(self, group: ScalingGroup, units: Tensor, why: Operation) -> None:
        """Hold units fixed from now on.

        Args:
            group: which the numbers of the units belong to.
            units: ``bool[H]``, those to be held.
            why: for the report.
        """
        self._marks |= dict.fromkeys(marks_of(group, units), why)

    def applied(self, group: ScalingGroup) -> ScalingGroup:
        """The group of all other units; the same object if that is all of them."""
        for why in dict.fromkeys(self._marks.values()):
            held = units_at(group, [mark for mark, reason in self._marks.items() if reason == why])
            if bool(held.any()):
                group = group.without(held, why)
        return group

    def saved(self) -> list[tuple[Any, ...]]:
        """What a checkpoint needs."""
        return [(*mark, why.name, why.module) for mark, why in self._marks.items()]

    def load(self, state: Iterable[tuple[Any, ...]]) -> None:
        """Hold what :meth:`saved` returned, and nothing else.

        Raises:
            ValueError: if it is damaged.
        """
        try:
            self._marks = {
                (str(name), tuple(map(int, element)), bool(incoming)): Operation(str(why), str(module))
                for name, element, incoming, why, module in state
            }
        except TypeError as error:
            raise ValueError(f"what is said of units that are held fixed cannot be read: {error}") from None


def marks_of(group: ScalingGroup, units: Tensor) -> list[Mark]:
    """One mark for each of the marked units (``bool[H]``), at an element that it scales by itself if there is one."""
    monomials = group.monomials
    chosen = units.cpu().nonzero().flatten().tolist()
    scales = {unit: [unit, *monomials.products[monomials.units == unit].tolist()] for unit in chosen}
    places: dict[int, Mark] = {}
    missing = {scale for own in scales.values() for scale in own}
    for coupling in group.couplings:
        for side, incoming in ((coupling.incoming, True), (coupling.outgoing, False)):
            numbers = side.reshape(-1).cpu()
            for scale in missing & set(numbers.unique().tolist()):
                index = int((numbers == scale).nonzero()[0])
                places[scale] = coupling.parameter, _element(coupling, side, index), incoming
                missing.discard(scale)
    return [found[0] for own in scales.values() if (found := [places[scale] for scale in own if scale in places])]


def _element(coupling: Coupling, side: Tensor, index: int) -> tuple[int, ...]:
    """The index in the parameter of an entry of a side, the first along axes on which the side does not change."""
    along = torch.unravel_index(torch.tensor(index, device="cpu"), side.shape)
    axes = [int(at) for at in along]
    first = [0] * (len(coupling.region) - len(axes))
    return tuple(
        range(part.start, part.stop, part.step)[at] for part, at in zip(coupling.region, first + axes, strict=True)
    )


def units_at(group: ScalingGroup, marks: Iterable[Mark]) -> Tensor:
    """The units that the scales at these marks depend on, ``bool[H]``; parameters that the group lacks have none."""
    scales = torch.zeros(group.monomials.num_scales + 1, dtype=torch.bool, device="cpu")  # the last for NO_UNIT
    by_name: dict[str, list[Coupling]] = {}
    for coupling in group.couplings:
        by_name.setdefault(coupling.parameter, []).append(coupling)
    for name, element, incoming in marks:
        for coupling in by_name.get(name, ()):
            parts = [range(part.start, part.stop, part.step) for part in coupling.region]
            if len(parts) != len(element) or not all(at in part for at, part in zip(element, parts, strict=True)):
                continue
            side = coupling.incoming if incoming else coupling.outgoing
            at = [part.index(place) for place, part in zip(element, parts, strict=True)][len(parts) - side.ndim :]
            scales[side[tuple(min(place, size - 1) for place, size in zip(at, side.shape, strict=True))]] = True
    return group.monomials.in_(scales[:-1])


def units_of(group: ScalingGroup, parameters: Collection[int]) -> Tensor:
    """The units that scale any element of some parameters, given by their ``id``; ``bool[H]``."""
    scales = torch.zeros(group.monomials.num_scales, dtype=torch.bool, device="cpu")
    for coupling in group.couplings:
        if id(group.parameters[coupling.parameter]) in parameters:
            for side in (coupling.incoming, coupling.outgoing):
                scales[side[side != NO_UNIT]] = True
    return group.monomials.in_(scales)
