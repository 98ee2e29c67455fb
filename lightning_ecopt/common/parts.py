"""Which elements of a tensor one rank holds, and where they are in its memory: boxes.

A rank may hold some positions along each axis of a tensor (:class:`Grid`), or a range of the flattened tensor
(:class:`FlatPiece`). Either way, what it holds of a box-shaped *region* of the tensor is some boxes, each of them a
view of the local memory: :class:`Part`. All of this is arithmetic on integers; nothing here knows of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_ecopt.common.tensors import region_of


def lengths(region: Sequence[slice]) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple(len(range(part.start, part.stop, part.step)) for part in region)


class Folded(NamedTuple):
    """A range of a local tensor of one axis, seen as a box.

    Args:
        at: the range.
        shape: of the box, which has as many elements.
    """

    at: slice
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One box of what a rank holds of a region.

    Args:
        places: the positions along each axis of the region.
        region: slices of the local tensor, one for each axis of the region.
        folded: if the local tensor is flat, the range of it that ``region`` cuts.

    Example: of a parameter of shape ``[8, 3]`` that two ranks share, the second one holds rows 4 to 7. Of the region
    ``[2:6, :]`` it has ``region=[0:2, 0:3]`` of its local tensor, which are ``places=[2:4, 0:3]`` of the region.
    """

    places: tuple[slice, ...]
    region: tuple[slice, ...]
    folded: Folded | None = None

    @classmethod
    def whole(cls, region: tuple[slice, ...]) -> Part:
        """All of a region, where this rank holds the whole tensor."""
        return cls(tuple(slice(0, length, 1) for length in lengths(region)), region)

    def view(self, tensor: Tensor) -> Tensor:
        """Return the box in a local tensor as a view: in a weight, its gradient, or the state of an optimizer."""
        if self.folded is not None:
            tensor = tensor[self.folded.at].view(self.folded.shape)
        return region_of(tensor, self.region)

    def cut(self, values: Tensor) -> Tensor:
        """Cut ``values``, which broadcast to the whole region, to what broadcasts to this box."""
        own = self.places[len(self.places) - values.ndim :]
        return values[tuple(at if size > 1 else slice(None) for at, size in zip(own, values.shape, strict=True))]

    def share(self, values: Tensor, region: Sequence[slice]) -> float:
        """Return the share of the elements of the region at one entry of ``values`` that is in this box.

        Args:
            values: broadcast to the whole ``region``.
            region: what this is a part of.

        Example: rows of a region ``[2, 6]`` have ``values`` of shape ``[2, 1]``. A box with two of the six columns has
        a third of each row.
        """
        sizes = (1,) * (len(region) - values.ndim) + tuple(values.shape)
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
        here, there = lengths(self.places), lengths(region)
        return prod(here[axis] for axis in axes) / max(prod(there[axis] for axis in axes), 1)


class Layout(Protocol):
    """Which elements of a tensor a rank holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the local tensor."""

    def parts(self, region: Sequence[slice]) -> list[Part]:
        """Return what the rank holds of a region, in boxes that do not overlap; none if that is nothing.

        Args:
            region: slices of the whole tensor, with a start, a stop and a positive step.
        """


class Run(NamedTuple):
    """Neighbours along one axis of a tensor that are neighbours on this rank, too.

    Args:
        here: the first of them in the local tensor.
        start: the first of them in the whole tensor.
        length: how many there are.
    """

    here: int
    start: int
    length: int

    def within(self, part: slice) -> tuple[slice, slice] | None:
        """What there is of a slice of the axis: places in the slice, and a slice of the local tensor."""
        places = range(part.start, part.stop, part.step)
        ends = (self.start, self.start + self.length)
        low, high = (min(max(-((part.start - end) // part.step), 0), len(places)) for end in ends)
        if low == high:
            return None
        shift = self.here - self.start
        return slice(low, high, 1), slice(places[low] + shift, places[high - 1] + shift + 1, part.step)


def _boxes(runs: Iterable[Sequence[Run]], region: Sequence[slice], folded: Folded | None = None) -> list[Part]:
    """The parts of a region where runs along its axes meet."""
    of_axes = [
        [cut for run in own if (cut := run.within(part)) is not None] for own, part in zip(runs, region, strict=True)
    ]
    return [
        Part(tuple(places for places, _ in cuts), tuple(here for _, here in cuts), folded) for cuts in product(*of_axes)
    ]


# Cut along axes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A cut of one axis into as many chunks as ``torch.chunk`` makes, of which a rank holds one.

    Args:
        axis: which axis is cut.
        count: number of ranks, each with a chunk; the last chunks may be shorter, or empty.
        number: of this rank's chunk.
        stride: the axis is first cut into so many pieces, each of which is cut into chunks. The rank has one chunk of
            each piece.
    """

    axis: int
    count: int
    number: int
    stride: int = 1


@dataclass(frozen=True)
class Grid:
    """Some positions along each axis of a tensor.

    Args:
        shape: of the whole tensor.
        runs: of each axis, in the order of the local tensor.

    Example::

        Grid.of((8, 6), [Cut(1, count=2, number=1)]).runs  # ((Run(0, 0, 8),), (Run(0, 3, 3),))
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, shape: Sequence[int], cuts: Iterable[Cut]) -> Grid:
        """What is left of a tensor after some cuts, one after another."""
        runs = [[Run(0, 0, length)] for length in shape]
        for cut in cuts:
            runs[cut.axis] = _chunk(runs[cut.axis], cut)
        return cls(tuple(shape), tuple(map(tuple, runs)))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """See :class:`Layout`."""
        return tuple(sum(run.length for run in own) for own in self.runs)

    def parts(self, region: Sequence[slice]) -> list[Part]:
        """See :class:`Layout`."""
        return _boxes(self.runs, region)


def _chunk(runs: Sequence[Run], cut: Cut) -> list[Run]:
    """What a cut leaves of an axis, of which ``runs`` are left so far."""
    found: list[Run] = []
    for start, stop in _chunks(0, sum(run.length for run in runs), cut.stride):
        low, high = _chunks(start, stop, cut.count)[cut.number]
        for run in runs:
            first, last = max(low, run.here), min(high, run.here + run.length)
            if first < last:
                _append(found, run.start + first - run.here, last - first)
    return found


def _chunks(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """The chunks of a range, of which the last may be shorter, or empty."""
    length = -((start - stop) // count)
    return [(min(start + k * length, stop), min(start + (k + 1) * length, stop)) for k in range(count)]


def _append(runs: list[Run], start: int, length: int) -> None:
    """Add neighbours behind others, to the last run if they follow it in the whole tensor, too."""
    if runs and runs[-1].start + runs[-1].length == start:
        runs[-1] = runs[-1]._replace(length=runs[-1].length + length)
    else:
        runs.append(Run(runs[-1].here + runs[-1].length if runs else 0, start, length))


# Cut out of a flattened tensor ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatPiece:
    """A range of the elements of a tensor in row-major order, in a local tensor of one axis.

    Args:
        shape: of the whole tensor.
        start: the first element.
        stop: behind the last element; equal to ``start`` if there is none.

    Example: elements 2 to 8 of a tensor of shape ``[4, 3]`` are the end of row 0, row 1 and the beginning of row 2::

        whole = (slice(0, 4, 1), slice(0, 3, 1))
        [part.places for part in FlatPiece((4, 3), 2, 8).parts(whole)]  # [0:1, 2:3], [1:2, 0:3], [2:3, 0:2]
    """

    shape: tuple[int, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= prod(self.shape):
            raise ValueError(f"a tensor of shape {list(self.shape)} has no elements {self.start} to {self.stop}")

    @property
    def local_shape(self) -> tuple[int, ...]:
        """See :class:`Layout`."""
        return (self.stop - self.start,)

    def parts(self, region: Sequence[slice]) -> list[Part]:
        """See :class:`Layout`: of d axes, at most 2 d - 1 boxes."""
        found, shape, at = [], self.shape or (1,), self.start
        while at < self.stop:
            # The largest slices (rows, channels, elements) that begin here, and how many of them follow each other.
            sizes = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            axis = next(k for k, size in enumerate(sizes) if at % size == 0 and at + size <= self.stop)
            corner = [at // size % length for size, length in zip(sizes, shape, strict=True)]
            count = min((self.stop - at) // sizes[axis], shape[axis] - corner[axis])
            extent = (*(1,) * axis, count, *shape[axis + 1 :])
            here = slice(at - self.start, at - self.start + count * sizes[axis])
            runs = [[Run(0, first, length)] for first, length in zip(corner, extent, strict=True)]
            found += _boxes(runs, region, Folded(here, extent))
            at += count * sizes[axis]
        return found
