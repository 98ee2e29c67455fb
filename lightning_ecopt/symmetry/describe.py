"""What the units of a network are: sorted into sets, and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_ecopt.symmetry.coupling import Coupling
from lightning_ecopt.symmetry.labels import IntArray
from lightning_ecopt.symmetry.monomials import Monomials

if TYPE_CHECKING:
    from scipy.sparse import csr_array

#: Most numbers that are listed in an index; further ones are left out.
LONGEST_LIST = 8
#: A longer list of numbers is written as slices if these are at most so many.
MOST_RUNS = 4
#: Most index expressions for one parameter.
MOST_EXPRESSIONS = 8
#: Exponents are compared after rounding to so many decimals.
DECIMALS = 9


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Units that couple the same parameters in the same way, such as the channels of one layer.

    Args:
        units: their numbers, ascending.
        powers: names of parameters, each with an exponent: rescaling one of the units by ``c`` multiplies some elements
            of the parameter by ``c ** exponent``.
    """

    units: Tensor
    powers: tuple[tuple[str, float], ...]


def sort_units(couplings: Iterable[Coupling], monomials: Monomials) -> list[UnitSet]:
    """Sort the units into sets that couple the same parameters in the same way, in the order of their first units."""
    table = _exponents(monomials)
    powers: list[set[tuple[int, float]]] = [set() for _ in range(monomials.num_units)]
    names: dict[str, int] = {}
    for coupling in couplings if monomials.num_units else ():
        number = names.setdefault(coupling.parameter, len(names))
        for unit, exponents in _exponents_of_units(coupling, table):
            # Negated, so that sorting by parameter and number puts c before 1/c.
            powers[unit].update((number, -exponent) for exponent in exponents if exponent)
    members: dict[tuple[tuple[int, float], ...], list[int]] = defaultdict(list)
    for unit, found in enumerate(powers):
        members[tuple(sorted(found))].append(unit)
    order = list(names)
    return [
        UnitSet(torch.from_numpy(np.array(units)), tuple((order[number], -exponent) for number, exponent in found))
        for found, units in members.items()
    ]


def _exponents(monomials: Monomials) -> csr_array:
    """Tabulate the exponents of the units in the monomials, ``[S + 1, H]``; the last row, of zeros, is for NO_UNIT."""
    from scipy.sparse import csr_array

    own = np.arange(monomials.num_units)
    rows, columns = np.concatenate([own, monomials.products.numpy()]), np.concatenate([own, monomials.units.numpy()])
    values = np.concatenate([np.ones(monomials.num_units), monomials.exponents.numpy()])
    return csr_array((values, (rows, columns)), shape=(monomials.num_scales + 1, monomials.num_units))


def _exponents_of_units(coupling: Coupling, table: csr_array) -> Iterator[tuple[int, set[float]]]:
    """Yield each unit in a coupling with the exponents with which it multiplies elements.

    Args:
        coupling: any coupling.
        table: exponents of the units in the monomials, ``[S + 1, H]``.
    """
    size = table.shape[0]
    # In 64 bits: a pair of numbers is written as one below.
    incoming, outgoing = (ids.numpy().astype(np.int64) % size for ids in (coupling.incoming, coupling.outgoing))
    if _share_axes(incoming, outgoing):
        first, second = np.divmod(np.unique(incoming * size + outgoing), size)
        yield from _by_unit(table[first] - table[second]).items()
        return
    into, out_of = (_by_unit(table[np.unique(ids)]) for ids in (incoming, outgoing))  # all pairs of them occur
    for unit in into.keys() | out_of.keys():
        pairs_of_unit = product(into.get(unit, {0.0}), out_of.get(unit, {0.0}))
        yield unit, {round(first - second, DECIMALS) for first, second in pairs_of_unit}


def _by_unit(exponents: csr_array) -> dict[int, set[float]]:
    """List the exponents in each column that has some; zero is one of them if some row of the column has none."""
    entries = exponents.tocoo()
    result: dict[int, set[float]] = defaultdict(set)
    for unit, exponent in zip(entries.col.tolist(), entries.data.round(DECIMALS).tolist(), strict=True):
        result[unit].add(exponent)
    units, rows = np.unique(entries.col, return_counts=True)
    for unit in units[rows < entries.shape[0]].tolist():
        result[unit].add(0.0)
    return result


def _share_axes(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether there is an axis along which both have more than one entry."""
    return any(a > 1 and b > 1 for a, b in zip(first.shape[::-1], second.shape[::-1], strict=False))


def describe_unit(
    unit: int, couplings: Iterable[Coupling], monomials: Monomials, shapes: Mapping[str, Sequence[int]]
) -> str:
    """Say in words what one unit multiplies.

    Args:
        unit: its number.
        couplings: of the group.
        monomials: that the couplings refer to.
        shapes: of the parameters, by name.

    Raises:
        IndexError: if there is no such unit.
    """
    if not 0 <= unit < monomials.num_units:
        numbers = f"units 0 to {monomials.num_units - 1}" if monomials.num_units else "no units"
        raise IndexError(f"there is no unit {unit}: the group has {numbers}")
    exponents = _exponents(monomials)[:, [unit]].toarray().ravel()  # the last one, for NO_UNIT, is zero
    found: dict[float, list[str]] = defaultdict(list)
    for coupling in couplings:
        for part in _parts(exponents[coupling.incoming.numpy()], exponents[coupling.outgoing.numpy()]):
            part = part.round(DECIMALS)
            for exponent in np.unique(part[part != 0]).tolist():
                found[exponent] += _elements(coupling, part == exponent, shapes[coupling.parameter])
    order = sorted(found, key=lambda exponent: (exponent < 0, abs(exponent)))
    return f"Unit {unit}: " + "; ".join(f"{power(e)} multiplies {', '.join(found[e])}" for e in order)


def power(exponent: float) -> str:
    """Write ``c`` to the ``exponent`` as text: ``c``, ``1/c``, ``c^2``, ``c^(1/2)``."""
    if abs(exponent) == 1:
        return "c" if exponent > 0 else "1/c"
    fraction = Fraction(exponent).limit_denominator(1000)
    return f"c^{fraction}" if fraction.denominator == 1 else f"c^({fraction})"


def _parts(incoming: np.ndarray, outgoing: np.ndarray) -> list[np.ndarray]:
    """Split the exponents ``incoming - outgoing`` into arrays that are described one after the other.

    If they change along different axes, a row and a column are described, not each element; a constant that both have
    is left out, as it cancels.
    """
    if _share_axes(incoming, outgoing):
        return [incoming - outgoing]
    values, counts = np.unique(outgoing, return_counts=True)
    common = values[counts.argmax()] if 2 * counts.max() > outgoing.size else 0.0
    return [incoming - common, common - outgoing]


def _elements(coupling: Coupling, chosen: np.ndarray, shape: Sequence[int]) -> list[str]:
    """Write index expressions for the elements that ``chosen`` marks, which broadcasts to the coupling's region."""
    if not shape:
        return [coupling.parameter]
    found = []
    for box in _boxes(chosen):
        numbers = [
            np.arange(size)[region][place if many > 1 else slice(None)]
            for size, region, place, many in zip(shape, coupling.region, box, chosen.shape, strict=True)
        ]
        texts: list[list[str]] = []
        for axis, size in zip(numbers, shape, strict=True):
            several = any(text[0].startswith("[") for text in texts)  # two lists would be read in pairs
            texts.append(_index(axis, size, split=several))
        found += [_subscript(coupling.parameter, index) for index in product(*texts)]
    if len(found) > MOST_EXPRESSIONS:
        found[MOST_EXPRESSIONS:] = [f"... ({len(found) - MOST_EXPRESSIONS} more of {coupling.parameter})"]
    return found


def _boxes(chosen: np.ndarray) -> Iterator[list[IntArray]]:
    """Split the marked elements into boxes, and yield for each its positions along every axis."""
    if not chosen.any():
        return
    box = [np.unique(places) for places in np.nonzero(chosen)]
    if prod(len(places) for places in box) == chosen.sum():
        yield box
        return
    for axis, places in enumerate(box):
        slices = np.moveaxis(chosen, axis, 0)[places].reshape(len(places), -1)
        _, first, kind = np.unique(slices, axis=0, return_index=True, return_inverse=True)
        if len(first) > 1:
            for number in np.argsort(first):
                alike = np.zeros((chosen.shape[axis], *(1,) * (chosen.ndim - axis - 1)), dtype=bool)
                alike[places[kind.reshape(-1) == number]] = True
                yield from _boxes(chosen & alike)
            return


def _index(numbers: IntArray, size: int, *, split: bool) -> list[str]:
    """Write how to index an axis of ``size`` to get these numbers: as one expression, or as several if that is shorter.

    Args:
        numbers: ascending.
        size: of the axis.
        split: write several expressions rather than a list.
    """
    if len(numbers) == size:
        return [":"]
    found = runs(numbers.tolist())
    if len(found) == 1 or split or (len(numbers) > LONGEST_LIST and len(found) <= MOST_RUNS):
        return found
    shown = [str(number) for number in numbers[:LONGEST_LIST].tolist()]
    return [f"[{', '.join(shown + ['...'] * (len(numbers) > LONGEST_LIST))}]"]


def runs(numbers: Sequence[int]) -> list[str]:
    """Write ascending numbers singly and as slices: ``[0, 1, 2, 7, 10, 20, 30]`` gives ``0:3``, ``7``, ``10:31:10``."""
    found, start = [], 0
    while start < len(numbers):
        stop = start + 1
        step = numbers[stop] - numbers[start] if stop < len(numbers) else 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if step > 1 and stop - start < 3:
            stop = start + 1
        first, last = numbers[start], numbers[stop - 1]
        found.append(str(first) if stop - start == 1 else f"{first}:{last + 1}" + (f":{step}" if step > 1 else ""))
        start = stop
    return found


def _subscript(name: str, index: Sequence[str]) -> str:
    index = list(index)
    while index and index[-1] == ":":
        index.pop()
    return f"{name}[{', '.join(index)}]" if index else name
