"""The units of a network layer by layer: the map that :meth:`ScalingGroup.plot` draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.symmetry.coupling import NO_UNIT, Coupling
from lightning_ecopt.symmetry.describe import UnitSet
from lightning_ecopt.symmetry.scales import Operation

#: For each parameter how many of the values that it leads into each operation holds fixed.
Held = Mapping[str, Mapping[Operation, int]]


@dataclass(frozen=True)
class Layer:
    """One row of the map.

    Args:
        name: of the module that has the parameters, or of a parameter that belongs to no submodule.
        free: how many scales there are of the values that it leads into.
        held: how many such values each operation holds fixed. Nothing, if they were fixed before any operation met
            them, as where a layer is added to a stream that is.
        is_used: whether a traced call has used the layer.
    """

    name: str
    free: int
    held: Mapping[Operation, int]
    is_used: bool = True


@dataclass(frozen=True)
class Line:
    """One line of the map, for units that scale the same parameters.

    Args:
        size: how many units there are.
        lane: where the line is drawn; two lines in one lane have no row in common.
        into: rows of the layers that c multiplies.
        out_of: rows of the layers that 1/c multiplies.
    """

    size: int
    lane: int
    into: frozenset[int]
    out_of: frozenset[int]

    @property
    def rows(self) -> range:
        """From its first row to its last."""
        met = self.into | self.out_of
        return range(min(met), max(met) + 1)


def layer_of(parameter: str) -> str:
    """The layer of a parameter: ``blocks.0.conv`` of ``blocks.0.conv.weight``; ``scale`` of ``scale``."""
    return parameter.rpartition(".")[0] or parameter


def layers_of(parameters: Mapping[str, Tensor], couplings: Iterable[Coupling], held: Held) -> list[Layer]:
    """Sort the parameters into layers, in the order of the module."""
    into: dict[str, list[Tensor]] = {layer_of(name): [] for name in parameters}
    for coupling in couplings:
        into[layer_of(coupling.parameter)].append(coupling.incoming.reshape(-1).cpu())
    held_in: dict[str, Counter[Operation]] = {layer: Counter() for layer in into}
    for name, by in held.items():
        held_in[layer_of(name)] |= Counter(by)  # a weight and its bias lead into the same values
    free = {layer: int((torch.cat(scales).unique() != NO_UNIT).sum()) for layer, scales in into.items() if scales}
    return [Layer(layer, free.get(layer, 0), held_in[layer], layer in free) for layer in into]


def lines_of(sets: Iterable[UnitSet], layers: Sequence[Layer]) -> list[Line]:
    """Draw a line for each set of units, the long ones in the first lanes."""
    row = {layer.name: number for number, layer in enumerate(layers)}
    found: list[tuple[int, frozenset[int], frozenset[int]]] = []
    for each in sets:
        sides = [frozenset(row[layer_of(name)] for name, power in each.powers if power * sign > 0) for sign in (1, -1)]
        # c and 1/c are the same unit, and equations that tie units together may turn one round.
        if all(layers[number].free for number in sides[1]) and not all(layers[number].free for number in sides[0]):
            sides.reverse()
        if sides[0] or sides[1]:
            found.append((len(each.units), sides[0], sides[1]))
    lanes: list[list[range]] = []
    lines = []
    for size, into, out_of in sorted(found, key=lambda one: (min(one[1] | one[2]), -max(one[1] | one[2]))):
        rows = Line(size, 0, into, out_of).rows
        lane = next((k for k, taken in enumerate(lanes) if not any(_meet(rows, other) for other in taken)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append(rows)
        lines.append(Line(size, lane, into, out_of))
    return lines


def _meet(first: range, second: range) -> bool:
    """Whether two ranges of rows have one in common."""
    return first.start < second.stop and second.start < first.stop


def held_also(
    held: Held, couplings: Iterable[Coupling], number: Tensor, why: Operation
) -> dict[str, Counter[Operation]]:
    """What is held fixed once some scales are, too.

    Args:
        held: what was held before.
        couplings: in which the scales are free.
        number: the new number of each scale, ``NO_UNIT`` if it is held, ``int[S + 1]``.
        why: who holds them.
    """
    lost: dict[str, set[int]] = {}
    for coupling in couplings:
        incoming = coupling.incoming.cpu()
        is_lost = (incoming != NO_UNIT) & (number[incoming] == NO_UNIT)
        lost.setdefault(coupling.parameter, set()).update(incoming[is_lost].tolist())
    more = {name: Counter(by) for name, by in held.items()}
    for name, found in lost.items():
        if found:
            more.setdefault(name, Counter())[why] += len(found)
    return more
