"""What the kernels of Triton are launched with: how blocks are cut into items, and the tables that programs read.

:class:`TritonKernels` makes a :class:`_Plan` for each set of blocks: by their sizes and strides it sees each block as
lines (:class:`_Lines`), and puts the blocks of one dtype in a group, which one launch works on (:class:`_Group`). Plans
are kept, so that a step only checks whether tensors have moved and sends their new addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_ecopt.kernels import triton as device_code
from lightning_ecopt.kernels.eager import GRADIENTS, EagerKernels
from lightning_ecopt.kernels.passes import Coefficient, Shapes, Views
from lightning_ecopt.kernels.triton import (
    COLUMNS,
    LONG,
    NAMES,
    NUMBER,
    PARTS_WIDTH,
    SCALAR,
    SHORT,
    SIZES,
    VECTOR,
    WIDTHS,
)

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
#: Blocks with more lines, or with more elements in a line, are left to PyTorch: programs count them in 32 bits. Offsets
#: in memory may be larger.
MOST_INDICES = 1 << 30
#: In columns a place has at most so many lines.
MOST_LINES = 1024
#: For each kind of block: how many elements of a line an item has, and into how many items lines are cut at most. Lines
#: that are too long for both have longer items.
LENGTHS, MOST_PARTS = (4096, 512, 64), (1024, 1024, 256)
#: Plans are kept until there are so many, as when other parameters have gradients at every step.
MOST_PLANS = 64
#: The affine pass is part of that of SGD, with these coefficients.
SAME = {"times": "keep", "plus": "push"}


@dataclass(frozen=True)
class _Lines:
    """The elements of a block as lines; :mod:`~lightning_ecopt.kernels.triton` has pictures of the kinds.

    Args:
        kind: LONG, SHORT or COLUMNS.
        count: number of lines.
        depth: number of elements of each line.
        stride: elements in memory from line to line or, in columns, from element to element.
        of_place: number of lines of a place.
    """

    kind: int
    count: int
    depth: int
    stride: int
    of_place: int = 1

    @classmethod
    def of(cls, views: Views, shape: tuple[int, ...]) -> _Lines | None:
        """See a block as lines.

        Args:
            views: of the block, in each tensor of a pass.
            shape: of its places.

        Returns:
            ``None`` if its elements do not make lines, if its tensors differ in dtype or strides, or if they are not of
            float32 or float64.
        """
        view = views[0]
        axes = [axis for axis, size in enumerate(view.shape) if size > 1]
        if view.dtype not in DTYPES or len({(tensor.dtype, *map(tensor.stride, axes)) for tensor in views}) > 1:
            return None
        if view.numel() == 0:
            return cls(COLUMNS.value, prod(shape), 0, 0)
        # Axes from the outermost in memory to the innermost; those of the places must be neighbours among them.
        order = sorted(axes, key=view.stride, reverse=True)
        of_places = [axis for axis in axes if shape[axis] > 1]
        for start in range(len(order) - len(of_places) + 1):
            end = start + len(of_places)
            if order[start:end] == of_places:
                lines = cls._of_axes(view, order[:start], of_places, order[end:])
                if lines is not None and max(lines.count, lines.depth) < MOST_INDICES:
                    return lines
        return None

    @classmethod
    def _of_axes(cls, view: Tensor, outer: list[int], of_places: list[int], inner: list[int]) -> _Lines | None:
        """Lay lines along the inner axes or, in columns, along the outer ones."""
        places, places_stride = _joined(view, of_places)
        elements, stride = _joined(view, inner)
        if not outer and places_stride > 0 and stride == 1 and (elements > 1 or places_stride > 1):
            return cls((LONG if elements >= SIZES[0] // 2 else SHORT).value, places, elements, places_stride)
        depth, depth_stride = _joined(view, outer)
        if depth_stride > 0 and _joined(view, of_places + inner)[1] == 1 and elements <= MOST_LINES:
            return cls(COLUMNS.value, places * elements, depth, depth_stride, elements)
        return None

    @property
    def length(self) -> int:
        """Number of elements of a line in an item."""
        size = SIZES[self.kind]
        return max(LENGTHS[self.kind], ceil(self.depth / MOST_PARTS[self.kind] / size) * size)

    @property
    def num_parts(self) -> int:
        """Number of items that a line is cut into."""
        return max(1, ceil(self.depth / self.length))

    @property
    def are_split(self) -> bool:
        """Whether several items or lines have parts of the sum at one place."""
        return self.num_parts * self.of_place > 1

    @property
    def num_items(self) -> int:
        """Number of items of the block."""
        return self.num_parts * ceil(self.count / WIDTHS[self.kind])


def _joined(view: Tensor, axes: Sequence[int]) -> tuple[int, int]:
    """Return size and stride of some axes as one axis; a stride of 0 if they do not make up one."""
    together = all(view.stride(one) == view.stride(after) * view.shape[after] for one, after in pairwise(axes))
    return prod(view.shape[axis] for axis in axes), (view.stride(axes[-1]) if axes else 1) if together else 0


class _Items:
    """The items of some blocks.

    Args:
        rows: what ``blocks`` says of each block, without its first item.
        counts: how many items each block has.
        device: of the tables.

    Attributes:
        count: number of items.
        owner: number of the block of each item, ``int32[count]``.
        blocks: the table of blocks, ``int64[B, NUM_COLUMNS]``.
    """

    def __init__(self, rows: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device) -> None:
        first = [0, *accumulate(counts)]
        owner = torch.arange(len(rows), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
        self.count = first[-1]
        self.owner = owner.to(device, torch.int32)
        self.blocks = torch.tensor([[start, *row] for start, row in zip(first, rows, strict=False)], device=device)


class _Group:
    """The blocks of one dtype, which one launch works on.

    Args:
        dtype: of the blocks.
        numbers: of the blocks among all blocks of the pass.
        items: of the blocks.
    """

    def __init__(self, dtype: torch.dtype, numbers: Sequence[int], items: _Items) -> None:
        self.dtype = dtype
        self.items = items
        self._numbers = numbers
        self._words: list[int] = []
        self._table = items.blocks[:0]

    def table(self, coefficients: list[int], lists: Sequence[Views]) -> Tensor:
        """Return the table of coefficients and addresses; it is sent to the device only when a word has changed.

        Memory is pinned, so that the program does not wait for the device.
        """
        words = coefficients + [views[k].data_ptr() for k in self._numbers for views in lists]
        if words != self._words:
            device = self._table.device
            host = torch.tensor(words, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
            self._words, self._table = words, host.to(device, non_blocking=True)
        return self._table


class _Plan:
    """How to work on blocks of given shapes, strides and dtypes.

    Sums are found in one tensor: the sums themselves, ``[count, P]``, and behind them the parts that some are made of.

    Args:
        lists: of the blocks, in each tensor of the pass.
        shapes: of the places.
        count: how many sums are found for each place; 0 in passes that change tensors.

    Attributes:
        groups: of blocks, one for each launch.
        rest: numbers of the blocks that are left to PyTorch, and where their places are in vectors.
        split: items of the places whose sums are made of parts; ``None`` without such places.
        num_places: number of places P.
        num_sums: number of elements of the tensor of sums.
    """

    def __init__(self, lists: Sequence[Views], shapes: Shapes, count: int) -> None:
        device = lists[0][0].device
        starts = [0, *accumulate(map(prod, shapes))]
        found = [_Lines.of(views, shape) for views, shape in zip(zip(*lists, strict=True), shapes, strict=True)]
        blocks = {k: lines for k, lines in enumerate(found) if lines is not None}
        self.rest = [(k, slice(*starts[k : k + 2])) for k in range(len(shapes)) if k not in blocks]
        self.num_places = starts[-1]
        split = [k for k, lines in blocks.items() if lines.are_split]
        num_parts = sum(blocks[k].num_parts * blocks[k].count for k in split)
        self.num_sums = count * (self.num_places + num_parts)
        first_part = count * self.num_places
        rows = {}
        for k, lines in blocks.items():
            target = [starts[k], self.num_places]
            if lines.are_split:
                target = [first_part, num_parts]
                first_part += lines.num_parts * lines.count
            geometry = [lines.kind, lines.count, lines.depth, lines.length, lines.stride, lines.of_place]
            rows[k] = [*geometry, starts[k], starts[k + 1] - starts[k], *target, self.num_places]
        self.groups = []
        for dtype in DTYPES:
            own = [k for k, lines in blocks.items() if lists[0][k].dtype == dtype and lines.num_items]
            if own:
                items = _Items([rows[k] for k in own], [blocks[k].num_items for k in own], device)
                self.groups.append(_Group(dtype, own, items))
        self.split = None
        if split:
            widths = [ceil((starts[k + 1] - starts[k]) / PARTS_WIDTH.value) for k in split]
            self.split = _Items([rows[k] for k in split], widths, device)


class TritonKernels(EagerKernels):
    """Runs the passes through Triton, for tensors of float32 and float64 on one device.

    A pass over sums takes one launch for each dtype, and one more if sums have parts; a pass that changes tensors takes
    one for each dtype. Blocks that are not made of lines, see :class:`_Lines`, are left to tensor operations. Sums are
    accumulated in the dtype that is asked for.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}

    def __reduce__(self) -> tuple[type[TritonKernels], tuple[()]]:
        return TritonKernels, ()  # the plans hold addresses of the tensors of one optimizer

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().sums_and_squares, 2, (views,), shapes, dtype)

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().products, 1, (views, others), shapes, dtype)

    def _sums(
        self, eager: Callable[..., Tensor], count: int, lists: Sequence[Views], shapes: Shapes, dtype: torch.dtype
    ) -> Tensor:
        """Find ``count`` sums for each place, ``[count, P]``; ``eager`` finds those of blocks without lines."""
        plan = self._plan(lists, shapes, count)
        sums = torch.empty(plan.num_sums, dtype=dtype, device=lists[0][0].device)
        found = sums[: count * plan.num_places].view(count, plan.num_places)
        with torch.cuda.device_of(sums):
            for group in plan.groups:
                items, table = group.items, group.table([0] * len(NAMES), lists)
                device_code.sums[(items.count,)](
                    items.owner, items.blocks, table, sums, len(lists), DTYPES[group.dtype]
                )
            if plan.split is not None:
                device_code.sums_of_parts[(plan.split.count, count)](plan.split.owner, plan.split.blocks, sums)
        for k, places in plan.rest:
            found[:, places] = eager(*([views[k]] for views in lists), [shapes[k]], dtype)
        return found

    def _launch_(
        self, lists: Sequence[Views | None], shapes: Shapes, coefficients: Mapping[str, Coefficient]
    ) -> Iterable[tuple[int, slice]]:
        """See :class:`~lightning_ecopt.kernels.EagerKernels`."""
        own = [views for views in lists if views is not None]
        plan = self._plan(own, shapes, 0)
        # A momentum buffer does not stay as it is if its coefficient is left out.
        coefficients = {"fade": 0.0, **coefficients}
        with torch.cuda.device_of(own[0][0]):
            for group in plan.groups:
                words, given, kept = _words(coefficients, group.dtype, own[0][0].device)
                items, table = group.items, group.table(words, own)
                device_code.update[(items.count,)](
                    items.owner, items.blocks, table, given, len(own), DTYPES[group.dtype]
                )
                del kept  # not earlier: the table has addresses in these tensors
        for number, views in enumerate(lists):
            if views is not None and number != GRADIENTS:
                torch.autograd.graph.increment_version(views)  # autograd does not see what Triton writes
        return plan.rest

    def _plan(self, lists: Sequence[Views], shapes: Shapes, count: int) -> _Plan:
        kinds = tuple((view.dtype, view.stride()) for views in lists for view in views)
        key = (lists[0][0].device, count, tuple(view.shape for view in lists[0]), tuple(shapes), kinds)
        if key not in self._plans:
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            self._plans[key] = _Plan(lists, shapes, count)
        return self._plans[key]


def _words(
    coefficients: Mapping[str, Coefficient], dtype: torch.dtype, device: torch.device
) -> tuple[list[int], int, list[Tensor]]:
    """Return the words of the coefficients, GIVEN, and the tensors whose addresses are among the words."""
    words, given, kept = [0] * len(NAMES), 0, []
    for name, value in coefficients.items():
        number = NAMES.index(SAME.get(name, name))
        if isinstance(value, Tensor) and (value.ndim or value.device == device):
            kept.append(value.to(dtype).contiguous())
            words[number] = kept[-1].data_ptr()
            given += (VECTOR if value.ndim else SCALAR).value * 4**number
        else:  # a number, or a tensor of the CPU, which does not wait for the device either
            words[number] = struct.unpack("q", struct.pack("d", value))[0]
            given += NUMBER.value * 4**number
    return words, given, kept
