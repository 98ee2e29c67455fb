"""The passes on a CPU, in C: each reads and writes memory once, in one call however deep the network is."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ecopt.common.sides import Boxes, Operands, Sides
from lightning_ecopt.common.tensors import is_plain
from lightning_ecopt.kernels.allocation import Allocated, Paths
from lightning_ecopt.kernels.clipping import Clipping, RowGradients
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
    lines_and_rest,
)
from lightning_ecopt.kernels.passes import Elements, Shapes, Views
from lightning_ecopt.kernels.tables import (
    NO_COEFFICIENTS,
    NO_ROWS,
    CoefficientTables,
    KnownRows,
    OnPaths,
    common_factor,
    elements_table,
    paths_table,
)

#: An item has a 64th of all elements, but no fewer and no more than so many, unless lines are longer: few enough for
#: many threads, and enough for reading ahead. In columns it has so many lines.
LEAST, MOST, LINES = 1 << 14, 1 << 17, 1024
#: The vectors of a step over no more rows than these are kept from one step to the next.
KEPT_ROWS = 1 << 12


class _Lines(Lines):
    """Lines in the memory of the CPU: some state may be elsewhere, of which tensor operations complain."""

    @classmethod
    def of(cls, views: Views, shape: tuple[int, ...]) -> Self | None:
        """See :class:`~lightning_ecopt.kernels.lines.Lines`."""
        return super().of(views, shape) if all(view.is_cpu for view in views) else None


class _Plan:
    """How to work on blocks of given shapes, strides and types; see :class:`~lightning_ecopt.kernels.lines.Plan`."""

    def __init__(self, lists: Sequence[Views], shapes: Shapes) -> None:
        blocks, starts, self.rest = lines_and_rest(_Lines, lists, shapes)
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
        self.elements = sum(lines.count * lines.depth for lines in blocks)
        of_item = min(max(LEAST, self.elements // 64), MOST)
        for k, (lines, place) in enumerate(zip(blocks, places, strict=True)):
            self._blocks.extend([lines.kind == COLUMNS, lines.depth, lines.stride, lines.of_place, place])
            width = LINES if lines.kind == COLUMNS else of_item // lines.depth
            width = max(1, width // lines.of_place) * lines.of_place
            for first in range(0, lines.count, width):
                self._items.extend([k, first, min(first + width, lines.count)])
        self.tables = (self._blocks.buffer_info()[0], self._items.buffer_info()[0], len(self._items) // 3)

    def addresses(self, lists: Sequence[Views]) -> array[int]:
        """Of the blocks in each list, block by block."""
        return array("q", [views[k].data_ptr() for k in self._numbers for views in lists])


class CompiledKernels(LineKernels[_Plan]):
    """Runs the passes in C, for tensors of float32 and float64. Sums of parts are added up in double.

    Raises:
        OSError: if the C file cannot be compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = load()
        self._known = NO_ROWS
        self._kept: tuple[Tensor, Sequence[Tensor]] = torch.empty(3, 0, device="cpu"), ()
        self._told = NO_COEFFICIENTS
        self._on_paths: OnPaths | None = None

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
                self._library.threads(group.elements),
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
                self._library.threads(group.elements),
            )

    def both_sides(self, sides: Sides, first: Operands, second: Operands, sign: float) -> Tensor | None:
        """See :class:`~lightning_ecopt.common.sides.Passes`."""
        boxes = sides.boxes(first, second)
        if boxes is None or not self._can_share(boxes):
            return None
        found = torch.zeros(2, sides.entries, dtype=torch.float64, device="cpu")
        self._over(boxes, first, second, self._library.both_sides, sign, *(row.data_ptr() for row in found))
        return found

    def rescale_(self, sides: Sides, tensors: Operands, factors: Callable[[], Tensor]) -> bool:
        """See :class:`~lightning_ecopt.common.sides.Passes`."""
        own = [tensor for tensor in tensors if tensor is not None]
        if any(tensor.is_inference() or 0 in tensor.stride() for tensor in own):
            return False
        boxes = sides.boxes(tensors, tensors)
        if boxes is None or not self._can_share(boxes):
            return False
        by = factors()
        if by.shape != (sides.entries,) or not _are_plain([by], torch.float64):
            return False
        self._over(boxes, tensors, tensors, self._library.rescale, by.data_ptr())
        torch.autograd.graph.increment_version(own)
        return True

    def magnitudes(self, tensors: Sequence[Tensor], sample: int) -> Tensor | None:
        """See :class:`~lightning_ecopt.common.sides.Passes`."""
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) != 1 or not kinds <= set(DTYPES) or not _are_plain(tensors, *kinds):
            return None
        addresses, sizes = (array("q", [of(tensor) for tensor in tensors]) for of in (Tensor.data_ptr, Tensor.numel))
        if not self._library.can_share(sizes):
            return None
        found = torch.empty(len(tensors), 5, dtype=torch.float64, device="cpu")
        self._library.magnitudes[tensors[0].dtype](
            len(tensors),
            addresses.buffer_info()[0],
            sizes.buffer_info()[0],
            sample,
            found.data_ptr(),
            self._library.threads(sum(sizes)),
        )
        return found.T

    def _can_share(self, boxes: Mapping[torch.dtype, Boxes]) -> bool:
        return all(dtype in DTYPES and self._library.can_share(each.elements) for dtype, each in boxes.items())

    def _over(
        self,
        boxes: Mapping[torch.dtype, Boxes],
        first: Operands,
        second: Operands,
        functions: Mapping[torch.dtype, Callable[..., None]],
        *arguments: float,
    ) -> None:
        """Call one of the functions for the boxes of each type."""
        for dtype, each in boxes.items():
            addresses = each.addresses(first, second)
            tables = each.table.buffer_info()[0], len(each.places), addresses.buffer_info()[0]
            functions[dtype](*tables, *arguments, self._library.threads(sum(each.elements)))

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
        table = elements_table(elements, sizes, counts)
        outside = self._library.copy_elements[vector.dtype](
            table.buffer_info()[0], addresses.buffer_info()[0], 1, vector.data_ptr(), write
        )
        _check_inside(outside)

    def clipping(self, gradients: RowGradients) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        sums, squares = gradients.sums.contiguous(), gradients.squares.contiguous()
        known, self._known = KnownRows.of(gradients), NO_ROWS  # moments are others from now on
        moments = torch.empty_like(sums), torch.empty_like(gradients.seen)  # which are kept
        of = moments + sums.new_empty(3, len(sums)).unbind()
        count = self._library.clipping[sums.dtype](
            known.address,
            common_factor(gradients),
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
        terms: object,
    ) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`: here it is one call, and moments stay in place."""
        plan, dtype = step.plan, step.dtype
        found, of_step = self._scratch(plan.num_places, dtype)
        gradients = rows(*of_step[:2])  # which become scale and shift
        if not self._known.holds(gradients):
            self._known = KnownRows.of(gradients)
        group = plan.only_group(dtype)
        if group is None or not self._known.is_in_place:
            return super().step_(step, rows, coefficients, terms)
        clipped = _clipping(gradients, [gradients.second, gradients.seen, *of_step], 0)
        told = self._told_of(lambda: [coefficients(clipped)], dtype, found, terms, self._known)
        (given,), addresses = told.tables, group.addresses(step.lists)
        count = self._library.step[dtype](
            *group.tables,
            addresses.buffer_info()[0],
            len(step.lists),
            given.buffer_info()[0],
            self._known.address,
            common_factor(gradients),
            found.data_ptr(),
            self._library.threads(group.elements),
        )
        count_changes(step.lists)
        return clipped._replace(num_clipped=count)

    def path_step_(
        self,
        step: Step,
        paths: Paths,
        skeleton: Elements,
        coefficients: Callable[[Tensor, Tensor], OfPass],
        of_free: Callable[[], OfPass],
        terms: object,
        max_ratio: float | None,
    ) -> Tensor | int:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`: here it is one call."""
        plan, lists, _, dtype = step
        group = plan.only_group(dtype)
        if group is None or not plan.is_contiguous:
            return super().path_step_(step, paths, skeleton, coefficients, of_free, terms, max_ratio)
        here = self._on_paths
        if here is None or not here.holds(step, paths, skeleton, max_ratio):
            here = OnPaths(step, paths, skeleton, max_ratio)
            self._on_paths = here if len(paths.unit_of_row) <= KEPT_ROWS else None
        told = self._told_of(lambda: [coefficients(*here.scales), of_free()], dtype, here, terms)
        (of_rows, of_units), addresses = told.tables, group.addresses(lists)
        free = self.plan([[here.free]] * len(lists), paths.shapes, 0).groups[dtype]
        count: int = self._library.path_step[dtype](
            *group.tables,
            addresses.buffer_info()[0],
            len(lists),
            of_rows.buffer_info()[0],
            *free.tables,
            of_units.buffer_info()[0],
            *here.addresses,
            self._library.threads(group.elements),
        )
        _check_inside(-count)
        count_changes(lists)
        return count

    def free_gradient(self, paths: Paths, sums: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        known, found = paths_table(paths, None), sums.new_empty(paths.num_units)
        at_root = torch.empty(len(found) + 1, dtype=torch.float64, device="cpu")
        vectors = [vector.contiguous() for vector in (sums, weights, gradients)]
        self._library.free_gradient[sums.dtype](
            known.buffer_info()[0], *(vector.data_ptr() for vector in (*vectors, at_root, found))
        )
        return found

    def allocate_(self, paths: Paths, factor: Tensor, weights: Tensor, max_ratio: float | None) -> Allocated:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        known, factor, weights = paths_table(paths, max_ratio), factor.contiguous(), weights.contiguous()
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

    def _told_of(
        self, coefficients: Callable[[], Sequence[OfPass]], dtype: torch.dtype, memory: object, *of: object
    ) -> CoefficientTables:
        """The coefficients that hold for these very objects, of which ``memory`` has the vectors of a step."""
        if self._told.holds(memory, *of):
            return self._told
        told = CoefficientTables(coefficients(), dtype, (memory, *of))
        is_kept = memory is self._kept[0] or memory is self._on_paths
        self._told = told if is_kept else NO_COEFFICIENTS
        return told


def _check_inside(outside: int) -> None:
    if outside > 0:
        raise IndexError(f"{outside} of the elements are not in their tensors, whose sizes have changed")


def _clipping(gradients: RowGradients, of: Sequence[Tensor], count: int) -> Clipping:
    second, seen, scale, shift, step = of
    if gradients.rho is None:
        assert gradients.own is not None
        step = gradients.own
    return Clipping(second, seen, scale, shift, step, count)


def _are_plain(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether memory has the elements of all tensors, of one type, in the order of their flat indices."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype == dtype and tensor.is_contiguous() and is_plain(tensor) for tensor in given)


def _compiled_or_eager() -> EagerKernels:
    """What a copy has, perhaps on a machine without a compiler."""
    try:
        return CompiledKernels()
    except OSError:
        return EagerKernels()
