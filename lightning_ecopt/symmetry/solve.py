"""From the equations of a traced call to the units: the scales that remain free.

Nearly all equations are ``a = b``, ``a = 1/b`` or ``a = 1``; these make scales one *unknown* or fix them. The others,
products, are solved by elimination, exactly. The unknowns that remain free are the units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_ecopt.symmetry.coupling import NO_UNIT, Coupling
from lightning_ecopt.symmetry.elimination import BoolArray, Powers, SparseEquations, Unknowns, eliminate, simplify
from lightning_ecopt.symmetry.equations import Equations, Use
from lightning_ecopt.symmetry.labels import FIXED, ZERO, IntArray, constant
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.regions import overlap, without
from lightning_ecopt.symmetry.scales import Operation


@dataclass(frozen=True, eq=False)
class Solution:
    """The units of a network, and how its parameters scale with them.

    Units are numbered in the order in which the parameters first meet them, and so are the products of powers of them.

    Args:
        couplings: how each region of a parameter scales.
        monomials: the scales that the couplings refer to.
        costs: for each operation that fixed scales the number of freedoms lost to it. If two operations fix the same
            scale, the first is charged.
        held: for each parameter that leads into values that are held fixed how many of them each operation holds.
    """

    couplings: list[Coupling]
    monomials: Monomials
    costs: Counter[Operation]
    held: dict[str, Counter[Operation]]


def solve(equations: Equations, trained: Collection[str] | None = None) -> Solution:
    """Solve the equations of traced calls.

    Args:
        equations: of all calls.
        trained: names of the parameters that may be rescaled, by default all; the others are held fixed.

    Example: ``Linear(3, 2), ReLU(), Linear(2, 1)``. The trace has the scales 1 and 2 for the outputs of the first
    layer and 3 for the output of the second. The ReLU adds no equation, and that the output must not change fixes scale
    3. So 1 and 2 become the units 0 and 1::

        scaling_group(net, x).couplings[0].incoming  # of 0.weight: tensor([[0], [1]])
    """
    unknowns = Unknowns(equations.num_scales)
    names = [name for name in equations.shapes if trained is None or name in trained]
    uses, agreements = _used_regions(equations, names)
    agreements += _frozen_sides(equations, names)
    _merge_equalities(unknowns, [*equations.equalities, *agreements])
    costs, charged = _charge_fixings(unknowns, equations)
    of_name: dict[str, list[Use]] = {name: [] for name in names}
    for name, use in uses:
        of_name[name].append(use)
    uses = [
        (name, use)
        for name, own in of_name.items()
        for use in [*own, *_left_out(own, equations.shapes[name], unknowns)]
    ]
    held = _held(uses, unknowns.number, charged, list(costs))
    labels = [np.where(ids == ZERO, FIXED, ids) for _, use in uses for ids in (use.incoming, use.outgoing)]
    visible = np.unique(np.concatenate([ids.ravel() for ids in labels])) if labels else np.empty(0, np.int64)
    powers = _eliminate_products(unknowns, equations, visible)

    # A parameter has an unknown as it is (an even code) or inverted (an odd one).
    codes = [2 * unknowns.number[ids] + (unknowns.sign[ids] < 0) for ids in labels]
    met = _in_order_of_appearance(codes, np.repeat(unknowns.among(visible), 2))
    number, monomials = _number_scales(met, powers, 2 * equations.num_scales)
    couplings = [
        Coupling(name, use.region, _unit_numbers(number[incoming]), _unit_numbers(number[outgoing]), use.additive)
        for (name, use), incoming, outgoing in zip(uses, codes[::2], codes[1::2], strict=True)
    ]
    return Solution(couplings, monomials, costs, held)


# From scales to unknowns ----------------------------------------------------------------------------------------------


def _merge_equalities(unknowns: Unknowns, equalities: Sequence[IntArray]) -> None:
    """Make scales that are equal one unknown, and fix the unknown of the scale ``FIXED``."""
    pairs = np.concatenate(equalities) if equalities else np.empty((0, 2), np.int64)
    unknowns.merge(pairs[:, 0], pairs[:, 1], np.ones(len(pairs), np.int64))
    unknowns.fixed[unknowns.number[FIXED]] = True


def _frozen_sides(equations: Equations, names: Sequence[str]) -> list[IntArray]:
    """Pairs of scales that are equal because the parameters other than those named are not rescaled."""
    pairs = []
    for name in equations.shapes.keys() - set(names):
        own = equations.uses.get(name, [])
        hidden, equal = _only_hidden(equations.hidden_uses.get(name, []), own)
        pairs += equal
        for use in [*own, *(replace(use, outgoing=constant(FIXED, use.outgoing.ndim)) for use in hidden)]:
            pairs += _both_sides(use)
    return pairs


def _both_sides(use: Use) -> list[IntArray]:
    """Pairs ``[N, 2]`` of scales that are equal if ``incoming / outgoing`` is one for every element of a region.

    ``a(i, k) = b(j, k)`` for all i, j and k follows from ``a(i, k) = b(J, k)`` and ``a(I, k) = b(j, k)`` for one I and
    one J, so that no pair is needed for each element of a matrix. I and J may depend on k.
    """
    incoming, outgoing = use.incoming, use.outgoing
    pairs = []
    for first, second in ((incoming, _one_of(outgoing, incoming)), (_one_of(incoming, outgoing), outgoing)):
        found = np.stack([ids.ravel() for ids in np.broadcast_arrays(first, second)], 1)
        pairs.append(found[(found != ZERO).all(1)])  # a zero fits any scale
    return pairs


def _one_of(ids: IntArray, other: IntArray) -> IntArray:
    """One scale of a label along the axes on which another does not change: no zero, unless there is nothing else."""
    return ids.max(axis=tuple(axis for axis, size in enumerate(other.shape) if size == 1), keepdims=True)


def _charge_fixings(unknowns: Unknowns, equations: Equations) -> tuple[Counter[Operation], IntArray]:
    """Fix what operations hold fixed, in the order of the call.

    Returns:
        For each operation the number of unknowns that were still free before; and for each unknown the number of the
        operation among them, -1 if there is none, ``int[N]``.
    """
    costs: Counter[Operation] = Counter()
    charged = np.full(len(unknowns.fixed), -1)
    for operation, ids in equations.fixings:
        lost = np.unique(unknowns.number[ids[ids > FIXED]])
        lost = lost[~unknowns.fixed[lost]]
        unknowns.fixed[lost] = True
        if len(lost):
            costs[operation] += len(lost)
            charged[lost] = list(costs).index(operation)
    return costs, charged


def _held(
    uses: Iterable[tuple[str, Use]], number: IntArray, charged: IntArray, operations: Sequence[Operation]
) -> dict[str, Counter[Operation]]:
    """Count for each parameter the values that it leads into and that an operation holds fixed, by operation.

    Args:
        uses: of the parameters.
        number: by scale, its unknown.
        charged: by unknown, the number of the operation that has fixed it, or -1.
        operations: by that number.
    """
    into: dict[str, list[IntArray]] = {}
    for name, use in uses:
        into.setdefault(name, []).append(number[use.incoming[use.incoming > FIXED]])
    held = {}
    for name, unknowns in into.items():
        by = charged[np.unique(np.concatenate(unknowns))]
        found = np.unique(by[by >= 0], return_counts=True)
        if len(found[0]):
            held[name] = Counter({operations[at]: int(count) for at, count in zip(*found, strict=True)})
    return held


def _eliminate_products(unknowns: Unknowns, equations: Equations, visible: IntArray) -> dict[int, Powers]:
    """Solve the remaining equations; returns each unknown that is not free as powers of free ones."""
    rows, solved = simplify(SparseEquations.of(equations), unknowns, visible)
    return eliminate(rows, solved, unknowns.among(visible))


# Regions of parameters ------------------------------------------------------------------------------------------------


def _used_regions(equations: Equations, names: Sequence[str]) -> tuple[list[tuple[str, Use]], list[IntArray]]:
    """List all uses of the named parameters with the name, in that order; and pairs of scales that must agree."""
    uses: list[tuple[str, Use]] = []
    agreements: list[IntArray] = []
    for name in names:
        shape, own = equations.shapes[name], equations.uses.get(name, [])
        hidden, pairs = _only_hidden(equations.hidden_uses.get(name, []), own)
        uses += [(name, use) for use in _completed([*own, *hidden], shape)]
        agreements += pairs
    return uses, agreements


def _only_hidden(hidden: list[Use], own: list[Use]) -> tuple[list[Use], list[IntArray]]:
    """The uses by zeros of elements that have no other use, and pairs of scales that must agree.

    The output of this call would stay for any factors of such elements, as they are multiplied by zeros. But the zeros
    may be the initial state of what other calls give another state. So the elements scale as if they met a constant:
    with the output, and by nothing else.
    """
    kept: list[Use] = []
    pairs: list[IntArray] = []
    for use in hidden:
        same = next((other for other in kept if other.region == use.region), None)
        if same is not None:
            pairs.append(np.stack(np.broadcast_arrays(same.incoming, use.incoming), -1).reshape(-1, 2))
        elif not any(overlap(other.region, use.region) for other in [*own, *kept]):
            kept.append(use)
    return kept, pairs


def _completed(uses: list[Use], shape: tuple[int, ...]) -> list[Use]:
    """Extend the only use of a parameter to all of it, along axes on which its scales do not change.

    So a table of positions is rescaled as a whole, although the example may be short and use its first rows only.
    """
    if len(uses) != 1:
        return uses
    (use,) = uses
    alike = [use.incoming.shape[axis] == use.outgoing.shape[axis] == 1 for axis in range(len(shape))]
    region = tuple(
        slice(0, size, 1) if same else part for size, same, part in zip(shape, alike, use.region, strict=True)
    )
    return [replace(use, region=region)]


def _left_out(uses: list[Use], shape: tuple[int, ...], unknowns: Unknowns) -> list[Use]:
    """Uses of the elements that an example has passed over along the one axis on which the uses differ.

    A loop over experts passes over those that no row chooses. Another example may choose them: then they meet what the
    others meet, and make hidden units of their own, which are held fixed.
    """
    pairs = [(first, [use.region[axis] for use in uses]) for axis, first in enumerate(uses[0].region)] if uses else []
    axes = [axis for axis, (first, parts) in enumerate(pairs) if any(part != first for part in parts)]
    sides = [[use.incoming for use in uses], [use.outgoing for use in uses]]
    if len(axes) != 1 or any(ids.shape[axes[0]] > 1 for side in sides for ids in side):
        return []
    region = list(uses[0].region)
    region[axes[0]] = slice(0, shape[axes[0]], 1)
    rest = [tuple(region)]
    for use in uses:
        shared = [(part, overlap(part, use.region)) for part in rest]
        rest = [piece for part, common in shared for piece in ([part] if common is None else without(part, common))]
    fixed = constant(FIXED, len(shape))
    codes = [[2 * unknowns.number[ids] + (unknowns.sign[ids] < 0) for ids in side] for side in sides]
    incoming, outgoing = (
        side[0] if all(np.array_equal(own[0], other) for other in own) else fixed
        for side, own in zip(sides, codes, strict=True)
    )
    return [replace(uses[0], region=part, incoming=incoming, outgoing=outgoing) for part in rest]


# From unknowns to units -----------------------------------------------------------------------------------------------


def _in_order_of_appearance(codes: Sequence[IntArray], wanted: BoolArray) -> list[int]:
    """List the wanted codes, each once, in the order in which the arrays have them."""
    seen = np.zeros_like(wanted)
    order = []
    for members in codes:
        found, first = np.unique(members, return_index=True)
        found = found[np.argsort(first)]
        found = found[wanted[found] & ~seen[found]]
        seen[found] = True
        order += found.tolist()
    return order


def _number_scales(met: Sequence[int], powers: dict[int, Powers], num_codes: int) -> tuple[IntArray, Monomials]:
    """Number the units, then the products of powers of them.

    A unit is the unknown, or the inverse of it, whichever parameters meet first. If they meet the other as well, that
    is a product with the exponent -1.

    Args:
        met: codes of unknowns in the order in which parameters meet them.
        powers: unknowns that are not free as powers of free ones.
        num_codes: number of codes.

    Returns:
        By code the number of the scale, ``NO_UNIT`` for what is fixed; and the scales.
    """
    order = [(code // 2, -1 if code % 2 else 1) for code in met]
    units: dict[int, int] = {}
    directions: dict[int, int] = {}
    for unknown, sign in order:
        if unknown not in powers and unknown not in units:
            units[unknown], directions[unknown] = len(units), sign
    number = np.full(num_codes, NO_UNIT, dtype=np.int64)
    products: list[int] = []
    factors: list[int] = []
    exponents: list[float] = []
    count = len(units)
    for code, (unknown, sign) in zip(met, order, strict=True):
        if directions.get(unknown) == sign:
            number[code] = units[unknown]
            continue
        terms = powers.get(unknown, {unknown: 1})
        if not terms:
            continue  # the elimination has found it fixed
        number[code] = count
        products += [count] * len(terms)
        factors += [units[free] for free in terms]
        exponents += [float(sign * directions[free] * power) for free, power in terms.items()]
        count += 1
    columns = np.array(products, np.int64), np.array(factors, np.int64), np.array(exponents, np.float64)
    # Not torch.tensor: a user may have set another default device, such as "meta".
    return number, Monomials(len(units), count, *map(torch.from_numpy, columns))


def _unit_numbers(numbers: IntArray) -> Tensor:
    """Turn the numbers of scales into a tensor; a matrix without any free scale is not written out."""
    if sum(size > 1 for size in numbers.shape) > 1 and (numbers == NO_UNIT).all():
        first = [slice(None)] + [slice(1)] * (numbers.ndim - 1)
        numbers = numbers[tuple(first)]
    return torch.from_numpy(numbers).to(torch.int32)
