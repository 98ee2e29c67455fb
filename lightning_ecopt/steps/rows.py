"""The rows of the parameters: vectors over them, and how these broadcast to the elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from math import prod

import torch
from torch import Tensor

from lightning_ecopt.common.parts import Part, lengths
from lightning_ecopt.common.runs import Runs
from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks, local, parts
from lightning_ecopt.common.tensors import Tensors, to_device
from lightning_ecopt.kernels import Kernels, Shapes
from lightning_ecopt.kernels.passes import Given, Product
from lightning_ecopt.symmetry.coupling import NO_UNIT, Coupling


class Rows:
    """All rows of some couplings, and where their elements are.

    A coupling says of a region of a parameter which units its elements lead into and out of: w_ij of a linear layer
    becomes w_ij c_i / c_j when unit i is rescaled by c_i and unit j by c_j. A *row* is all the elements of one
    parameter that lead into one unit, or into one value that is held fixed: row i of the weight of a linear layer, and
    one element of its bias. Vectors over the rows have length R.

    Where a row is not one contiguous slice, as in a grouped transposed convolution, it has several *places*: entries of
    the vectors that broadcast to the elements. There are P of them; P = R nearly always.

    Args:
        couplings: of a scaling group; couplings of parameters that are not among ``parameters`` are left out.
        parameters: by name; all on one device. If they are sharded, all ranks call methods that reduce together.

    Attributes:
        dtype: of vectors over the rows.
        device: of vectors over the rows.
        names: names of the N parameters that have rows; those without elements have none.
        covered: names of the parameters all of whose elements belong to rows.

    Example::

        rows = Rows(group.couplings, group.parameters)
        rows.reduced(EagerKernels(), "sums_and_squares", gradients)  # [2, R]
    """

    def __init__(self, couplings: Sequence[Coupling], parameters: Tensors) -> None:
        self._ranks = Ranks(parameters)
        self.device = device = local(next(iter(parameters.values()))).device
        widest = max((p.dtype for p in parameters.values()), key=lambda kind: torch.finfo(kind).bits)
        self.dtype = torch.promote_types(torch.float32, widest)
        self._couplings, self._order = couplings, list(parameters)
        self._kinds = [(p.dtype, local(p).device) for p in parameters.values()]
        all_rows = _all_rows(couplings, self._order)
        self.names = list(dict.fromkeys(own.coupling.parameter for own in all_rows))
        self._all_names = frozenset(self.names)
        self._counted = {name for name in self.names if self._ranks.counts(parameters[name])}

        self._sizes = Runs.of(_cat([own.sizes for own in all_rows], device).to(self.dtype))
        self._owners = _cat(
            [torch.tensor([self.names.index(own.coupling.parameter)], device="cpu") for own in all_rows], device
        )
        self._lengths = _cat([torch.tensor([len(own.units)], device="cpu") for own in all_rows], device)
        self._blocks = _Blocks.of(all_rows, parameters, device)
        self.covered = _covered(self.names, self._blocks.boxes, parameters)

    def __len__(self) -> int:
        return self._sizes.size

    @property
    def sizes(self) -> Tensor:
        """Numbers of elements on all ranks, ``[R]``. Found anew at each call."""
        return self._sizes.vectors()[0]

    @property
    def single(self) -> Tensor:
        """Whether a row is one element, as those of biases and gains are, ``bool[R]``. Found anew at each call."""
        return self.sizes == 1

    def fit(self, tensors: Tensors) -> bool:
        """Whether the parameters, given by name, still have the types and devices that they had."""
        return [(tensors[name].dtype, tensors[name].device) for name in self._order] == self._kinds

    def units(self) -> Tensor:
        """The unit that each row leads into, ``int32[R]``; ``NO_UNIT`` if it is held fixed. Found anew at each call."""
        all_rows = _all_rows(self._couplings, self._order)
        return _cat([own.units.clamp(min=NO_UNIT) for own in all_rows], self.device).to(torch.int32)

    def additive(self) -> Tensor:
        """Whether a row is added to what the unit's weights give, ``bool[R]``. Found anew at each call."""
        return self.where(lambda coupling: coupling.additive)

    def where(self, holds: Callable[[Coupling], bool]) -> Tensor:
        """Whether something holds for the coupling of a row, ``bool[R]``. Found anew at each call."""
        all_rows = _all_rows(self._couplings, self._order)
        return _cat([own.filled(holds(own.coupling)) for own in all_rows], self.device).to(torch.bool)

    def by_parameter(self, values: Tensor) -> Tensor:
        """Sums over the rows of each parameter: ``[N]`` from ``[R]``. Groups are formed anew at each call."""
        numbers = torch.arange(len(self.names), device=values.device)
        return SegmentSum(self.spread(numbers), len(self.names))(values)

    def present(self, tensors: Tensors) -> Tensor | None:
        """Which parameters have a tensor, ``bool[N]``; ``None`` if all have one."""
        if tensors.keys() >= self._all_names:
            return None
        return to_device(torch.tensor([name in tensors for name in self.names], device="cpu"), self.device)

    def spread(self, values: Tensor) -> Tensor:
        """What each parameter has, ``[N]``, for each of its rows: ``[R]``."""
        return values[self._owners].repeat_interleave(self._lengths, output_size=len(self))

    def whole_parameters(self) -> tuple[list[str], Shapes]:
        """Names of the parameters whose places are the rows, one after another, and the shapes of these places.

        There are none if rows are made of several places, a parameter is cut into several boxes, or ranks add up.
        """
        blocks = self._blocks
        is_so = blocks.row is None and not self._ranks.are_several and blocks.whole is not None
        return (blocks.whole or [], blocks.shapes) if is_so else ([], ())

    def reduced(self, kernels: Kernels, name: str, *tensors: Tensors) -> Tensor:
        """Sums over rows; zero where a tensor is missing.

        Args:
            kernels: make the pass.
            name: ``"sums_and_squares"`` or ``"products"``.
            *tensors: by parameter name.

        Returns:
            Over the rows, ``[2, R]`` or ``[1, R]``.
        """
        if len(self._counted) < len(self.names):  # one rank counts what every rank holds all of
            tensors = tuple({name: tensor for name, tensor in of.items() if name in self._counted} for of in tensors)
        complete = self._blocks.complete(tensors, self._all_names)
        count = 2 if name == "sums_and_squares" else 1
        found = torch.zeros(count, 0, dtype=self.dtype, device=self.device)
        if any(complete):
            lists, shapes = self._blocks.views(complete, tensors)
            found = getattr(kernels, name)(*lists, shapes, self.dtype)
        if not all(complete):
            num_places = self._blocks.num_places
            parts, found = found, found.new_zeros(count, sum(num_places))
            targets = compress(found.split(num_places, 1), complete)
            for target, part in zip(targets, parts.split(list(compress(num_places, complete)), 1), strict=True):
                target.copy_(part)
        return self._ranks.sum_(self._blocks.to_rows(found))

    def apply_(self, kernels: Kernels, name: str, *tensors: Tensors | None, **coefficients: Given) -> None:
        """Change the first tensors in place, where none of the tensors is missing.

        Args:
            kernels: make the pass.
            name: ``"affine_"``, ``"sgd_"`` or ``"adam_"``.
            *tensors: by parameter name; ``None`` is handed on.
            **coefficients: vectors over the rows, ``[R]``, numbers, or products; ``None`` is left out.
        """
        complete = self._blocks.complete([of for of in tensors if of is not None], self._all_names)
        if not any(complete):
            return
        lists, shapes = self._blocks.views(complete, tensors)

        def at_places(value: Tensor) -> Tensor:
            value = self._blocks.to_places(value)
            return value if all(complete) else torch.cat([*compress(value.split(self._blocks.num_places), complete)])

        given: dict[str, Given] = {}
        for key, value in coefficients.items():
            if isinstance(value, Product):
                given[key] = value.each(at_places)
            elif value is not None:
                given[key] = at_places(value) if isinstance(value, Tensor) and value.ndim == 1 else value
        getattr(kernels, name)(*lists, shapes=shapes, **given)


def _cat(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *parts]).to(device)


@dataclass(frozen=True)
class _CouplingRows:
    """The rows of one coupling.

    Args:
        coupling: whose region the rows fill.
        units: the unit that each row leads into, ``int64[r]``; numbers below zero, all different, if it is held fixed.
        row: the row that each place belongs to, 0 to r - 1, in a shape that broadcasts to the region.
        sizes: numbers of elements of the rows, ``int64[r]``.
    """

    coupling: Coupling
    units: Tensor
    row: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, coupling: Coupling) -> _CouplingRows:
        shape = lengths(coupling.region)
        places = (1,) * (len(shape) - coupling.incoming.ndim) + tuple(coupling.incoming.shape)
        if (
            len(shape) == 1 and not coupling.additive
        ):  # gains and slopes are rows by themselves, whatever they lead into
            places = shape
        units = coupling.incoming.expand(places).reshape(-1)
        # One unit may be met at several places: in a grouped transposed convolution, once for each input of the group.
        apart = torch.where(units < 0, -1 - torch.arange(len(units), device="cpu"), units)
        met, row, times = apart.unique(return_inverse=True, return_counts=True)
        if len(met) == len(units):  # keep the order of the elements
            met, row, times = units, torch.arange(len(units), device="cpu"), torch.ones_like(units)
        return cls(coupling, met, row.view(places), times * (prod(shape) // max(len(units), 1)))

    def filled(self, value: bool) -> Tensor:
        """The same for all rows, ``int64[r]``."""
        return torch.full_like(self.units, int(value))


def _all_rows(couplings: Sequence[Coupling], names: list[str]) -> list[_CouplingRows]:
    """The rows of the named parameters; first those with one element at each place, together no more than a vector."""
    own = [coupling for coupling in couplings if coupling.parameter in names]
    # What has no elements has no rows: their means would be 0 / 0.
    found = [_CouplingRows.of(coupling) for coupling in own if 0 not in lengths(coupling.region)]

    def order(rows: _CouplingRows) -> tuple[bool, int, int]:
        region = rows.coupling.region
        return rows.row.shape != lengths(region), names.index(rows.coupling.parameter), region[0].start

    return sorted(found, key=order)


@dataclass(frozen=True)
class _Box:
    """A box-shaped part of what this rank has of a parameter.

    Args:
        parameter: its name.
        part: where the box is in the local tensor; ``None`` for all of it.
        shape: one number for each place, in a shape that broadcasts to the box.
    """

    parameter: str
    part: Part | None
    shape: tuple[int, ...]

    def view(self, tensor: Tensor) -> Tensor:
        """The box in a local tensor of the parameter."""
        return tensor if self.part is None else self.part.view(tensor)


@dataclass(frozen=True)
class _Blocks:
    """The boxes that kernels work on, and the way from their P places to the R rows.

    Args:
        boxes: in the order of their places.
        num_places: of each box.
        row: the row of each place, ``int64[P]``; ``None`` if it is place after place the next row.
        merge: sums over the places of each row; ``None`` if ``row`` is.
    """

    boxes: list[_Box]
    num_places: list[int]
    row: Tensor | None
    merge: SegmentSum | None

    @classmethod
    def of(cls, all_rows: Sequence[_CouplingRows], parameters: Tensors, device: torch.device) -> _Blocks:
        """Cut the rows to what is on this rank, and join the boxes of a parameter where they follow each other."""
        pieces: dict[str, list[tuple[Part, Tensor]]] = {own.coupling.parameter: [] for own in all_rows}
        first = 0
        for own in all_rows:
            name = own.coupling.parameter
            here = parts(own.coupling.region, parameters[name])
            pieces[name] += [(part, first + part.cut(own.row)) for part in here]
            first += len(own.units)
        found = []
        for name, of in pieces.items():
            shape = local(parameters[name]).shape
            found += [(_Box(name, part, tuple(row.shape)), row) for part, row in _joined(of, shape)]
        found.sort(key=lambda pair: prod(pair[0].shape) < pair[0].view(local(parameters[pair[0].parameter])).numel())
        boxes = [box for box, _ in found]
        row = _cat([row.reshape(-1) for _, row in found], device)
        in_order = len(row) == first and bool((row == torch.arange(first, device=device)).all())
        return cls(
            boxes,
            [prod(box.shape) for box in boxes],
            None if in_order else row,
            None if in_order else SegmentSum(row, first),
        )

    @cached_property
    def shapes(self) -> Shapes:
        """Of the places of all boxes."""
        return tuple(box.shape for box in self.boxes)

    @cached_property
    def whole(self) -> list[str] | None:
        """Names of the parameters, if all boxes are whole ones."""
        return [box.parameter for box in self.boxes] if all(box.part is None for box in self.boxes) else None

    def complete(self, tensors: Sequence[Tensors], names: frozenset[str]) -> list[bool]:
        """Which boxes have all tensors; ``names`` are the parameters of all boxes."""
        if all(of.keys() >= names for of in tensors):
            return [True] * len(self.boxes)
        return [all(box.parameter in of for of in tensors) for box in self.boxes]

    def views(
        self, complete: list[bool], tensors: Sequence[Tensors | None]
    ) -> tuple[list[list[Tensor] | None], Shapes]:
        """The boxes in each of the tensors, and the shapes of their places."""
        if all(complete) and self.whole is not None:
            return [None if of is None else [of[name] for name in self.whole] for of in tensors], self.shapes
        boxes = self.boxes if all(complete) else list(compress(self.boxes, complete))
        lists = [None if of is None else [box.view(of[box.parameter]) for box in boxes] for of in tensors]
        return lists, self.shapes if boxes is self.boxes else [box.shape for box in boxes]

    def to_rows(self, values: Tensor) -> Tensor:
        """Sums over the places of each row, ``[..., R]`` from ``[..., P]``."""
        return values if self.merge is None else self.merge(values)

    def to_places(self, values: Tensor) -> Tensor:
        """What each row has, ``[R]``, at its places, ``[P]``."""
        return values if self.row is None else values[self.row]


def _covered(names: Sequence[str], boxes: Sequence[_Box], parameters: Tensors) -> set[str]:
    """Names of the parameters all of whose elements here are in boxes, which never overlap."""
    elements = dict.fromkeys(names, 0)  # a rank that holds nothing of a parameter lacks nothing of it
    for box in boxes:
        elements[box.parameter] += box.view(local(parameters[box.parameter])).numel()
    empty = {name for name, parameter in parameters.items() if parameter.numel() == 0}
    return empty | {name for name, count in elements.items() if count == local(parameters[name]).numel()}


def _joined(pieces: Sequence[tuple[Part, Tensor]], shape: Sequence[int]) -> Sequence[tuple[Part | None, Tensor]]:
    """The pieces; or, if they make up the parameter one after another along its first axis, the whole of it."""
    if not shape or any(part.folded is not None for part, _ in pieces):
        return pieces
    sizes = [lengths(part.region) for part, _ in pieces]
    starts = [part.region[0].start for part, _ in pieces]
    one_kind = len({row.shape[1:] for _, row in pieces}) == 1
    by_rows = len(pieces) == 1 or all(len(row) == size[0] for size, (_, row) in zip(sizes, pieces, strict=True))
    whole = all(size[1:] == tuple(shape[1:]) for size in sizes) and sum(size[0] for size in sizes) == shape[0]
    dense = all(at.step == 1 for part, _ in pieces for at in part.region) and starts == sorted(starts)
    if not (one_kind and by_rows and whole and dense):
        return pieces
    return [(None, torch.cat([row for _, row in pieces]))]
