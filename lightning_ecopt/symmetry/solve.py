"""From the equations of a traced call to the units: the scales that remain free."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_ecopt.symmetry.labels import GROUND, ZERO, IntArray
from lightning_ecopt.symmetry.tracer import Operation, Tracer

NO_UNIT = -1


@dataclass(frozen=True, eq=False)
class SolvedUse:
    """A :class:`~lightning_ecopt.symmetry.tracer.Use` with unit numbers, ``NO_UNIT`` where the scale is ground."""

    parameter: str
    region: tuple[slice, ...]
    incoming: IntArray
    outgoing: IntArray
    additive: bool


@dataclass(frozen=True, eq=False)
class Solution:
    """Units 0 to ``num_units - 1``, numbered in the order in which the parameters first meet them.

    ``costs`` counts, for every operation that grounded something, the freedoms that were lost to it (operations that
    come first are charged first).
    """

    num_units: int
    uses: list[SolvedUse]
    costs: Counter[Operation]


def solve(tracer: Tracer) -> Solution:
    """Solve the equations ``a = b`` and ``a = 0`` by connected components."""
    pairs = np.concatenate(tracer.equalities) if tracer.equalities else np.empty((0, 2), np.int64)
    size = tracer.num_scales
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, component = connected_components(graph, directed=False)

    ground = np.zeros(size, dtype=bool)  # by component
    ground[component[GROUND]] = True
    costs: Counter[Operation] = Counter()
    for operation, ids in tracer.groundings:
        lost = np.unique(component[ids[ids > GROUND]])
        lost = lost[~ground[lost]]
        ground[lost] = True
        if len(lost):
            costs[operation] += len(lost)

    number = np.full(size, NO_UNIT, dtype=np.int64)  # by component
    count = 0
    uses = []
    for name in tracer.shapes:
        for use in tracer.uses.get(name, []):
            labels = []
            for ids in (use.incoming, use.outgoing):
                members = component[np.where(ids == ZERO, GROUND, ids)]
                met, first = np.unique(members, return_index=True)
                met = met[np.argsort(first)]
                new = met[~ground[met] & (number[met] == NO_UNIT)]
                number[new] = np.arange(count, count + len(new))
                count += len(new)
                labels.append(number[members])
            uses.append(SolvedUse(name, use.region, labels[0], labels[1], use.additive))
    return Solution(count, uses, costs)
