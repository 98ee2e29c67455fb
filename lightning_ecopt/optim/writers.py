"""Who else writes to the weights: a clamp, a norm constraint, copies from one weight to another, after each step.

Such a writer does not commute with balancing. A refresh moves weights beyond the clamp, the clamp moves them back, and
the function has jumped. So what the rows are just after a step is compared with what they are just before the next one,
in the steps after a refresh; the units of rows that somebody writes to again and again are held fixed.

What is no such writer:

- one that writes once: a checkpoint that is loaded, a layer that is initialised again, an average that is taken over;
- one that puts back what it has changed before the next step, as averages are swapped in for a validation;
- one that sets elements to zero, or multiplies a weight by a factor of its own: masks and weight decay commute with
  rescaling.

The sums of squares of rows show that something was written, for one pass over the weights. In the next comparison there
is a copy of these weights, which shows what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import ClassVar, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import Ranks, local
from lightning_ecopt.common.sides import Sides
from lightning_ecopt.common.tensors import alike, are_few, listing, pieces, stacked, sums_of_pieces, widest
from lightning_ecopt.common.warn import warn
from lightning_ecopt.kernels import EagerKernels, Kernels
from lightning_ecopt.optim.binding import Network
from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.coupling import NO_UNIT, LocalCoupling, sides_of
from lightning_ecopt.symmetry.scales import Operation

#: What the report says of units that are held for this reason.
WRITTEN = Operation("somebody else writes to the weights", "")
WARNING = (
    "Somebody else writes to {} after each step (a clamp, a norm constraint, copies of other weights, rounding). That "
    "undoes what a rescaling does, so that the function would jump at each refresh: {} of {} units are held fixed from "
    "now on. To keep these units, let the forward call do what is done after the step, with "
    "torch.nn.utils.parametrize: there it is traced. A target that follows other weights is to be frozen, "
    "requires_grad_(False), or given by followers=."
)
#: So many times the weights are compared after a refresh.
GAPS = 3
#: Two factors of a weight decay differ by no more than this between two steps, as in the warm-up of its rate.
DECAYS_ALIKE = 3.0


_lock = Lock()


class Refreshed(Protocol):
    """The stage of an optimizer after a refresh."""

    @property
    def network(self) -> Network:
        """The group and the optimizer's part in it."""

    @property
    def active(self) -> Tensor:
        """The units that are rescaled, ``bool[H]``."""


@dataclass(frozen=True, eq=False)
class _Region:
    """A region of a weight of the optimizer, on this rank.

    Args:
        coupling: how it scales, on the device of the weight.
        weight: all that this rank holds of the weight, in its memory.
        tolerance: relative change of a row that may be rounding, as where a change is taken back by a subtraction.
    """

    coupling: LocalCoupling
    weight: Tensor
    tolerance: float

    @classmethod
    def of(cls, coupling: LocalCoupling, parameter: Tensor) -> _Region:
        weight = local(parameter.detach())
        return cls(coupling.to(weight.device), weight, min(16 * torch.finfo(weight.dtype).eps, 0.03))

    @property
    def shape(self) -> torch.Size:
        return self.coupling.view(self.weight).shape

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """The scales of both sides, with all axes of the region."""
        return self.coupling.sides

    @property
    def entries(self) -> int:
        """Number of entries of both sides."""
        return self.coupling.incoming.numel() + self.coupling.outgoing.numel()

    def sums(self, of: Callable[..., Tensor], other: Tensor) -> list[Tensor]:
        """Sum a function of the elements of the weight and of another for each entry of either side."""
        return self._sums([side.shape for side in self.sides], of, other)

    def slices(self) -> list[Tensor]:
        """Sum the squares of the slices along each axis, such as rows and columns, and of all elements."""
        axes = range(len(self.shape) + 1)
        shapes = [[n if axis == k else 1 for k, n in enumerate(self.shape)] for axis in axes]
        return self._sums(shapes, torch.square)

    def _sums(self, shapes: Sequence[Sequence[int]], of: Callable[..., Tensor], *others: Tensor) -> list[Tensor]:
        views = [self.coupling.view(weight) for weight in (self.weight, *others)]
        dtype = widest(self.weight.device)
        rows = pieces(views[0], "step")
        return sums_of_pieces(lambda piece: of(*(view[piece].to(dtype) for view in views)), shapes, rows)


def _squares_by_operations(regions: Sequence[_Region]) -> Tensor:
    """Sum the squares for each entry of both sides of all regions, ``[E]``, as exactly as the weights are."""
    if not regions:
        return torch.zeros(0, device="cpu")
    views = {number: region.coupling.view(region.weight) for number, region in enumerate(regions)}
    shapes = [[side.shape for side in region.sides] for region in regions]
    kinds = {k: (view.shape, view.dtype, *shapes[k]) for k, view in views.items()}
    found: dict[int, Tensor] = {}
    for numbers in alike(kinds, together=are_few(views.values())):
        several = stacked([views[k] for k in numbers])
        dtype = torch.promote_types(several.dtype, torch.float32)

        def squares(rows: slice, weights: Tensor = several, dtype: torch.dtype = dtype) -> Tensor:
            return weights[:, rows].to(dtype).square()

        sides = sums_of_pieces(squares, shapes[numbers[0]], pieces(several[0], "step"))
        found |= zip(numbers, torch.cat([side.flatten(1) for side in sides], 1), strict=True)
    return torch.cat([found[number] for number in views])


def _tolerance(regions: Sequence[_Region], sums: Tensor) -> Tensor | float:
    """The relative change of a sum of squares that may be rounding: a number, or ``[E]`` if there are several types."""
    bounds = {2 * region.tolerance for region in regions}
    if len(bounds) == 1:
        return bounds.pop()
    return torch.cat([sums.new_full((region.entries,), 2 * region.tolerance) for region in regions])


def _by_region(values: Tensor, regions: Sequence[_Region]) -> list[list[Tensor]]:
    """Cut ``values [E]`` into those of the entries of either side of each region."""
    sides = [region.sides for region in regions]
    parts = iter(values.split([side.numel() for both in sides for side in both]))
    return [[next(parts).view(side.shape) for side in both] for both in sides]


@dataclass(frozen=True, eq=False)
class _Note:
    """The weights just after a step.

    Args:
        stage: of the optimizer.
        gap: the number of the step after the refresh, from 1.
        regions: of its weights.
        sums: of squares, of the entries of both sides of all regions, ``[E]``.
        copies: of the weights that somebody may write to, by name.
    """

    stage: Refreshed
    gap: int
    regions: Sequence[_Region]
    sums: Tensor
    copies: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Finding:
    """What has changed in a region between two steps.

    Args:
        region: where.
        changed: the entries of both sides that have been written to.
        is_sure: whether it is known that the writer does not commute with rescaling.
    """

    region: _Region
    changed: Sequence[Tensor]
    is_sure: bool

    def has_changes(self) -> bool:
        """Whether any entry has been written to."""
        return any(bool(entries.any()) for entries in self.changed)

    def touched(self, like: Tensor) -> Tensor:
        """Of parts of the region, those with elements that have been written to."""
        marks = torch.ones(self.region.shape, dtype=torch.bool, device=like.device)
        for entries in self.changed:
            if entries.numel() > 1 and bool(entries.any()):
                marks &= entries
        return _any_over([marks], like)


class Writers:
    """Watches, for one optimizer, whether somebody else writes to its weights again and again.

    Example::

        writers.note(stage, steps_since_refresh=1)  # just after a step
        units = writers.written(stage)  # just before the next one: bool[H] if some are to be held fixed, else None
    """

    #: Those that have noted weights, which another optimizer may move.
    _noting: ClassVar[WeakSet[Writers]] = WeakSet()

    def __init__(self) -> None:
        self._noted: _Note | None = None
        self._known: set[str] = set()  # parameters of which it is known
        self._begin(None)

    def _begin(self, group: ScalingGroup | None) -> None:
        """Forget what was found, in another group."""
        self._group = group
        self._couplings = [] if group is None else group.local_couplings
        self._last: Tensor | None = None  # units that were written to at the last look, if any were
        self._first: Tensor | None = None  # in the first gap after the last refresh
        self._suspects: set[str] = set()  # their parameters
        self._suspects_first: set[str] = set()
        self._factors: list[Tensor] | None = None  # of the regions at the last look, if something had changed
        self._sides: tuple[frozenset[str], Sides] | None = None  # of the optimizer's regions

    def forget(self) -> None:
        """What happens until the next step is known, and no writer's work."""
        if self._noted is not None:
            self._noted = None
            with _lock:
                self._noting.discard(self)

    def note(
        self,
        stage: Refreshed,
        steps_since_refresh: int,
        is_watched: bool = True,
        kernels: Callable[[], Kernels] = EagerKernels,
    ) -> None:
        """Note the weights just after a step, if it is one of the first after a refresh.

        Args:
            stage: of the optimizer.
            steps_since_refresh: at least 1.
            is_watched: whether weights are noted behind this refresh.
            kernels: returns what adds up, if it can.
        """
        if self._noting:  # most steps are far behind a refresh
            with _lock:
                others = [other for other in self._noting if other is not self]
            for other in others:
                other._has_stepped(stage.network)
        self.forget()
        if not is_watched or steps_since_refresh > GAPS or not bool(stage.active.any()):
            return
        group = stage.network.group
        if self._group is not group:
            self._begin(group)
        own = stage.network.parameters
        regions = [_Region.of(each, own[each.parameter]) for each in self._couplings if each.parameter in own]
        suspects = self._suspects | self._suspects_first | self._known
        copies = {region.coupling.parameter: region.weight for region in regions}
        self._noted = _Note(
            stage,
            steps_since_refresh,
            regions,
            self._squares(stage.network, regions, kernels()),
            {name: weight.clone() for name, weight in copies.items() if name in suspects},
        )
        with _lock:
            self._noting.add(self)

    def _squares(self, network: Network, regions: Sequence[_Region], kernels: Kernels) -> Tensor:
        """Sum the squares for each entry of both sides of all regions, ``[E]``; by kernels, if they can."""
        if self._sides is None or self._sides[0] != network.names:
            self._sides = network.names, sides_of(region.coupling for region in regions)
        weights = [region.weight for region in regions]
        sums = kernels.both_sides(self._sides[1], weights, weights, sign=1.0)
        if sums is None:
            return _squares_by_operations(regions)
        kinds = {weight.dtype for weight in weights}
        return sums[0].to(torch.float32 if kinds == {torch.float32} else torch.float64)

    def _has_stepped(self, other: Network) -> None:
        """Another optimizer has taken a step: perhaps with the same weights."""
        noted = self._noted
        if noted is None:
            return
        own = set(map(id, noted.stage.network.parameters.values()))
        if any(id(p) in own for p in other.parameters.values()):
            self.forget()

    def written(self, stage: object, kernels: Callable[[], Kernels] = EagerKernels) -> Tensor | None:
        """Find the units of rows that somebody writes to after each step, just before one; warns if there are any.

        Args:
            stage: of the optimizer. Nothing is compared with the weights of another stage.
            kernels: those of :meth:`note`.

        Returns:
            ``bool[H]``, or ``None`` if nothing is compared now.
        """
        noted = self._noted
        self.forget()
        if noted is None or noted.stage is not stage:
            return None
        parameters = noted.stage.network.parameters
        now = [_Region.of(region.coupling, parameters[region.coupling.parameter]) for region in noted.regions]
        if any(_kind(a.weight) != _kind(b.weight) for a, b in zip(now, noted.regions, strict=True)):
            return None
        sums = self._squares(noted.stage.network, now, kernels())
        held = self._judge(noted, self._find(noted, now, sums))
        self._factors = None
        if noted.copies or self._suspects:
            pairs = zip(_by_region(sums, now), _by_region(noted.sums, now), strict=True)
            self._factors = [(after[0].sum() / before[0].sum()).sqrt() for after, before in pairs]
        return held

    def _find(self, noted: _Note, regions: Sequence[_Region], sums: Tensor) -> list[_Finding]:
        """What has changed in each region since it was noted; nothing if none has. ``sums`` are the squares now."""
        if not regions:  # on this rank
            return []
        changed = (sums - noted.sums).abs() > _tolerance(regions, sums) * torch.maximum(sums, noted.sums)
        if not noted.copies and not bool(changed.any()):
            return []
        before, findings = _by_region(noted.sums, regions), []
        for number, (region, marks) in enumerate(zip(regions, _by_region(changed, regions), strict=True)):
            copy = noted.copies.get(region.coupling.parameter)
            if copy is not None:
                last = None if self._factors is None else self._factors[number]
                marks = _harmed(region, copy, before[number], last)
            findings.append(_Finding(region, marks, is_sure=copy is not None))
        return findings

    def _judge(self, noted: _Note, findings: Sequence[_Finding]) -> Tensor:
        """The units, ``bool[H]``, of what is written again and again."""
        group, is_first = noted.stage.network.group, noted.gap == 1
        sure = [each for each in findings if each.is_sure]
        known = [each for each in sure if each.region.coupling.parameter in self._known]
        found, certain, again = Ranks(group.parameters).any_(_units(group, findings, sure, known))
        before = _or_none(self._last, found) | _or_none(self._first if is_first else None, found)
        if bool((again | (certain & before)).any()):  # and what is written to together is written to by the same
            held = Ranks(group.parameters).any_(certain | _tied(group, sure, findings))
            self._name([each for each in sure if each.has_changes()], held)
            return held
        self._last, self._suspects = None, set()
        if bool(found.any()):
            self._last = found
            self._suspects = {each.region.coupling.parameter for each in findings if each.has_changes()}
        if is_first:
            self._first, self._suspects_first = self._last, self._suspects
        return torch.zeros_like(found)

    def _name(self, written: Sequence[_Finding], held: Tensor) -> None:
        """Warn of the parameters of which it was not known that somebody writes to them."""
        names = dict.fromkeys(each.region.coupling.parameter for each in written)
        if names.keys() - self._known:
            warn(WARNING.format(listing(list(names)), int(held.sum()), len(held)))
        self._known |= names.keys()

    def __reduce__(self) -> tuple[type[Writers], tuple[()]]:  # a copy begins with other weights
        return Writers, ()


def _kind(weight: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return weight.dtype, weight.device, weight.shape


def _or_none(units: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if units is None else units


def _units(group: ScalingGroup, *several: Sequence[_Finding]) -> Tensor:
    """The units of the entries that have changed, ``bool[H]`` for each list of findings."""
    return torch.stack([_units_of(group, [(each.region, each.changed) for each in of]) for of in several])


def _units_of(group: ScalingGroup, entries: Sequence[tuple[_Region, Sequence[Tensor]]]) -> Tensor:
    """The units of the marked entries of regions, ``bool[H]``."""
    if not entries:
        return torch.zeros(group.num_units, dtype=torch.bool, device="cpu")
    device, size = entries[0][0].weight.device, group.monomials.num_scales + 1  # the last for NO_UNIT
    numbers = torch.cat([side.reshape(-1) for region, _ in entries for side in region.sides])
    marks = torch.cat([side.reshape(-1) for _, marked in entries for side in marked])
    scales = torch.zeros(size, dtype=torch.bool, device=device)
    scales[numbers.where(marks, NO_UNIT)] = True
    return group.monomials.in_(scales.cpu()[:-1])


def _harmed(region: _Region, copy: Tensor, before: Sequence[Tensor], last: Tensor | None) -> list[Tensor]:
    """The entries with elements that have changed to what does not commute with rescaling.

    Args:
        region: with the weights now.
        copy: of the weight before.
        before: the sums of squares then.
        last: the factor by which the weight was multiplied between the two steps before, if it is known.
    """

    def at_nonzero(of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return region.sums(lambda now, old: torch.where(now != 0, of(now, old), 0), copy)

    square, bound = at_nonzero(lambda now, old: old.square())[0].sum(), region.tolerance**2
    factor = at_nonzero(lambda now, old: now * old)[0].sum() / square
    rest = at_nonzero(lambda now, old: (now - factor * old).square())[0].sum()
    is_decay = (factor < 1) & (rest <= bound * square)
    if last is None:
        is_decay = torch.zeros_like(is_decay)
    else:  # not a norm that is restored, for which a refresh makes a difference
        shorter, longer = torch.aminmax(torch.stack([1 - factor, 1 - last]))
        is_decay &= longer <= DECAYS_ALIKE * shorter
    changes = at_nonzero(lambda now, old: (now - old).square())
    return [(change > bound * square) & ~is_decay for change, square in zip(changes, before, strict=True)]


def _tied(group: ScalingGroup, written: Sequence[_Finding], findings: Sequence[_Finding]) -> Tensor:
    """The units of what is equal to what somebody has written, ``bool[H]``: it may have been copied from there.

    Slices along each axis (rows, columns), and regions as a whole, are equal if their sums of squares are.
    """
    slices = {id(each): each.region.slices() for each in findings}
    touched = {id(each): [each.touched(like) for like in slices[id(each)]] for each in written if each.has_changes()}
    if not touched:  # on this rank
        return torch.zeros(group.num_units, dtype=torch.bool, device="cpu")
    parts = [_widened(sums[at]) for key in touched for sums, at in zip(slices[key], touched[key], strict=True)]
    copied = torch.cat(parts).unique()
    entries = []
    for each in findings:
        own, size = touched.get(id(each)), each.region.shape.numel()
        is_equal = [
            _is_in(sums, copied) if own is None else _is_in(sums, copied) & ~own[axis]
            for axis, sums in enumerate(slices[id(each)])
            if size > 1 and sums.numel() < size  # single elements may be equal by chance
        ]
        entries.append((each.region, [_any_over(is_equal, side) for side in each.region.sides]))
    return _units_of(group, entries)


def _widened(values: Tensor) -> Tensor:
    return values.cpu().to(torch.float64)


def _any_over(several: Iterable[Tensor], like: Tensor) -> Tensor:
    """Where any of several masks, which broadcast to a region, has a mark in the part of each entry of ``like``."""
    found = torch.zeros_like(like, dtype=torch.bool)
    for marks in several:
        for axis in range(marks.ndim):
            if like.shape[axis] == 1:
                marks = marks.any(axis, keepdim=True)
        found |= marks
    return found


def _is_in(values: Tensor, known: Tensor) -> Tensor:
    """Which of the values are among the known ones, which are sorted, to the rounding of sums."""
    if not len(known):
        return torch.zeros_like(values, dtype=torch.bool)
    here, near = _widened(values), 1e-12 if values.dtype == torch.float64 else 1e-5
    after = torch.searchsorted(known, here).clamp(max=len(known) - 1)
    distance = torch.minimum((known[after] - here).abs(), (known[(after - 1).clamp(min=0)] - here).abs())
    return ((distance <= near * here) & (here > 0)).to(values.device)
