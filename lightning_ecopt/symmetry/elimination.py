"""Exact elimination of unknowns from linear equations between logarithms of scales.

Three steps, from the most equations at a time to the fewest:

- :meth:`Unknowns.merge` makes scales that are equal, or inverse to each other, one unknown;
- :func:`simplify` uses equations as substitutions, many at a time, in arrays;
- :func:`eliminate` solves the few that are left one by one, with fractions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import IntArray, unique_rows

BoolArray = NDArray[np.bool_]

#: An unknown as a product of powers of others: their exponents by number. Empty for an unknown that is fixed.
Powers = dict[int, int | Fraction]

#: Fewer substitutions than this are made faster one by one.
WORTH_IT = 16
#: Equations with more terms are not compared with each other; repeated ones are nearly always short.
LONGEST_COMPARED = 4
#: Stands for "no row" in an array of rows.
NO_ROW = -1


class Unknowns:
    """The unknowns of the equations: classes of scales that are equal or inverse to each other.

    Attributes:
        number: ``int[N]`` by scale, its unknown.
        sign: ``int[N]`` by scale, 1 if it is its unknown, -1 if it is the inverse.
        fixed: ``bool[N]`` by unknown, whether its scale must be one.

    Example: of four scales, let 1 = 2 and 3 = 1 / 2. Then 1, 2 and 3 are one unknown, with the signs 1, 1 and -1, up to
    the sign of all three::

        unknowns = Unknowns(4)
        unknowns.merge(np.array([1, 3]), np.array([2, 2]), np.array([1, -1]))
        unknowns.number  # array([0, 1, 1, 1])
        unknowns.sign  # array([1, 1, 1, -1])
    """

    def __init__(self, num_scales: int) -> None:
        self.number = np.arange(num_scales, dtype=np.int64)
        self.sign = np.ones(num_scales, dtype=np.int64)
        self.fixed = np.zeros(num_scales, dtype=bool)

    def merge(self, first: IntArray, second: IntArray, sign: IntArray) -> tuple[IntArray, IntArray]:
        """Let unknown ``first[n]`` be unknown ``second[n]`` to the power ``sign[n]``, for every n.

        An unknown that is its own inverse becomes fixed.

        Returns:
            For each unknown of before its new number, and 1, or -1 if it is the inverse of the new unknown.
        """
        from scipy.sparse import coo_array  # which take time to import, and are only needed by a trace
        from scipy.sparse.csgraph import connected_components

        size = len(self.fixed)
        turned = (sign < 0).astype(np.int64)
        # Node 2 u stands for unknown u, node 2 u + 1 for its inverse; an equation joins two pairs of nodes.
        rows = np.concatenate([2 * first, 2 * first + 1])
        columns = np.concatenate([2 * second + turned, 2 * second + 1 - turned])
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(2 * size, 2 * size))
        component = connected_components(graph, directed=False)[1].reshape(size, 2)
        _, number = np.unique(component.min(1), return_inverse=True)
        number = number.reshape(-1).astype(np.int64)
        turn = np.where(component[:, 0] <= component[:, 1], 1, -1)
        fixed = np.zeros(size, dtype=bool)
        fixed[number[self.fixed | (component[:, 0] == component[:, 1])]] = True
        self.number, self.sign, self.fixed = number[self.number], self.sign * turn[self.number], fixed
        return number, turn

    def among(self, scales: IntArray) -> BoolArray:
        """Mark the unknowns, ``bool[N]``, of the given scales, except for fixed ones."""
        found = np.zeros_like(self.fixed)
        found[self.number[scales]] = True
        return found & ~self.fixed


@dataclass(frozen=True, eq=False)
class SparseEquations:
    """Equations ``sum_k coefficient[k] * log(unknown[k]) = 0`` over the entries k of each row, sorted by row.

    Args:
        row: ``int[K]``, the equation of each entry.
        unknown: ``int[K]``, its unknown.
        coefficient: ``int[K]``, its coefficient.
        count: number of equations.

    Example: ``a - b = 0`` and ``b + 2 c = 0``, with a, b, c the unknowns 1, 2, 3, are ``row=[0, 0, 1, 1]``,
    ``unknown=[1, 2, 2, 3]``, ``coefficient=[1, -1, 1, 2]``, ``count=2``.
    """

    row: IntArray
    unknown: IntArray
    coefficient: IntArray
    count: int

    @classmethod
    def of(cls, equations: Equations) -> SparseEquations:
        """Gather the relations of a traced call; its scales are the unknowns."""
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

    def as_mappings(self) -> list[Powers]:
        """Return the equations one by one, as mappings from unknowns to coefficients."""
        found: list[Powers] = [{} for _ in range(self.count)]
        entries = zip(self.row.tolist(), self.unknown.tolist(), self.coefficient.tolist(), strict=True)
        for row, unknown, coefficient in entries:
            found[row][unknown] = coefficient
        return found

    def lengths(self) -> IntArray:
        """Count the terms of each equation."""
        return np.bincount(self.row, minlength=self.count)

    def renumbered(self, number: IntArray, sign: IntArray, fixed: BoolArray) -> SparseEquations:
        """Write the equations in other unknowns.

        Args:
            number: by unknown, what takes its place.
            sign: by unknown, -1 if the inverse takes its place, otherwise 1.
            fixed: by new unknown, whether it must be one; its logarithm is zero and drops out.
        """
        unknown = number[self.unknown]
        kept = ~fixed[unknown]
        return self._tidied(self.row[kept], unknown[kept], (self.coefficient * sign[self.unknown])[kept])

    @staticmethod
    def _tidied(row: IntArray, unknown: IntArray, coefficient: IntArray) -> SparseEquations:
        """Add up the terms of an equation that have the same unknown, and drop empty and repeated equations."""
        keys, place = unique_rows(np.stack([row, unknown], 1))
        total = np.zeros(len(keys), np.int64)
        np.add.at(total, place, coefficient)
        keys, total = keys[total != 0], total[total != 0]
        _, row = np.unique(keys[:, 0], return_inverse=True)
        row = row.reshape(-1)
        return SparseEquations(row, keys[:, 1], total, int(row.max(initial=-1)) + 1)._each_once()

    def _each_once(self) -> SparseEquations:
        """Drop repeated equations of up to ``LONGEST_COMPARED`` terms; those that differ by a sign are the same."""
        length = self.lengths()
        start = np.cumsum(length) - length
        kept = length > LONGEST_COMPARED
        for terms in range(1, LONGEST_COMPARED + 1):
            rows = np.flatnonzero(length == terms)
            if not len(rows):
                continue
            places = start[rows, None] + np.arange(terms)
            table = np.concatenate([self.unknown[places], self.coefficient[places]], 1)
            table[:, terms:] *= np.sign(table[:, terms : terms + 1])
            table[:, terms:] -= min(0, table[:, terms:].min())  # unique_rows wants no negative numbers
            _, same = unique_rows(table)
            kept[rows[np.unique(same, return_index=True)[1]]] = True
        return self if kept.all() else self._rows(kept)

    def _rows(self, kept: BoolArray) -> SparseEquations:
        """Keep the marked equations only, numbered anew."""
        number = np.cumsum(kept) - 1
        entries = kept[self.row]
        return SparseEquations(
            number[self.row[entries]], self.unknown[entries], self.coefficient[entries], int(kept.sum())
        )

    # Substitution -----------------------------------------------------------------------------------------------------

    def substituted(
        self, replaceable: BoolArray, usable: BoolArray
    ) -> tuple[SparseEquations, SparseEquations, IntArray] | None:
        """Use equations to replace unknowns in the others, as many at a time as do not interfere.

        An equation ``x + y - z = 0``, with the *pivot* x, replaces x by ``z - y``.

        Args:
            replaceable: by unknown, whether it may be replaced.
            usable: by equation, whether it may be used for that.

        Returns:
            The other equations after the substitution, the used ones, and the pivot of each used one. ``None`` if fewer
            than ``WORTH_IT`` can be used.
        """
        pivot_row = self._pivot_rows(replaceable, usable)
        rows = pivot_row[pivot_row != NO_ROW]
        if len(rows) < WORTH_IT:
            return None
        used = np.zeros(self.count, dtype=bool)
        used[rows] = True
        source = pivot_row[self.unknown]  # by entry: the equation that replaces its unknown
        is_pivot = used[self.row] & (source != NO_ROW)
        leading = np.zeros(self.count, dtype=np.int64)
        leading[self.row[is_pivot]] = self.coefficient[is_pivot]

        plain = np.flatnonzero((source == NO_ROW) & ~used[self.row])
        replaced = np.flatnonzero((source != NO_ROW) & ~used[self.row])
        entries, times = self._entries_of(source[replaced])
        # x = -c (sum of the others) with the coefficient c = 1 or -1 of the pivot x, which drops out itself.
        factor = np.repeat(-self.coefficient[replaced] * leading[source[replaced]], times)
        others = source[entries] == NO_ROW
        rest = self._tidied(
            np.concatenate([self.row[plain], np.repeat(self.row[replaced], times)[others]]),
            np.concatenate([self.unknown[plain], self.unknown[entries][others]]),
            np.concatenate([self.coefficient[plain], (factor * self.coefficient[entries])[others]]),
        )
        return rest, self._rows(used), self.unknown[is_pivot]

    def _pivot_rows(self, replaceable: BoolArray, usable: BoolArray) -> IntArray:
        """Choose by unknown the equation that replaces it, or ``NO_ROW``; no used equation has the pivot of another."""
        candidates = np.flatnonzero(
            replaceable[self.unknown] & usable[self.row] & (np.abs(self.coefficient) == 1)
        )  # entries
        # At most one for each equation, the unknown that occurs least; and at most one for each unknown.
        occurs = np.bincount(self.unknown, minlength=len(replaceable))
        candidates = candidates[np.lexsort([occurs[self.unknown[candidates]], self.row[candidates]])]
        candidates = candidates[np.unique(self.row[candidates], return_index=True)[1]]
        candidates = candidates[np.unique(self.unknown[candidates], return_index=True)[1]]
        pivot_row = np.full(len(replaceable), NO_ROW, dtype=np.int64)
        pivot_row[self.unknown[candidates]] = self.row[candidates]
        used = np.zeros(self.count, dtype=bool)
        used[self.row[candidates]] = True
        # Where one of two equations has the pivot of the other, the later one has to wait.
        other = pivot_row[self.unknown]
        clash = used[self.row] & (other != NO_ROW) & (other != self.row)
        used[np.maximum(self.row[clash], other[clash])] = False
        pivot_row[self.unknown[candidates][~used[self.row[candidates]]]] = NO_ROW
        return pivot_row

    def _entries_of(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """List the entries of the given equations, one equation after another, and count them for each."""
        length = self.lengths()
        start = np.cumsum(length) - length
        times = length[rows]
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        return np.repeat(start[rows], times) + within, times


def simplify(
    rows: SparseEquations, unknowns: Unknowns, visible: IntArray
) -> tuple[SparseEquations, list[tuple[int, Powers]]]:
    """Use up equations many at a time, until only few are left that can be.

    Args:
        rows: equations between scales.
        unknowns: the classes of these scales; merged further in place.
        visible: the scales that parameters have. All others are replaced first, and are not asked for any more.

    Returns:
        The equations that are left, and visible unknowns as powers of others; unknowns in these powers may be replaced
        by later entries of the list.
    """
    solved: list[tuple[int, Powers]] = []
    rows = rows.renumbered(unknowns.number, unknowns.sign, unknowns.fixed)
    while True:
        merged = _merge_short(rows, unknowns)
        if merged is not None:
            rows = rows.renumbered(*merged, unknowns.fixed)
            solved = [_renumbered(item, *merged, unknowns.fixed) for item in solved]
            continue
        hidden = ~unknowns.among(visible)
        everywhere = np.ones(rows.count, dtype=bool)
        all_visible = np.bincount(rows.row, weights=hidden[rows.unknown], minlength=rows.count) == 0
        step = rows.substituted(hidden, everywhere) or rows.substituted(~hidden, all_visible)
        if step is None:
            return rows, solved
        rows, used, pivots = step
        if not hidden[pivots[0]]:
            for pivot, equation in zip(pivots.tolist(), used.as_mappings(), strict=True):
                leading = equation.pop(pivot)
                solved.append((pivot, {unknown: -c * leading for unknown, c in equation.items()}))


def _merge_short(rows: SparseEquations, unknowns: Unknowns) -> tuple[IntArray, IntArray] | None:
    """Fix unknowns by equations of one term, and merge them by ``a = b`` and ``a = -b``; ``None`` if there are none."""
    length = rows.lengths()
    alone = rows.unknown[(length == 1)[rows.row]]
    two = (length == 2)[rows.row]
    pairs, coefficients = rows.unknown[two].reshape(-1, 2), rows.coefficient[two].reshape(-1, 2)
    whole = np.abs(coefficients[:, 0]) == np.abs(coefficients[:, 1])  # 2 a = b has to wait
    if not len(alone) and not whole.any():
        return None
    unknowns.fixed[alone] = True
    pairs, coefficients = pairs[whole], coefficients[whole]
    signs = -np.sign(coefficients[:, 0] * coefficients[:, 1])
    return unknowns.merge(pairs[:, 0], pairs[:, 1], signs)


def _renumbered(item: tuple[int, Powers], number: IntArray, turn: IntArray, fixed: BoolArray) -> tuple[int, Powers]:
    """Write a solved unknown and its powers in merged unknowns; it is in no equation any more, so it was not merged."""
    pivot, powers = item
    total: Powers = defaultdict(int)
    for unknown, power in powers.items():
        if not fixed[number[unknown]]:
            total[int(number[unknown])] += power * int(turn[unknown] * turn[pivot])
    return int(number[pivot]), dict(total)


def eliminate(rows: SparseEquations, solved: list[tuple[int, Powers]], visible: BoolArray) -> dict[int, Powers]:
    """Solve the equations one by one, the shortest first.

    Args:
        rows: the equations that are left.
        solved: unknowns as powers of others, each of which may be replaced by later entries; more are appended.
        visible: by unknown, whether parameters have it. These become powers of visible ones only.

    Returns:
        For each unknown that is not free the exponents of free ones; none at all if it is fixed.
    """
    equations = dict(enumerate(rows.as_mappings()))
    occurs: dict[int, set[int]] = defaultdict(set)  # the equations that an unknown is in
    for row, equation in equations.items():
        for unknown in equation:
            occurs[unknown].add(row)

    def cost(unknown: int, coefficient: int | Fraction) -> tuple[bool, bool, bool, int, int]:
        """Order pivots: hidden ones first, then few occurrences and a coefficient that leaves whole exponents."""
        count = len(occurs[unknown])
        return bool(visible[unknown]), count > 1, abs(coefficient) != 1, count, -unknown

    for row in sorted(equations, key=lambda row: len(equations[row])):
        equation = equations.pop(row)
        if not equation:
            continue
        pivot = min(equation, key=lambda unknown: cost(unknown, equation[unknown]))
        for unknown in equation:
            occurs[unknown].discard(row)
        leading = equation.pop(pivot)
        powers = {unknown: _quotient(-c, leading) for unknown, c in equation.items()}
        solved.append((pivot, powers))
        for other in occurs.pop(pivot):
            _substitute(equations[other], pivot, powers)
            for unknown in powers:
                (occurs[unknown].add if unknown in equations[other] else occurs[unknown].discard)(other)
    return _back_substituted(solved)


def _substitute(equation: Powers, pivot: int, powers: Powers) -> None:
    """Replace the pivot in an equation, in place."""
    factor = equation.pop(pivot)
    for unknown, power in powers.items():
        value = equation.pop(unknown, 0) + factor * power
        if value:
            equation[unknown] = value


def _back_substituted(solved: Sequence[tuple[int, Powers]]) -> dict[int, Powers]:
    """Express the solved unknowns by free ones: the last one is, and each earlier one by later and free ones."""
    result: dict[int, Powers] = {}
    for pivot, powers in reversed(solved):
        total: Powers = defaultdict(int)
        for unknown, power in powers.items():
            for free, exponent in result.get(unknown, {unknown: 1}).items():
                total[free] += power * exponent
        result[pivot] = {free: exponent for free, exponent in total.items() if exponent}
    return result


def _quotient(numerator: int | Fraction, denominator: int | Fraction) -> int | Fraction:
    quotient = Fraction(numerator) / denominator if abs(denominator) != 1 else numerator * denominator
    return int(quotient) if quotient == int(quotient) else quotient
