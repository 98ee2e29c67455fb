"""From the equations of a traced call to the units: the scales that remain free.

Nearly all equations are ``a = b``, ``a = -b`` or ``a = 0`` (in logarithms): connected components, with signs. What is
left, the products, is solved by elimination, exactly: first the scales that no parameter has, many at a time, then the
few others one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_ecopt.symmetry.coupling import NO_UNIT
from lightning_ecopt.symmetry.elimination import SparseEquations, Unknowns, eliminate, simplify
from lightning_ecopt.symmetry.equations import Equations, Operation, Use
from lightning_ecopt.symmetry.labels import FIXED, ZERO, IntArray


@dataclass(frozen=True, eq=False)
class SolvedUse:
    """A :class:`~lightning_ecopt.symmetry.equations.Use` with the scales numbered anew, ``NO_UNIT`` for ground."""

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
    operation that is_fixed something, the freedoms that were lost to it (operations that come first are charged first).
    """

    num_units: int
    num_scales: int
    scales: IntArray
    units: IntArray
    exponents: np.ndarray
    uses: list[SolvedUse]
    costs: Counter[Operation]


def solve(equations: Equations) -> Solution:
    """Solve the equations of a traced call."""
    unknowns = Unknowns(equations.num_scales)
    pairs = np.concatenate(equations.equalities) if equations.equalities else np.empty((0, 2), np.int64)
    unknowns.merge(pairs[:, 0], pairs[:, 1], np.ones(len(pairs), np.int64))
    unknowns.ground[unknowns.of[FIXED]] = True
    costs: Counter[Operation] = Counter()
    for operation, ids in equations.fixings:
        lost = np.unique(unknowns.of[ids[ids > FIXED]])
        lost = lost[~unknowns.ground[lost]]
        unknowns.ground[lost] = True
        if len(lost):
            costs[operation] += len(lost)

    uses = [
        (name, use)
        for name, shape in equations.shapes.items()
        for use in _completed(equations.uses.get(name, []), shape)
    ]
    labels = [np.where(ids == ZERO, FIXED, ids) for _, use in uses for ids in (use.incoming, use.outgoing)]
    had = np.unique(np.concatenate([ids.ravel() for ids in labels])) if labels else np.empty(0, np.int64)
    rows, expressed = simplify(SparseEquations.of(equations), unknowns, had)
    powers = eliminate(rows, expressed, unknowns.met(had))

    # Each unknown is met as it is or inverted; a unit is the way in which the parameters meet it first.
    codes = [2 * unknowns.of[ids] + (unknowns.sign[ids] < 0) for ids in labels]
    order = [divmod(code, 2) for code in _in_order(codes, np.repeat(unknowns.met(had), 2))]
    units: dict[int, int] = {}
    turned: dict[int, int] = {}
    for unknown, inverted in order:
        if unknown not in powers and unknown not in units:
            units[unknown], turned[unknown] = len(units), -1 if inverted else 1
    number = np.full(2 * equations.num_scales, NO_UNIT, dtype=np.int64)  # by code
    terms: list[tuple[int, int, float]] = []
    count = len(units)
    for unknown, inverted in order:
        if not powers.get(unknown, True):
            continue  # ground after all
        sign = -1 if inverted else 1
        if turned.get(unknown) == sign:
            number[2 * unknown + inverted] = units[unknown]
            continue
        number[2 * unknown + inverted] = count
        for unit, power in powers.get(unknown, {unknown: 1}).items():
            terms.append((count, units[unit], float(sign * turned[unit] * power)))
        count += 1
    solved = [
        SolvedUse(name, use.region, _shortened(number[incoming]), _shortened(number[outgoing]), use.additive)
        for (name, use), incoming, outgoing in zip(uses, codes[::2], codes[1::2], strict=True)
    ]
    scales, of, exponents = zip(*terms, strict=True) if terms else ((), (), ())
    return Solution(
        len(units),
        count,
        np.array(scales, np.int64),
        np.array(of, np.int64),
        np.array(exponents, np.float64),
        solved,
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
