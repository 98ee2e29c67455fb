"""The passes on a CPU, in C: each reads and writes memory once, in one call however deep the network is."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightning_ecopt.kernels.allocation import Allocated, Paths
from lightning_ecopt.kernels.clipping import CENTRING, FAINT, MEMORY, Clipping, RowGradients
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.library import load
from lightning_ecopt.kernels.lines import (
    COLUMNS,
    DTYPES,
    LineKernels,
    Lines,
    OfPass,
    Step,
    Words,
    count_changes,
    is_lazy,
    lines_and_rest,
)
from lightning_ecopt.kernels.passes import Elements, Shapes, Views

#: An item has a 64th of all elements, but no fewer and no more than so many, unless lines are longer: few enough for
#: many threads, and enough for reading ahead. In columns it has so many lines.
LEAST, MOST, LINES = 1 << 14, 1 << 17, 1024
#: How many elements a thread must have to be worth its start.
FOR_A_THREAD = 1 << 16
#: The vectors of a step over no more rows than these are kept from one step to the next.
KEPT_ROWS = 1 << 12


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
        # For single elements of the tensors.
        self.is_contiguous = all(view.is_contiguous() for views in lists for view in views)
        self.sizes = array("q", [view.numel() for view in lists[0]])

    def only_group(self, dtype: torch.dtype) -> _Group | None:
        """All blocks, if all are of one type."""
        return self.groups.get(dtype) if len(self.groups) == 1 and not self.rest else None


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
        self._known = _NOTHING
        self._kept: tuple[Tensor, Sequence[Tensor]] = torch.empty(3, 0, device="cpu"), ()

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
                len(lists),
                found.data_ptr(),
                dtype == torch.float64,
                plan.num_places,
                self._threads(group),
            )
        return found.to(asked)

    def _change_(self, plan: _Plan, lists: Sequence[Views], coefficients: OfPass) -> None:
        for kind, group in plan.groups.items():
            addresses = group.addresses(lists)
            words = Words.of(coefficients, kind, lists[0][0].device)
            given = words.table()
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
        sizes = array("q", [0 if tensor is None else tensor.numel() for tensor in tensors])
        counts = array("q", elements.counts)
        table = _elements_table(elements, sizes, counts)
        outside = self._library.copy_elements[vector.dtype](
            table.buffer_info()[0], addresses.buffer_info()[0], 1, vector.data_ptr(), write
        )
        _check_inside(outside)

    def clipping(self, gradients: RowGradients) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        sums, squares = gradients.sums.contiguous(), gradients.squares.contiguous()
        known, self._known = _Known.of(gradients), _NOTHING  # moments are others from now on
        of = sums.new_empty(2, len(sums)).unbind() + sums.new_empty(3, len(sums)).unbind()  # the first two are kept
        count = self._library.clipping[sums.dtype](
            known.address,
            _factor(gradients),
            sums.data_ptr(),
            squares.data_ptr(),
            *(vector.data_ptr() for vector in of),
        )
        return _clipping(gradients, of, count)

    def step_(
        self,
        step: Step,
        rows: Callable[[Tensor, Tensor], RowGradients],
        coefficients: Callable[[Clipping], OfPass],
    ) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`: here it is one call, and moments stay in place."""
        plan, dtype = step.plan, step.dtype
        found, of_step = self._scratch(plan.num_places, dtype)
        gradients = rows(*of_step[:2])  # which become scale and shift
        if not self._known.holds(gradients):
            self._known = _Known.of(gradients)
        group = plan.only_group(dtype)
        if group is None or not self._known.is_in_place:
            return super().step_(step, rows, coefficients)
        clipped = _clipping(gradients, [gradients.second, gradients.weight, *of_step], 0)
        words = Words.of(coefficients(clipped), dtype, found.device)
        given, addresses = words.table(), group.addresses(step.lists)
        count = self._library.step[dtype](
            *group.tables,
            addresses.buffer_info()[0],
            len(step.lists),
            given.buffer_info()[0],
            self._known.address,
            _factor(gradients),
            found.data_ptr(),
            self._threads(group),
        )
        count_changes(step.lists)
        return clipped._replace(num_clipped=count)

    def path_step_(
        self,
        step: Step,
        paths: Paths,
        skeleton: Elements,
        coefficients: Callable[[Tensor, Tensor], OfPass],
        of_free: OfPass,
        max_ratio: float | None,
    ) -> Tensor | int:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`: here it is one call."""
        plan, lists, _, dtype = step
        group = plan.only_group(dtype)
        if group is None or not plan.is_contiguous:
            return super().path_step_(step, paths, skeleton, coefficients, of_free, max_ratio)
        rows, units, counts = len(paths.unit_of_row), paths.num_units, array("q", skeleton.counts)
        found = torch.empty(2 * rows + (2 * len(lists) + 3) * units + 1, dtype=dtype, device="cpu")
        at_root = torch.empty(units + 1, dtype=torch.float64, device="cpu")
        to_weights, scale = found[: 2 * rows].view(2, rows)
        words = [Words.of(given, dtype, found.device) for given in (coefficients(scale, to_weights), of_free)]
        of_rows, of_units = (each.table() for each in words)
        addresses = group.addresses(lists)
        known, elements = _paths_table(paths, max_ratio), _elements_table(skeleton, plan.sizes, counts)
        free = self.plan([[found[:units]]] * len(lists), paths.shapes, 0).groups[dtype]
        count: int = self._library.path_step[dtype](
            *group.tables,
            addresses.buffer_info()[0],
            len(lists),
            of_rows.buffer_info()[0],
            *free.tables,
            of_units.buffer_info()[0],
            known.buffer_info()[0],
            elements.buffer_info()[0],
            found.data_ptr(),
            at_root.data_ptr(),
            self._threads(group),
        )
        _check_inside(-count)
        count_changes(lists)
        return count

    def free_gradient(self, paths: Paths, sums: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        known, found = _paths_table(paths, None), sums.new_empty(paths.num_units)
        at_root = torch.empty(len(found) + 1, dtype=torch.float64, device="cpu")
        vectors = [vector.contiguous() for vector in (sums, weights, gradients)]
        self._library.free_gradient[sums.dtype](
            known.buffer_info()[0], *(vector.data_ptr() for vector in (*vectors, at_root, found))
        )
        return found

    def allocate_(self, paths: Paths, factor: Tensor, weights: Tensor, max_ratio: float | None) -> Allocated:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        known, factor, weights = _paths_table(paths, max_ratio), factor.contiguous(), weights.contiguous()
        skeleton, ratio = torch.empty_like(weights), torch.empty_like(paths.beta)
        count = self._library.allocate[factor.dtype](
            known.buffer_info()[0], *(vector.data_ptr() for vector in (factor, weights, skeleton, ratio))
        )
        return Allocated(skeleton, ratio, count)

    def _scratch(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """Three vectors for a step, as one tensor and one by one; small ones are kept, as making them takes longer."""
        if self._kept[0].shape[1] == count and self._kept[0].dtype == dtype:
            return self._kept
        found = torch.empty(3, count, dtype=dtype, device="cpu")
        made = found, found.unbind()
        if count <= KEPT_ROWS:
            self._kept = made
        return made

    def _threads(self, group: _Group) -> int:
        """The threads of a forked process are those of its parent, and do not answer."""
        return group.threads if os.getpid() == self._library.process else 1


#: Among the vectors of ``_Known``, the number of the first of the two that change.
MOMENTS = 3


class _Known(NamedTuple):
    """What ``vectors.c`` calls Rows.

    Args:
        table: numbers, and addresses of vectors.
        kept: the vectors.
        like: what a step knew of the rows, from ``second`` on.
    """

    table: array[int]
    kept: list[Tensor | None]
    like: tuple[Any, ...]

    @classmethod
    def of(cls, gradients: RowGradients) -> _Known:
        """Without the sums, and without a factor that is the same for all rows."""
        _, _, second, weight, rows, present, rho, to_step, own, linear = gradients
        has_others = rho is not None and own is not None
        vectors = [
            *(rows.runs.lengths, *rows.runs.values, second, weight),
            None if present is None else present.to(second),
            rho,
            to_step.to(second) if _is_vector(to_step) else None,
            own if has_others else None,
            linear if has_others else None,
        ]
        kept = [None if vector is None else vector.contiguous() for vector in vectors]
        words = [0 if vector is None else vector.data_ptr() for vector in kept]
        numbers = _bits(MEMORY, 2 - CENTRING, rows.slack, rows.tiny, FAINT)
        return cls(array("q", [len(second), *words, *numbers]), kept, _compared(gradients))

    def holds(self, gradients: RowGradients) -> bool:
        """Whether it is true of other gradients, too."""
        return len(self.like) > 0 and all(map(is_, self.like, _compared(gradients)))

    @property
    def is_in_place(self) -> bool:
        """Whether the table has the addresses of the moments themselves, and not of copies."""
        return self.kept[MOMENTS] is self.like[0] and self.kept[MOMENTS + 1] is self.like[1]

    @property
    def address(self) -> int:
        """Where the table is."""
        return self.table.buffer_info()[0]


_NOTHING = _Known(array("q"), [], ())


def _paths_table(paths: Paths, max_ratio: float | None) -> array[int]:
    """What ``vectors.c`` calls Paths; it is good as long as ``paths`` is kept."""
    vectors = (paths.unit_of_row, paths.root, paths.target, paths.is_free, paths.beta)
    guard = (0.0, 0.0) if max_ratio is None else (1 / max_ratio, max_ratio)
    words = [len(paths.unit_of_row), paths.num_units, *(vector.data_ptr() for vector in vectors)]
    return array("q", [*words, *_bits(paths.start, *guard)])


def _elements_table(elements: Elements, sizes: array[int], counts: array[int]) -> array[int]:
    """What ``passes.c`` calls Elements; it is good as long as the arrays are kept."""
    addresses = (sizes.buffer_info()[0], counts.buffer_info()[0], elements.at.data_ptr(), elements.slots.data_ptr())
    return array("q", [len(counts), *addresses, elements.at.dtype == torch.int64])


def _check_inside(outside: int) -> None:
    if outside > 0:
        raise IndexError(f"{outside} of the elements are not in their tensors, whose sizes have changed")


def _bits(*numbers: float) -> array[int]:
    """Numbers in 64 bits each."""
    return array("q", array("d", numbers).tobytes())


def _compared(gradients: RowGradients) -> tuple[Any, ...]:
    return (*gradients[2:7], gradients.to_step if _is_vector(gradients.to_step) else None, *gradients[8:])


def _factor(gradients: RowGradients) -> float:
    """The factor of relative steps, if it is the same for all rows; else 1, as it is a vector."""
    return 1.0 if _is_vector(gradients.to_step) else float(gradients.to_step)


def _is_vector(value: Tensor | float) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0


def _clipping(gradients: RowGradients, of: Sequence[Tensor], count: int) -> Clipping:
    second, weight, scale, shift, step = of
    if gradients.rho is None:
        assert gradients.own is not None
        step = gradients.own
    return Clipping(second, weight, scale, shift, step, count)


def _are_plain(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether memory has the elements of all tensors, of one type, in the order of their flat indices."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype == dtype and tensor.is_contiguous() and not is_lazy(tensor) for tensor in given)


def _compiled_or_eager() -> EagerKernels:
    """What a copy has, perhaps on a machine without a compiler."""
    try:
        return CompiledKernels()
    except OSError:
        return EagerKernels()
