"""From the equations of a traced call to the units: the scales that remain free.

Nearly all equations are ``a = b`` or ``a = 0`` (in logarithms): connected components. What is left, the products, is
solved by elimination, exactly: first the scales that one equation alone mentions, many at a time, then row by row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_ecopt.symmetry.labels import GROUND, ZERO, IntArray
from lightning_ecopt.symmetry.tracer import Operation, Tracer, Use

NO_UNIT = -1


@dataclass(frozen=True, eq=False)
class SolvedUse:
    """A :class:`~lightning_ecopt.symmetry.tracer.Use` with the scales numbered anew, ``NO_UNIT`` for ground."""

    parameter: str
    region: tuple[slice, ...]
    incoming: IntArray
    outgoing: IntArray
    additive: bool


@dataclass(frozen=True, eq=False)
class Solution:
    """Units 0 to ``num_units - 1``, numbered in the order in which the parameters first meet them.

    The scales with these numbers are the units themselves; further ones, to ``num_scales - 1``, are products of powers
    of units: scale ``scales[t]`` has ``units[t]`` with the exponent ``exponents[t]``. ``costs`` counts, for every
    operation that grounded something, the freedoms that were lost to it (operations that come first are charged first).
    """

    num_units: int
    num_scales: int
    scales: IntArray
    units: IntArray
    exponents: np.ndarray
    uses: list[SolvedUse]
    costs: Counter[Operation]


def solve(tracer: Tracer) -> Solution:
    """Solve the equations of a traced call."""
    pairs = np.concatenate(tracer.equalities) if tracer.equalities else np.empty((0, 2), np.int64)
    component = _components(pairs, tracer.num_scales)
    ground = np.zeros(tracer.num_scales, dtype=bool)  # by component
    ground[component[GROUND]] = True
    costs: Counter[Operation] = Counter()
    for operation, ids in tracer.groundings:
        lost = np.unique(component[ids[ids > GROUND]])
        lost = lost[~ground[lost]]
        ground[lost] = True
        if len(lost):
            costs[operation] += len(lost)
    rows, component, ground = _simplify(_Rows.of(tracer), component, ground)

    names = [
        (name, use) for name in tracer.shapes for use in _completed(tracer.uses.get(name, []), tracer.shapes[name])
    ]
    labels = [component[np.where(ids == ZERO, GROUND, ids)] for _, use in names for ids in (use.incoming, use.outgoing)]
    met = np.zeros(tracer.num_scales, dtype=bool)  # by component
    for members in labels:
        met[members] = True
    met &= ~ground
    powers = _eliminate(rows, met)

    order = _in_order(labels, met)
    units = [scale for scale in order if scale not in powers]
    products = [scale for scale in order if scale in powers]
    number = np.full(tracer.num_scales, NO_UNIT, dtype=np.int64)  # by component
    number[units + products] = np.arange(len(order))
    terms = [(number[item], number[unit], float(power)) for item in products for unit, power in powers[item].items()]
    uses = [
        SolvedUse(name, use.region, _shortened(number[incoming]), _shortened(number[outgoing]), use.additive)
        for (name, use), incoming, outgoing in zip(names, labels[::2], labels[1::2], strict=True)
    ]
    scales, of, exponents = zip(*terms, strict=True) if terms else ((), (), ())
    return Solution(
        len(units),
        len(units) + len(products),
        np.array(scales, np.int64),
        np.array(of, np.int64),
        np.array(exponents, np.float64),
        uses,
        costs,
    )


def _completed(uses: list[Use], shape: tuple[int, ...]) -> list[Use]:
    """Let the rest of a parameter of one use go along, on axes on which its scales do not change.

    So that it fits a longer input, of which the example needs the first positions only.
    """
    if len(uses) != 1:
        return uses
    (use,) = uses
    alike = [use.incoming.shape[axis] == use.outgoing.shape[axis] == 1 for axis in range(len(shape))]
    region = tuple(slice(0, size, 1) if same else own for size, same, own in zip(shape, alike, use.region, strict=True))
    return [replace(use, region=region)]


def _shortened(numbers: IntArray) -> IntArray:
    """A matrix of scales none of which is free need not be written out; one row for each element of the first axis."""
    if sum(size > 1 for size in numbers.shape) > 1 and (numbers == NO_UNIT).all():
        first = [slice(None)] + [slice(1)] * (numbers.ndim - 1)
        return numbers[tuple(first)]
    return numbers


def _components(pairs: IntArray, size: int) -> IntArray:
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _in_order(labels: Sequence[IntArray], met: np.ndarray) -> list[int]:
    """The components that are met, in the order in which they are."""
    seen = np.zeros_like(met)
    order = []
    for members in labels:
        found, first = np.unique(members, return_index=True)
        found = found[np.argsort(first)]
        found = found[met[found] & ~seen[found]]
        seen[found] = True
        order += found.tolist()
    return order


@dataclass(frozen=True, eq=False)
class _Rows:
    """Sparse equations: ``sum of coefficient * log(scale) = 0`` over the entries of one row."""

    row: IntArray
    scale: IntArray
    coefficient: IntArray
    count: int

    @classmethod
    def of(cls, tracer: Tracer) -> _Rows:
        rows, scales, coefficients, count = [], [], [], 0
        for relation in tracer.relations:
            size, width = relation.scales.shape
            rows.append(np.repeat(np.arange(count, count + size), width))
            scales.append(relation.scales.ravel())
            coefficients.append(np.tile(np.array(relation.coefficients, np.int64), size))
            count += size
        none = np.empty(0, np.int64)
        return cls(
            np.concatenate(rows or [none]),
            np.concatenate(scales or [none]),
            np.concatenate(coefficients or [none]),
            count,
        )

    def merged(self, component: IntArray, ground: np.ndarray) -> _Rows:
        """The same with components for scales: ground left out, equal ones added up, rows numbered anew."""
        scale = component[self.scale]
        kept = ~ground[scale]
        keys, place = np.unique(np.stack([self.row[kept], scale[kept]], 1), axis=0, return_inverse=True)
        coefficient = np.zeros(len(keys), np.int64)
        np.add.at(coefficient, place.reshape(-1), self.coefficient[kept])
        keys, coefficient = keys[coefficient != 0], coefficient[coefficient != 0]
        _, row = np.unique(keys[:, 0], return_inverse=True)
        return _Rows(row.reshape(-1), keys[:, 1], coefficient, int(row.max(initial=-1)) + 1)


def _simplify(rows: _Rows, component: IntArray, ground: np.ndarray) -> tuple[_Rows, IntArray, np.ndarray]:
    """Use up the equations of one term (``a = 0``) and those of the form ``a = b``, until there are none."""
    rows = rows.merged(component, ground)
    while True:
        length = np.bincount(rows.row, minlength=rows.count)
        total = np.bincount(rows.row, weights=rows.coefficient, minlength=rows.count)
        alone = rows.scale[(length == 1)[rows.row]]
        pairs = rows.scale[((length == 2) & (total == 0))[rows.row]].reshape(-1, 2)  # entries are sorted by row
        if not len(alone) and not len(pairs):
            return rows, component, ground
        merged = _components(pairs, len(ground))
        fixed = np.zeros_like(ground)
        fixed[merged[ground]] = True
        fixed[merged[alone]] = True
        component, ground = merged[component], fixed
        rows = rows.merged(merged, ground)


Powers = dict[int, int | Fraction]


def _eliminate(rows: _Rows, met: np.ndarray) -> dict[int, Powers]:
    """Express scales by others: those that are ``met`` only by such that are met.

    Returns:
        For each scale that is not free the exponents of free ones.
    """
    equations: dict[int, Powers] = defaultdict(dict)
    occurs: dict[int, set[int]] = defaultdict(set)
    for row, scale, coefficient in zip(rows.row.tolist(), rows.scale.tolist(), rows.coefficient.tolist(), strict=True):
        equations[row][scale] = coefficient
        occurs[scale].add(row)
    solved: list[tuple[int, Powers]] = []
    for row in sorted(equations, key=lambda row: len(equations[row])):
        equation = equations.pop(row)
        if not equation:
            continue
        # Scales that no parameter has go first, then those that few others depend on and that leave whole exponents.
        pivot = min(equation, key=lambda s: (met[s], len(occurs[s]) > 1, abs(equation[s]) != 1, len(occurs[s]), -s))
        for scale in equation:
            occurs[scale].discard(row)
        leading = equation.pop(pivot)
        powers = {scale: _quotient(-c, leading) for scale, c in equation.items()}
        solved.append((pivot, powers))
        for other in occurs.pop(pivot):
            target = equations[other]
            factor = target.pop(pivot)
            for scale, power in powers.items():
                value = target.pop(scale, 0) + factor * power
                occurs[scale].discard(other)
                if value:
                    target[scale] = value
                    occurs[scale].add(other)
    result: dict[int, Powers] = {}
    for pivot, powers in reversed(solved):
        total: Powers = defaultdict(int)
        for scale, power in powers.items():
            for unit, exponent in result.get(scale, {scale: 1}).items():
                total[unit] += power * exponent
        result[pivot] = {unit: exponent for unit, exponent in total.items() if exponent}
    return result


def _quotient(numerator: int | Fraction, denominator: int | Fraction) -> int | Fraction:
    quotient = Fraction(numerator) / denominator if abs(denominator) != 1 else numerator * denominator
    return int(quotient) if quotient == int(quotient) else quotient
