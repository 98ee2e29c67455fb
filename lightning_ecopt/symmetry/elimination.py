"""See the functions below."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import IntArray, unique_rows

WORTH_IT = 16  # so many equations at a time are used faster than one by one


Powers = dict[int, int | Fraction]  # exponents of unknowns


@dataclass(frozen=True, eq=False)
class SparseEquations:
    """Sparse equations: ``sum of coefficient * log(scale) = 0`` over the entries of one row."""

    row: IntArray
    scale: IntArray
    coefficient: IntArray
    count: int

    @classmethod
    def of(cls, equations: Equations) -> SparseEquations:
        """The relations of a traced call."""
        rows, scales, coefficients, count = [], [], [], 0
        for relation in equations.relations:
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

    def renumbered(self, number: IntArray, sign: IntArray, ground: NDArray[np.bool_]) -> SparseEquations:
        """The same in other unknowns: ground left out, equal ones added up, rows numbered anew, each once."""
        unknown = number[self.scale]
        return self._tidied(self.row, unknown, self.coefficient * sign[self.scale], ~ground[unknown])

    @staticmethod
    def _tidied(row: IntArray, scale: IntArray, coefficient: IntArray, kept: NDArray[np.bool_]) -> SparseEquations:
        keys, place = unique_rows(np.stack([row[kept], scale[kept]], 1))
        total = np.zeros(len(keys), np.int64)
        np.add.at(total, place, coefficient[kept])
        keys, total = keys[total != 0], total[total != 0]
        _, row = np.unique(keys[:, 0], return_inverse=True)
        row = row.reshape(-1)
        return SparseEquations(row, keys[:, 1], total, int(row.max(initial=-1)) + 1)._each_once()

    def _each_once(self) -> SparseEquations:
        """Leave out what is repeated, among rows of up to four terms."""
        length = np.bincount(self.row, minlength=self.count)
        start = np.cumsum(length) - length  # entries are sorted by row
        kept = length > 4
        for terms in range(1, 5):
            rows = np.flatnonzero(length == terms)
            if not len(rows):
                continue
            places = start[rows, None] + np.arange(terms)
            table = np.concatenate([self.scale[places], self.coefficient[places]], 1)
            table[:, terms:] *= np.sign(table[:, terms : terms + 1])
            table[:, terms:] -= min(0, table[:, terms:].min())
            _, same = unique_rows(table)
            kept[rows[np.unique(same, return_index=True)[1]]] = True
        if kept.all():
            return self
        number = np.cumsum(kept) - 1
        entries = kept[self.row]
        return SparseEquations(
            number[self.row[entries]], self.scale[entries], self.coefficient[entries], int(kept.sum())
        )

    def substituted(
        self, spare: NDArray[np.bool_], usable: NDArray[np.bool_]
    ) -> tuple[SparseEquations, SparseEquations, IntArray] | None:
        """Use rows to replace unknowns in the others, as many as do not interfere.

        Args:
            spare: which unknowns may be replaced.
            usable: which rows may be used for it.

        Returns:
            The other rows, those that were used, and the unknown that each of these gave; ``None`` if none can be used,
            or too few to be worth it.
        """
        candidates = np.flatnonzero(spare[self.scale] & usable[self.row] & (np.abs(self.coefficient) == 1))
        occurs = np.bincount(self.scale, minlength=len(spare))
        candidates = candidates[np.lexsort([occurs[self.scale[candidates]], self.row[candidates]])]
        candidates = candidates[np.unique(self.row[candidates], return_index=True)[1]]  # one for each row
        candidates = candidates[np.unique(self.scale[candidates], return_index=True)[1]]  # and for each unknown
        pivot_row = np.full(len(spare), -1, dtype=np.int64)  # by unknown
        pivot_row[self.scale[candidates]] = self.row[candidates]
        chosen = np.zeros(self.count, dtype=bool)
        chosen[self.row[candidates]] = True
        # Of two chosen rows one of which has the pivot of the other, the later one has to wait.
        other = pivot_row[self.scale]
        clash = chosen[self.row] & (other >= 0) & (other != self.row)
        chosen[np.maximum(self.row[clash], other[clash])] = False
        if chosen.sum() < WORTH_IT:
            return None
        pivot_row[self.scale[candidates][~chosen[self.row[candidates]]]] = -1
        source = pivot_row[self.scale]
        own = chosen[self.row]
        replaced = np.flatnonzero((source >= 0) & ~own)
        plain = np.flatnonzero((source < 0) & ~own)
        leading = np.zeros(self.count, dtype=np.int64)
        leading[self.row[own & (source >= 0)]] = self.coefficient[own & (source >= 0)]
        length = np.bincount(self.row, minlength=self.count)
        start = np.cumsum(length) - length
        sources = source[replaced]
        times = length[sources]
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        entries = np.repeat(start[sources], times) + within
        # x = -c (sum of the others) with the coefficient c = 1 or -1 of the pivot x, which drops out itself.
        factor = np.repeat(-self.coefficient[replaced] * leading[sources], times)
        others = source[entries] < 0
        row = np.concatenate([self.row[plain], np.repeat(self.row[replaced], times)[others]])
        scale = np.concatenate([self.scale[plain], self.scale[entries][others]])
        coefficient = np.concatenate([self.coefficient[plain], (factor * self.coefficient[entries])[others]])
        left = self._tidied(row, scale, coefficient, np.ones(len(row), dtype=bool))
        _, number = np.unique(self.row[own], return_inverse=True)
        used = SparseEquations(number.reshape(-1), self.scale[own], self.coefficient[own], int(chosen.sum()))
        return left, used, self.scale[own & (source >= 0)]

    def equations(self) -> list[Powers]:
        """The rows as mappings from unknowns to coefficients."""
        found: list[Powers] = [{} for _ in range(self.count)]
        entries = zip(self.row.tolist(), self.scale.tolist(), self.coefficient.tolist(), strict=True)
        for row, scale, coefficient in entries:
            found[row][scale] = coefficient
        return found


def simplify(
    rows: SparseEquations, unknowns: Unknowns, had: IntArray
) -> tuple[SparseEquations, list[tuple[int, Powers]]]:
    """Use up equations many at a time: of one term, of the form ``a = b`` and ``a = -b``, and as they can be solved.

    Args:
        rows: the equations.
        unknowns: changed in place.
        had: the scales that parameters have; others are eliminated first.

    Returns:
        What is left of the equations, and unknowns as powers of others, the later of which may be replaced again.
    """
    solved: list[tuple[int, Powers]] = []
    rows = rows.renumbered(unknowns.of, unknowns.sign, unknowns.ground)
    while True:
        length = np.bincount(rows.row, minlength=rows.count)
        alone = rows.scale[(length == 1)[rows.row]]
        two = (length == 2)[rows.row]
        pairs, coefficients = rows.scale[two].reshape(-1, 2), rows.coefficient[two].reshape(-1, 2)
        whole = np.abs(coefficients[:, 0]) == np.abs(coefficients[:, 1])
        if len(alone) or whole.any():
            unknowns.ground[alone] = True
            pairs, coefficients = pairs[whole], coefficients[whole]
            signs = -np.sign(coefficients[:, 0] * coefficients[:, 1])
            number, turn = unknowns.merge(pairs[:, 0], pairs[:, 1], signs)
            rows = rows.renumbered(number, turn, unknowns.ground)
            solved = [_renumbered(item, number, turn, unknowns.ground) for item in solved]
            continue
        spare = ~unknowns.met(had)
        everywhere = np.ones(rows.count, dtype=bool)
        without = np.bincount(rows.row, weights=spare[rows.scale], minlength=rows.count) == 0
        step = rows.substituted(spare, everywhere) or rows.substituted(~spare, without)
        if step is None:
            return rows, solved
        rows, used, pivots = step
        if not spare[pivots[0]]:
            for pivot, equation in zip(pivots.tolist(), used.equations(), strict=True):
                leading = equation.pop(pivot)
                solved.append((pivot, {scale: -c * leading for scale, c in equation.items()}))


def _renumbered(
    item: tuple[int, Powers], number: IntArray, turn: IntArray, ground: NDArray[np.bool_]
) -> tuple[int, Powers]:
    """The same unknown and its powers after unknowns were merged, which it was not."""
    pivot, powers = item
    total: Powers = defaultdict(int)
    for scale, power in powers.items():
        if not ground[number[scale]]:
            total[int(number[scale])] += power * int(turn[scale] * turn[pivot])
    return int(number[pivot]), dict(total)


def eliminate(rows: SparseEquations, solved: list[tuple[int, Powers]], met: NDArray[np.bool_]) -> dict[int, Powers]:
    """Express unknowns by others: those that are ``met`` only by such that are met.

    Returns:
        For each scale that is not free the exponents of free ones.
    """
    equations = dict(enumerate(rows.equations()))
    occurs: dict[int, set[int]] = defaultdict(set)
    for row, equation in equations.items():
        for scale in equation:
            occurs[scale].add(row)
    for row in sorted(equations, key=lambda row: len(equations[row])):
        equation = equations.pop(row)
        if not equation:
            continue
        # Monomials that no parameter has go first, then those that few others depend on and that leave whole exponents.
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


class Unknowns:
    """Monomials that are equal or inverse are one unknown: scale ``s`` is ``of[s]`` to the power ``sign[s]``.

    ``ground`` says by unknown which must not change.
    """

    def __init__(self, num_scales: int) -> None:
        self.of = np.arange(num_scales, dtype=np.int64)
        self.sign = np.ones(num_scales, dtype=np.int64)
        self.ground = np.zeros(num_scales, dtype=bool)

    def merge(self, first: IntArray, second: IntArray, sign: IntArray) -> tuple[IntArray, IntArray]:
        """Let unknowns ``first[n]`` be ``second[n]`` to the power ``sign[n]``.

        Returns:
            The new number and the sign of each unknown that there was.
        """
        size = len(self.ground)
        turned = (sign < 0).astype(np.int64)
        # A node for each unknown and one for its inverse.
        rows = np.concatenate([2 * first, 2 * first + 1])
        columns = np.concatenate([2 * second + turned, 2 * second + 1 - turned])
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(2 * size, 2 * size))
        component = connected_components(graph, directed=False)[1].reshape(size, 2)
        _, number = np.unique(component.min(1), return_inverse=True)
        number = number.reshape(-1).astype(np.int64)
        turn = np.where(component[:, 0] <= component[:, 1], 1, -1)
        ground = np.zeros(size, dtype=bool)
        ground[number[self.ground | (component[:, 0] == component[:, 1])]] = True  # a = -a
        self.of, self.sign, self.ground = number[self.of], self.sign * turn[self.of], ground
        return number, turn

    def met(self, scales: IntArray) -> NDArray[np.bool_]:
        """Which unknowns are among the scales, and not ground."""
        met = np.zeros_like(self.ground)
        met[self.of[scales]] = True
        return met & ~self.ground
