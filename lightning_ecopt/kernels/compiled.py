"""The passes on a CPU, in C: each reads and writes memory once, in one call however deep the network is."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ecopt.kernels.clipping import CENTRING, FAINT, MEMORY, Clipping, RowGradients
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.library import load
from lightning_ecopt.kernels.lines import COLUMNS, DTYPES, LineKernels, Lines, Words, lines_and_rest
from lightning_ecopt.kernels.passes import Coefficient, Elements, Shapes, Views

#: An item has a 64th of all elements, but no fewer and no more than so many, unless lines are longer: few enough for
#: many threads, and enough for reading ahead. In columns it has so many lines.
LEAST, MOST, LINES = 1 << 14, 1 << 17, 1024
#: How many elements a thread must have to be worth its start.
FOR_A_THREAD = 1 << 16


class _Plan:
    """How to work on blocks of given shapes, strides and types; see :class:`~lightning_ecopt.kernels.lines.Plan`."""

    def __init__(self, lists: Sequence[Views], shapes: Shapes) -> None:
        blocks, starts, self.rest = lines_and_rest(Lines, lists, shapes)
        self.num_places = starts[-1]
        types = {k: lists[0][k].dtype for k in blocks}
        chosen = {dtype: [k for k in blocks if types[k] == dtype] for dtype in DTYPES}
        self.groups = {
            dtype: _Group(numbers, [blocks[k] for k in numbers], [starts[k] for k in numbers])
            for dtype, numbers in chosen.items()
            if numbers
        }


class _Group:
    """The blocks of one type, which one call works on.

    Args:
        numbers: of the blocks among all blocks of the pass.
        blocks: as lines.
        places: the first place of each.
    """

    def __init__(self, numbers: Sequence[int], blocks: Sequence[Lines], places: Sequence[int]) -> None:
        self._numbers = numbers
        self._blocks, self._items = array("q"), array("q")
        elements = sum(lines.count * lines.depth for lines in blocks)
        of_item = min(max(LEAST, elements // 64), MOST)
        for k, (lines, place) in enumerate(zip(blocks, places, strict=True)):
            self._blocks.extend([lines.kind == COLUMNS, lines.depth, lines.stride, lines.of_place, place])
            width = LINES if lines.kind == COLUMNS else of_item // lines.depth
            width = max(1, width // lines.of_place) * lines.of_place
            for first in range(0, lines.count, width):
                self._items.extend([k, first, min(first + width, lines.count)])
        self._most_threads = max(1, elements // FOR_A_THREAD)
        self.tables = (self._blocks.buffer_info()[0], self._items.buffer_info()[0], len(self._items) // 3)

    def addresses(self, lists: Sequence[Views]) -> array[int]:
        """Of the blocks in each list, block by block."""
        return array("q", [views[k].data_ptr() for k in self._numbers for views in lists])

    @property
    def threads(self) -> int:
        """How many threads work on it."""
        return min(self._most_threads, torch.get_num_threads())


class CompiledKernels(LineKernels[_Plan]):
    """Runs the passes in C, for tensors of float32 and float64. Sums of parts are added up in double.

    Raises:
        OSError: if the C file cannot be compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = load()

    def __reduce__(self) -> tuple[Callable[[], EagerKernels], tuple[()]]:
        return _compiled_or_eager, ()

    def _make_plan(self, lists: Sequence[Views], shapes: Shapes, count: int) -> _Plan:
        return _Plan(lists, shapes)

    def add(self, plan: _Plan, lists: Sequence[Views], count: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`."""
        asked, dtype = dtype, torch.float64 if torch.float64 in plan.groups else dtype
        found = torch.empty(count, plan.num_places, dtype=dtype, device="cpu")
        for kind, group in plan.groups.items():
            addresses = group.addresses(lists)
            self._library.sums[kind](
                *group.tables,
                addresses.buffer_info()[0],
                len(lists),
                found.data_ptr(),
                dtype == torch.float64,
                plan.num_places,
                self._threads(group),
            )
        return found.to(asked)

    def _change_(self, plan: _Plan, lists: Sequence[Views], coefficients: Mapping[str, Coefficient]) -> None:
        for kind, group in plan.groups.items():
            addresses = group.addresses(lists)
            words = Words.of(coefficients, kind, lists[0][0].device)
            given = array("q", words.kinds + words.words)
            self._library.update[kind](
                *group.tables,
                addresses.buffer_info()[0],
                len(lists),
                given.buffer_info()[0],
                self._threads(group),
            )

    def gather(self, tensors: Sequence[Tensor | None], elements: Elements, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        if not _are_plain(tensors, dtype):
            return super().gather(tensors, elements, dtype)
        found = torch.zeros(elements.size, dtype=dtype, device="cpu")
        self._copy_elements(tensors, elements, found, write=False)
        return found

    def scatter_(self, tensors: Sequence[Tensor | None], elements: Elements, values: Tensor) -> None:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        if not _are_plain(tensors, values.dtype):
            super().scatter_(tensors, elements, values)
            return
        self._copy_elements(tensors, elements, values.contiguous(), write=True)
        torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])

    def _copy_elements(self, tensors: Sequence[Tensor | None], elements: Elements, vector: Tensor, write: bool) -> None:
        addresses = array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        counts = array("q", elements.counts)
        sizes = array("q", [0 if tensor is None else tensor.numel() for tensor in tensors])
        outside = self._library.copy_elements[vector.dtype](
            len(tensors),
            addresses.buffer_info()[0],
            sizes.buffer_info()[0],
            counts.buffer_info()[0],
            elements.at.data_ptr(),
            elements.slots.data_ptr(),
            elements.at.dtype == torch.int64,
            vector.data_ptr(),
            write,
        )
        if outside:
            raise IndexError(f"{outside} of the elements are not in their tensors, whose sizes have changed")

    def clipping(self, gradients: RowGradients) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        sums, squares, second, weight, rows, present, rho = gradients
        present = None if present is None else present.to(sums)
        given = [sums, squares, second, weight, rows.size, rows.shift, present, rho]
        given = [None if vector is None else vector.contiguous() for vector in given]
        kept, found = torch.empty_like(sums.expand(2, -1)), torch.empty_like(sums.expand(3, -1))
        new_second, new_weight, scale, shift, relative = of = *kept.unbind(), *found.unbind()
        count = self._library.clipping[sums.dtype](
            len(sums),
            *(None if vector is None else vector.data_ptr() for vector in given),
            *(MEMORY, 2 - CENTRING, rows.slack, rows.tiny, FAINT),
            *(vector.data_ptr() for vector in of),
        )
        return Clipping(new_second, new_weight, scale, shift, None if rho is None else relative, count)

    def _threads(self, group: _Group) -> int:
        """The threads of a forked process are those of its parent, and do not answer."""
        return group.threads if os.getpid() == self._library.process else 1


def _are_plain(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether the elements of all tensors have a type, and follow each other in the order of their flat indices."""
    return all(tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()) for tensor in tensors)


def _compiled_or_eager() -> EagerKernels:
    """What a copy has, perhaps on a machine without a compiler."""
    try:
        return CompiledKernels()
    except OSError:
        return EagerKernels()
