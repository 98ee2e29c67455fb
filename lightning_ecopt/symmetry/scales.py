"""The unknown scales of one call, and the equations between labels that its operations impose.

Rules write here what they find: new scales (:meth:`Scales.fresh`), equal labels (:meth:`Scales.equate`), and labels of
products (:meth:`Scales.combine`, :meth:`Scales.product`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm, prod

import numpy as np
from numpy.typing import NDArray

from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    IntArray,
    Label,
    Product,
    align,
    clusters,
    compress,
    constant,
    crosses,
    factors_of,
    unique_rows,
    varying,
)

#: A label that would have more entries is held fixed instead.
MOST_ENTRIES = 2**22


@dataclass(frozen=True)
class Operation:
    """One operation of the call, for reports.

    Args:
        name: its ATen name, or what else demanded something.
        module: name of the module that was running; outside of any submodule the function and the line in the user's
            code: ``"training_step, line 23"``.
    """

    name: str
    module: str


@dataclass(frozen=True, eq=False)
class Relations:
    """For each row n of ``scales`` [N, K] an equation: ``sum_k coefficients[k] * log(factor(scales[n, k])) = 0``."""

    scales: IntArray
    coefficients: tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class Scales:
    """Collects scales, and equations between labels.

    Args:
        num_scales: how many scales there are, ``FIXED`` among them.
        operation: the operation that equations are written for at the moment.
        equalities: pairs of equal scales, arrays ``[N, 2]``.
        relations: equations with other coefficients, or more terms.
        fixings: scales that an operation holds fixed.
        is_fixed: whether a scale is known to be fixed. Its last entry, which the index ``ZERO`` reads, is never set.

    Example::

        scales = Scales()
        h = scales.fresh((1, 6))  # linear: a scale for each output channel
        scales.equate(h, constant(FIXED, 2))  # sigmoid
    """

    num_scales: int = 1
    operation: Operation = Operation("input", "")
    equalities: list[IntArray] = field(default_factory=list)
    relations: list[Relations] = field(default_factory=list)
    fixings: list[tuple[Operation, IntArray]] = field(default_factory=list)
    is_fixed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1024, dtype=bool))

    def fresh(self, shape: Sequence[int]) -> IntArray:
        """New scales, one for each element of ``shape``."""
        ids = np.arange(self.num_scales, self.num_scales + prod(shape), dtype=np.int64).reshape(tuple(shape))
        self.num_scales += ids.size
        if self.num_scales >= len(self.is_fixed):
            self.is_fixed = np.concatenate([self.is_fixed, np.zeros(self.num_scales, dtype=bool)])
        return ids

    def simplify(self, label: Label) -> Label:
        """The same label with ``FIXED`` for all scales that are known to be fixed, which may make it smaller."""
        if all(ids.size == 1 or not self.is_fixed[ids].any() for ids in factors_of(label)):
            return label
        known = [compress(np.where(self.is_fixed[ids], FIXED, ids)) for ids in factors_of(label)]
        return self.product(*known) if isinstance(label, Product) else known[0]

    def equate(self, first: IntArray, second: IntArray) -> IntArray:
        """Demand that two labels agree element by element; returns the common label."""
        ndim = max(first.ndim, second.ndim)
        first, second = align(first, ndim), align(second, ndim)
        own = varying(first) - varying(second), varying(second) - varying(first)
        if all(own) and not (first == ZERO).any() and not (second == ZERO).any():
            # If a(i) = b(j) for all i and j, then both are constants: no need to look at each pair.
            first, second = self.uniform(first, own[0]), self.uniform(second, own[1])
        return self._equate(first, second)

    def _equate(self, first: IntArray, second: IntArray) -> IntArray:
        first, second = np.broadcast_arrays(first, second)
        differ = (first != second) & (first != ZERO) & (second != ZERO)
        if differ.any():
            pairs, _ = unique_rows(np.stack([first[differ], second[differ]], 1))
            is_fixed = (pairs == FIXED).any(1)
            if is_fixed.any():
                numbers = np.unique(pairs[is_fixed].max(1))  # of a pair with FIXED the other one
                self.fixings.append((self.operation, numbers))
                self.is_fixed[numbers] = True
            if not is_fixed.all():
                self.equalities.append(pairs[~is_fixed])
        return compress(np.where(first == ZERO, second, first))

    def uniform(self, ids: IntArray, axes: Iterable[int]) -> IntArray:
        """Demand one label along ``axes``; returns the label with size 1 there."""
        axes = tuple(axis for axis in axes if ids.shape[axis] > 1)
        if not axes:
            return ids
        representative = ids.max(axis=axes, keepdims=True)  # the largest number is not ZERO unless all are
        self._equate(ids, representative)
        return representative

    def combine(self, *terms: tuple[int | Fraction, IntArray]) -> IntArray:
        """The label of a product of powers: ``combine((2, x), (-1, y))`` is the label of ``x**2 / y``.

        Every combination of scales that occurs gets one new scale, and a relation that defines it. A product with a
        factor of zero is zero. If the result would have more than ``MOST_ENTRIES``, all terms are held fixed.
        """
        if [exponent for exponent, _ in terms] == [1]:
            return terms[0][1]
        shape = np.broadcast_shapes(*(ids.shape for _, ids in terms))
        if all((ids <= FIXED).all() for _, ids in terms):
            zero = [ids == ZERO for exponent, ids in terms if exponent > 0]
            return (
                compress(np.where(np.logical_or.reduce(np.broadcast_arrays(*zero)), ZERO, FIXED))
                if zero
                else (constant(FIXED, len(shape)))
            )
        if prod(shape) > MOST_ENTRIES:
            for _, ids in terms:
                self.equate(ids, constant(FIXED, ids.ndim))
            return constant(FIXED, len(shape))
        columns, place = _combinations([ids for _, ids in terms], shape)
        exponents = np.array([1 if exponent > 0 else -1 for exponent, _ in terms])
        zero = ((columns == ZERO) & (exponents > 0)).any(1)
        columns = np.maximum(columns, FIXED)
        columns[zero] = FIXED
        rows, same = unique_rows(columns)
        result = np.full(len(rows), FIXED, dtype=np.int64)
        alone = (rows > FIXED).sum(1) == 1
        for k, (exponent, _) in enumerate(terms):
            if exponent == 1:
                kept = alone & (rows[:, k] > FIXED)
                result[kept] = rows[kept, k]
        new = (rows > FIXED).any(1) & (result == FIXED)
        result[new] = self.fresh((int(new.sum()),))
        denominator = lcm(*(Fraction(exponent).denominator for exponent, _ in terms))
        coefficients = (denominator, *(int(-exponent * denominator) for exponent, _ in terms))
        self.relate(np.concatenate([result[new, None], rows[new]], 1), coefficients)
        return compress(np.where(zero, ZERO, result[same])[place])

    def relate(self, scales: IntArray, coefficients: tuple[int, ...]) -> None:
        """Demand ``sum_k coefficients[k] * log(scales[n, k]) = 0`` for every row n of ``scales``."""
        if len(scales):
            self.relations.append(Relations(scales, coefficients))

    def cancel(self, *terms: tuple[int, IntArray]) -> None:
        """Demand that a product of powers is one for all elements; each term is an exponent and a label.

        If ``a(i) b(j) = 1`` for all i and j, then a and b are constants. So terms that change along different axes are
        made constant one by one, and no label is repeated along axes on which it does not change.
        """
        groups = clusters(ids for _, ids in terms)
        constants = self.fresh((len(groups) - 1,))
        for k, axes in enumerate(groups):
            members = [term for term in terms if varying(term[1]) & axes or (k == 0 and not varying(term[1]))]
            rest = constants[k : k + 1] if k < len(constants) else constants
            columns = np.broadcast_arrays(*(ids for _, ids in members))
            rows, _ = unique_rows(np.stack([column.ravel() for column in columns], 1))
            signs = [exponent for exponent, _ in members] + [-1 if k < len(constants) else 1] * len(rest)
            self.relate(np.concatenate([rows, np.broadcast_to(rest, (len(rows), len(rest)))], 1), tuple(signs))

    def difference(self, first: IntArray, second: IntArray, axes: Iterable[int]) -> IntArray:
        """Demand that ``first / second`` changes along ``axes`` only; returns the label of the ratio, new scales."""
        first, second = np.broadcast_arrays(first, second)
        axes = sorted(axes)
        # Where both labels are the same, so is the ratio.
        outer = [size if k in axes else 1 for k, size in enumerate(first.shape)]
        tables = [np.moveaxis(ids, axes, range(len(axes))).reshape(prod(outer), -1) for ids in (first, second)]
        kinds, place = unique_rows(np.concatenate(tables, 1))
        ratio = self.fresh((len(kinds),))
        columns = np.broadcast_arrays(*np.split(kinds, 2, axis=1), ratio[:, None])
        self.relate(unique_rows(np.stack([ids.ravel() for ids in columns], 1))[0], (1, -1, -1))
        return ratio[place].reshape(outer)

    # Labels in factors ------------------------------------------------------------------------------------------------

    def product(self, *labels: Label) -> Label:
        """The label of a product of tensors, in factors where these change along different axes."""
        ndim = max(label.ndim for label in labels)
        all_factors = [align(ids, ndim) for label in labels for ids in factors_of(label)]
        factors = [ids for ids in all_factors if (ids != FIXED).any()] or all_factors[:1]
        groups = clusters(factors)
        if len(groups) == 1 or any((ids == ZERO).any() for ids in factors):
            return self.combine(*((1, ids) for ids in factors))
        members = [[ids for ids in factors if varying(ids) & axes] for axes in groups]
        members[0] += [ids for ids in factors if not varying(ids)]
        return Product(tuple(self.combine(*((1, ids) for ids in own)) for own in members))

    def whole(self, label: Label) -> IntArray:
        """The label as one array."""
        if not isinstance(label, Product):
            return label
        if label.whole is None:
            label.whole = self.combine(*((1, ids) for ids in label.factors))
        return label.whole

    def match(self, first: Label, second: Label) -> Label:
        """Demand that two labels agree, like :meth:`equate`; labels in factors stay so."""
        arrays = [label for label in (first, second) if not isinstance(label, Product)]
        if len(arrays) == 2 or any((ids == ZERO).any() for ids in arrays):
            return self.equate(self.whole(first), self.whole(second))
        for pair in crosses(first, second):
            self.equate(*(self.combine(*((1, ids) for ids in factors)) for factors in pair))
        return arrays[0] if arrays else first

    def match_along(self, label: Label, axes: Iterable[int]) -> Label:
        """Demand one label along ``axes``, like :meth:`uniform`; a label in factors stays so."""
        axes = list(axes)
        if isinstance(label, Product) and len(clusters(label.factors)) == len(label.factors):
            return self.product(*(self.uniform(ids, axes) for ids in label.factors))
        return self.uniform(self.whole(label), axes)


def _combinations(labels: Sequence[IntArray], shape: Sequence[int]) -> tuple[IntArray, IntArray]:
    """List the combinations of scales that labels have at one element, ``[N, K]``, some of them perhaps twice.

    Returns:
        the combinations, and for each element the number of its own, an array of the given shape.
    """
    labels = [align(ids, len(shape)) for ids in labels]
    if len(clusters(labels)) < sum(bool(varying(ids)) for ids in labels):
        rows, place = unique_rows(np.stack([np.broadcast_to(ids, shape).ravel() + 1 for ids in labels], 1))
        return rows - 1, place.reshape(shape)
    # They change along different axes, so all combinations of their scales occur.
    found = [np.unique(ids, return_inverse=True) for ids in labels]
    rows = np.stack([ids.ravel() for ids in np.meshgrid(*(scales for scales, _ in found), indexing="ij")], 1)
    place = np.zeros((1,) * len(shape), dtype=np.int64)
    for ids, (scales, number) in zip(labels, found, strict=True):
        place = place * len(scales) + number.reshape(ids.shape)
    return rows, place
