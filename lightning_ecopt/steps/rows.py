"""The rows of the parameters: vectors over them, and how these broadcast to the elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from math import prod

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Part, Ranks, local
from lightning_ecopt.common.tensors import Tensors, to_device
from lightning_ecopt.kernels import Coefficient, Kernels, Shapes
from lightning_ecopt.symmetry.coupling import Coupling


@dataclass(frozen=True)
class Block:
    """A box-shaped part of what this rank has of a parameter.

    Args:
        parameter: its name.
        region: slices of that; ``None`` for all of it.
        shape: of one number for each *place*, which broadcasts to the box. A row has one place in it or several.
    """

    parameter: str
    region: tuple[slice, ...] | None
    shape: tuple[int, ...]

    def view(self, tensor: Tensor) -> Tensor:
        """The box in ``tensor``, which has the parameter's shape."""
        if self.region is None:
            return tensor
        return tensor.view(1)[self.region] if tensor.ndim == 0 else tensor[self.region]


class Rows:
    """All rows of some couplings, and where their elements are.

    A *row* is all the elements of one parameter that lead into one value: a unit, or an output that is held fixed.
    Vectors over the rows have length R.

    Args:
        couplings: of a scaling group; those of parameters that are not among ``parameters`` are left out.
        parameters: by name; all on one device. If they are sharded, all ranks call methods that reduce together.

    Attributes:
        dtype: of vectors over the rows.
        units: what each row leads into, ``int32[R]``; -1 for what is held fixed.
        sizes: numbers of elements, ``[R]``, on all ranks.
        additive: whether a row is added to what the unit's weights give, ``bool[R]``.
        single: whether a row has no direction of its own: it is one element, or added, ``bool[R]``.
        names: of the N parameters that have rows.
        covered: of those all of whose elements belong to rows.
        blocks: where the rows are.

    Example::

        rows = Rows(group.couplings, group.parameters)
        rows.reduced(EagerKernels(), "sums_and_squares", gradients)  # [2, R]
    """

    def __init__(self, couplings: Sequence[Coupling], parameters: Tensors) -> None:
        self._ranks = Ranks(parameters)
        self._device = local(next(iter(parameters.values()))).device
        widest = max((p.dtype for p in parameters.values()), key=lambda kind: torch.finfo(kind).bits)
        self.dtype = torch.promote_types(torch.float32, widest)
        own = [(c, *_rows_of(c)) for c in couplings if c.parameter in parameters]
        names = list(parameters)
        # Those with one element at each place come first: together they are no more than a vector.
        own.sort(
            key=lambda part: (
                part[2].shape != _lengths(part[0].region),
                names.index(part[0].parameter),
                part[0].region[0].start,
            )
        )
        self.names = list(dict.fromkeys(coupling.parameter for coupling, *_ in own))
        self._all_names = set(self.names)
        self._is_counted = {name: self._ranks.counts(parameters[name]) for name in self.names}
        pieces: dict[str, list[tuple[tuple[slice, ...], Tensor]]] = {name: [] for name in self.names}
        first = 0
        flags = [torch.zeros(2, 0, dtype=torch.bool)]
        for coupling, met, place, sizes in own:
            single = coupling.additive or bool((sizes == 1).all())
            flags.append(torch.tensor([[coupling.additive], [single]]).expand(2, len(met)))
            part = Part.of(coupling.region, parameters[coupling.parameter])
            if part is not None:
                pieces[coupling.parameter].append((part.region, first + part.cut(place)))
            first += len(met)
        self.units = self._cat([met.clamp(min=-1) for _, met, _, _ in own]).to(torch.int32)
        self.sizes = self._cat([sizes for *_, sizes in own]).to(self.dtype)
        self._owners = self._cat([torch.tensor([self.names.index(coupling.parameter)]) for coupling, *_ in own])
        self._lengths = self._cat([torch.tensor([len(met)]) for _, met, *_ in own])
        self.additive, self.single = torch.cat(flags, 1).to(self._device)
        blocks = []
        self.covered = set()
        for name, parts in pieces.items():
            shape = local(parameters[name]).shape
            if sum(prod(_lengths(region)) for region, _ in parts) == prod(shape):  # they do not overlap
                self.covered.add(name)
            blocks += [(Block(name, region, tuple(place.shape)), place) for region, place in _joined(parts, shape)]
        blocks.sort(key=lambda pair: prod(pair[0].shape) < pair[0].view(local(parameters[pair[0].parameter])).numel())
        self.blocks = [block for block, _ in blocks]
        place = self._cat([place.reshape(-1) for _, place in blocks])
        self._num_places = [prod(block.shape) for block in self.blocks]
        self._place: Tensor | None = None
        self._merge: SegmentSum | None = None
        if len(place) != first or bool((place != torch.arange(first, device=self._device)).any()):
            self._place, self._merge = place, SegmentSum(place, first)

    def _cat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(self._device)

    def forget(self) -> None:
        """Give up ``units`` and ``additive``, which nobody needs any more."""
        del self.units, self.additive

    def __len__(self) -> int:
        return len(self.sizes)

    def present(self, tensors: Tensors) -> Tensor | None:
        """Of which parameters there are tensors, ``bool[N]``; ``None`` if of all."""
        if tensors.keys() >= self._all_names:
            return None
        return to_device(torch.tensor([name in tensors for name in self.names]), self._device)

    def spread(self, values: Tensor) -> Tensor:
        """What each parameter has, ``[N]``, for each of its rows: ``[R]``."""
        return values[self._owners].repeat_interleave(self._lengths, output_size=len(self))

    def reduced(self, kernels: Kernels, name: str, *tensors: Tensors) -> Tensor:
        """Sums over rows; zero where there are no tensors.

        Args:
            kernels: that make the pass.
            name: ``"sums_and_squares"`` or ``"products"``.
            *tensors: by parameter name.

        Returns:
            Over the rows, ``[2, R]`` or ``[1, R]``.
        """
        count = 2 if name == "sums_and_squares" else 1
        counted: Sequence[Tensors] = tensors
        if not all(self._is_counted.values()):
            counted = [{name: tensor for name, tensor in of.items() if self._is_counted.get(name)} for of in tensors]
        here = self._here(counted)
        if any(here):
            lists, shapes = self._views(here, counted)
            found = getattr(kernels if all(here) else kernels.partial, name)(*lists, shapes, self.dtype)
        else:
            found = torch.zeros(count, 0, dtype=self.dtype, device=self._device)
        if not all(here):
            there = torch.zeros(count, sum(self._num_places), dtype=self.dtype, device=self._device)
            parts = list(compress(there.split(self._num_places, 1), here))
            for part, value in zip(parts, found.split(list(compress(self._num_places, here)), 1), strict=True):
                part.copy_(value)
            found = there
        if self._merge is not None:
            found = torch.stack([self._merge(values) for values in found])
        return self._ranks.sum_(found)

    def apply_(self, kernels: Kernels, name: str, *tensors: Tensors | None, **vectors: Coefficient | None) -> None:
        """Change the blocks of which there are all tensors in place.

        Args:
            kernels: that make the pass.
            name: ``"affine_"``, ``"sgd_"`` or ``"adam_"``.
            *tensors: by parameter name; ``None`` is handed on.
            **vectors: coefficients: over the rows, ``[R]``, or numbers; ``None`` is left out.
        """
        here = self._here([of for of in tensors if of is not None])
        if not any(here):
            return
        lists, shapes = self._views(here, tensors)
        given = {}
        for key, value in vectors.items():
            if isinstance(value, Tensor) and value.ndim == 1:
                value = value if self._place is None else value[self._place]
                if not all(here):
                    value = torch.cat(list(compress(value.split(self._num_places), here)))
            if value is not None:
                given[key] = value
        getattr(kernels if all(here) else kernels.partial, name)(*lists, shapes=shapes, **given)

    def _here(self, tensors: Sequence[Tensors]) -> list[bool]:
        if all(of.keys() >= self._all_names for of in tensors):
            return [True] * len(self.blocks)
        return [all(block.parameter in of for of in tensors) for block in self.blocks]

    def _views(self, here: list[bool], tensors: Sequence[Tensors | None]) -> tuple[list[list[Tensor] | None], Shapes]:
        blocks = list(compress(self.blocks, here))
        lists = [None if of is None else [block.view(of[block.parameter]) for block in blocks] for of in tensors]
        return lists, [block.shape for block in blocks]


def _rows_of(coupling: Coupling) -> tuple[Tensor, Tensor, Tensor]:
    """What the rows of a coupling lead into, which row each place belongs to, and how many elements the rows have.

    The second has a shape that broadcasts to the region. What is held fixed is -1 or, one number for each row, below.
    """
    shape = _lengths(coupling.region)
    whole = (1,) * (len(shape) - coupling.incoming.ndim) + tuple(coupling.incoming.shape)
    if len(shape) == 1 and not coupling.additive:  # gains and slopes, whatever they lead into
        whole = shape
    units = coupling.incoming.expand(whole).reshape(-1)
    # One unit may be met at several places: in a grouped transposed convolution, once for each input of the group.
    apart = torch.where(units < 0, -1 - torch.arange(len(units)), units)
    met, place, times = apart.unique(return_inverse=True, return_counts=True)
    if len(met) == len(units):
        met, place, times = units, torch.arange(len(units)), torch.ones_like(units)
    return met, place.view(whole), times * (prod(shape) // max(len(units), 1))


def _lengths(region: Sequence[slice]) -> tuple[int, ...]:
    return tuple(len(range(part.start, part.stop, part.step)) for part in region)


def _joined(
    pieces: Sequence[tuple[tuple[slice, ...], Tensor]], shape: Sequence[int]
) -> Sequence[tuple[tuple[slice, ...] | None, Tensor]]:
    """The pieces, or all of a parameter if they make it up one after another along its first axis."""
    if not shape:
        return pieces
    lengths = [_lengths(region) for region, _ in pieces]
    starts = [region[0].start for region, _ in pieces]
    one_kind = len({place.shape[1:] for _, place in pieces}) == 1
    rows = len(pieces) == 1 or all(len(place) == own[0] for own, (_, place) in zip(lengths, pieces, strict=True))
    whole = all(own[1:] == tuple(shape[1:]) for own in lengths) and sum(own[0] for own in lengths) == shape[0]
    dense = all(part.step == 1 for region, _ in pieces for part in region) and starts == sorted(starts)
    if not (one_kind and rows and whole and dense):
        return pieces
    return [(None, torch.cat([place for _, place in pieces]))]
