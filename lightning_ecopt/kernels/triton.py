"""The passes of a step on an accelerator, through Triton: each is one launch, however many blocks there are.

A block is seen as *lines* of elements, and cut into *items*, one for each program, of some lines and some elements of
each. How many depends on the kind of block:

    LONG     each place is a line, without gaps, in memory     one line, many elements
    SHORT    the same                                          some lines, some elements
    COLUMNS  lines are next to each other in memory            many lines, few elements

In columns there may be several lines to a place, one after another: those of a kernel in a transposed convolution.
A program finds out which block its item belongs to, and reads from tables what the block looks like, which stays the
same from step to step, and where its tensors and the coefficients are, which does not: ``zero_grad`` frees gradients.

Sums that several lines or items contribute to are completed by a second launch, always in the same order: all ranks and
all runs find the same bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803, N806, SIM300

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from lightning_ecopt.kernels.eager import GRADIENTS, Coefficient, EagerKernels, Shapes, Views

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
#: Where the indices of lines and of their elements end; offsets in memory may be larger.
MOST_INDICES = 1 << 30
#: Plans are kept, unless it is other tensors that have gradients again and again.
MOST_PLANS = 64
#: Of each kind of block: the lines and the elements of each that are worked on at a time, the elements in an item, and
#: the most items that lines are cut into; if they are too long for that, there is more in an item.
LONG, SHORT, COLUMNS = map(constexpr, range(3))
WIDTHS, SIZES, LENGTHS, MOST_PARTS = (1, 16, 128), (1024, 32, 8), (4096, 512, 64), (1024, 1024, 256)
#: The places, and the sums of their lines and parts, that are added up at a time; and how many lines a place may have.
PARTS_WIDTH, PARTS_SIZE, MOST_LINES = constexpr(4), constexpr(256), 1024

#: What is in the tables: of a block, and of all coefficients, in front of the tensors of each block.
FIRST_ITEM, KIND, LINES, DEPTH, LENGTH, STRIDE, LINES_OF_PLACE = map(constexpr, range(7))
FIRST_PLACE, PLACES, TARGET, STEP, ALL_PLACES, NUM_COLUMNS = map(constexpr, range(7, 13))
NAMES = ("fade", "gain", "shift", "decay", "keep", "move", "pull", "push", "first", "second", "root", "eps")
SAME = {"times": "keep", "plus": "push"}
FADE, GAIN, SHIFT, DECAY, KEEP, MOVE, PULL, PUSH, FIRST, SECOND, ROOT, EPS, NUM_NAMES = map(constexpr, range(13))
#: How a coefficient is given, one digit to the base 4 for each.
NUMBER, SCALAR, VECTOR = map(constexpr, range(1, 4))


@triton.jit
def _item(owner, blocks):
    """Number and description of the block that this program works on, and which of its items is meant."""
    number = tl.load(owner + tl.program_id(0))
    block = blocks + number * NUM_COLUMNS
    return number, block, (tl.program_id(0) - tl.load(block + FIRST_ITEM)).to(tl.int32)


@triton.jit
def _lines(block, item, KIND_OF: constexpr, WIDTH: constexpr):
    """Lines of an item, which of them there are, and their offsets; all broadcast along the elements of a line."""
    AXIS: constexpr = 0 if KIND_OF == COLUMNS else 1
    lines = tl.load(block + LINES)
    line = tl.expand_dims(item % tl.cdiv(lines, WIDTH).to(tl.int32) * WIDTH + tl.arange(0, WIDTH), AXIS)
    return line, line < lines, line if KIND_OF == COLUMNS else line * tl.load(block + STRIDE)


@triton.jit
def _part(block, item, WIDTH: constexpr):
    """Which part of the lines an item works on, where it starts and where it ends."""
    part = item // tl.cdiv(tl.load(block + LINES), WIDTH).to(tl.int32)
    length = tl.load(block + LENGTH).to(tl.int32)
    return part, part * length, tl.minimum(part * length + length, tl.load(block + DEPTH).to(tl.int32))


@triton.jit
def _elements(block, first, end, KIND_OF: constexpr, SIZE: constexpr):
    """Which of the next elements of a line there are, and their offsets; both broadcast along lines."""
    index = tl.expand_dims(first + tl.arange(0, SIZE), 1 if KIND_OF == COLUMNS else 0)
    return index < end, index * tl.load(block + STRIDE) if KIND_OF == COLUMNS else index


@triton.jit
def _sums(owner, blocks, table, out, TENSORS: constexpr, DTYPE: constexpr):
    """Sums and sums of squares of one tensor, or sums of the products of two."""
    number, block, item = _item(owner, blocks)
    for kind in tl.static_range(3):
        if tl.load(block + KIND) == kind:
            _sums_of_item(block, item, table + NUM_NAMES + number * TENSORS, out, TENSORS, DTYPE, kind)


@triton.jit
def _sums_of_item(block, item, tensors, out, TENSORS: constexpr, DTYPE: constexpr, KIND_OF: constexpr):
    WIDTH: constexpr = 1 if KIND_OF == LONG else (16 if KIND_OF == SHORT else 128)
    SIZE: constexpr = 1024 if KIND_OF == LONG else (32 if KIND_OF == SHORT else 8)
    AXIS: constexpr = 0 if KIND_OF == COLUMNS else 1
    WIDE: constexpr = out.dtype.element_ty
    line, known, across = _lines(block, item, KIND_OF, WIDTH)
    part, start, end = _part(block, item, WIDTH)
    one = tl.load(tensors).to(tl.pointer_type(DTYPE)) + across
    other = tl.load(tensors + TENSORS - 1).to(tl.pointer_type(DTYPE)) + across
    sums = tl.zeros_like(line).to(WIDE) + tl.expand_dims(tl.zeros((SIZE,), WIDE), 1 - AXIS)
    squares = sums
    for first in range(start, end, SIZE):
        inside, along = _elements(block, first, end, KIND_OF, SIZE)
        value = tl.load(one + along, mask=known & inside, other=0.0).to(WIDE)
        if TENSORS == 1:
            sums += value
            squares += value * value
        else:
            sums += value * tl.load(other + along, mask=known & inside, other=0.0).to(WIDE)
    target = out + tl.load(block + TARGET) + part * tl.load(block + LINES) + line
    tl.store(target, tl.sum(sums, AXIS, keep_dims=True), mask=known)
    if TENSORS == 1:
        tl.store(target + tl.load(block + STEP), tl.sum(squares, AXIS, keep_dims=True), mask=known)


@triton.jit
def _sums_of_parts(owner, blocks, out):
    """Add up what was found for the lines of a place, part by part, for each of the numbers that are found."""
    _, block, item = _item(owner, blocks)
    lines_of_place = tl.load(block + LINES_OF_PLACE).to(tl.int32)
    terms = tl.cdiv(tl.load(block + DEPTH), tl.load(block + LENGTH)).to(tl.int32) * lines_of_place
    place = item * PARTS_WIDTH + tl.arange(0, PARTS_WIDTH)
    known = place < tl.load(block + PLACES)
    source = out + tl.load(block + TARGET) + tl.program_id(1) * tl.load(block + STEP) + place * lines_of_place
    sums = tl.zeros((PARTS_SIZE, PARTS_WIDTH), out.dtype.element_ty)
    for first in range(0, terms, PARTS_SIZE):
        term = first + tl.arange(0, PARTS_SIZE)
        offset = term // lines_of_place * tl.load(block + LINES) + term % lines_of_place
        sums += tl.load(source[None, :] + offset[:, None], mask=(term < terms)[:, None] & known[None, :], other=0.0)
    target = out + tl.program_id(1) * tl.load(block + ALL_PLACES) + tl.load(block + FIRST_PLACE) + place
    tl.store(target, tl.sum(sums, 0), mask=known)


@triton.jit
def _coefficient(table, place, known, GIVEN: constexpr, NAME: constexpr, DTYPE: constexpr):
    word = tl.load(table + NAME)
    if GIVEN // 4**NAME % 4 == NUMBER:
        value = word.to(tl.float64, bitcast=True).to(DTYPE)
    elif GIVEN // 4**NAME % 4 == SCALAR:
        value = tl.load(word.to(tl.pointer_type(DTYPE)))
    else:
        value = tl.load(word.to(tl.pointer_type(DTYPE)) + place, mask=known)
    return value


@triton.jit
def _times(value, table, place, known, GIVEN: constexpr, NAME: constexpr):
    if GIVEN // 4**NAME % 4:
        value *= _coefficient(table, place, known, GIVEN, NAME, value.dtype)
    return value


@triton.jit
def _plus(value, factor, table, place, known, GIVEN: constexpr, NAME: constexpr):
    if GIVEN // 4**NAME % 4:
        value += _coefficient(table, place, known, GIVEN, NAME, value.dtype) * factor
    return value


@triton.jit
def _lerp(start, end, weight):
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def _update(owner, blocks, table, GIVEN: constexpr, TENSORS: constexpr, DTYPE: constexpr):
    """The affine pass over one tensor, that of SGD over two or three, that of Adam over four or five."""
    number, block, item = _item(owner, blocks)
    for kind in tl.static_range(3):
        if tl.load(block + KIND) == kind:
            _update_item(block, item, table, table + NUM_NAMES + number * TENSORS, GIVEN, TENSORS, DTYPE, kind)


@triton.jit
def _update_item(
    block, item, table, tensors, GIVEN: constexpr, TENSORS: constexpr, DTYPE: constexpr, KIND_OF: constexpr
):
    WIDTH: constexpr = 1 if KIND_OF == LONG else (16 if KIND_OF == SHORT else 128)
    SIZE: constexpr = 1024 if KIND_OF == LONG else (32 if KIND_OF == SHORT else 8)
    POINTER: constexpr = tl.pointer_type(DTYPE)
    line, known, across = _lines(block, item, KIND_OF, WIDTH)
    _, start, end = _part(block, item, WIDTH)
    at = tl.load(block + FIRST_PLACE) + line // tl.load(block + LINES_OF_PLACE).to(tl.int32)
    for first in range(start, end, SIZE):
        inside, along = _elements(block, first, end, KIND_OF, SIZE)
        inside = known & inside
        offsets = across + along
        weights = tl.load(tensors).to(POINTER) + offsets
        w = tl.load(weights, mask=inside)
        if TENSORS > 1:
            g = tl.load(tl.load(tensors + 1).to(POINTER) + offsets, mask=inside)
        if TENSORS == 3:
            momenta = tl.load(tensors + 2).to(POINTER) + offsets
            m = _times(tl.load(momenta, mask=inside), table, at, known, GIVEN, FADE)
            m = _plus(m, w, table, at, known, GIVEN, DECAY)
            m = _plus(m, g, table, at, known, GIVEN, GAIN)
            m = _plus(m, 1.0, table, at, known, GIVEN, SHIFT)
            tl.store(momenta, m, mask=inside)
        if TENSORS > 3:
            d = _times(g, table, at, known, GIVEN, GAIN)
            d = _plus(d, 1.0, table, at, known, GIVEN, SHIFT)
            d = _plus(d, w, table, at, known, GIVEN, DECAY)
            means = tl.load(tensors + 2).to(POINTER) + offsets
            m = _lerp(tl.load(means, mask=inside), d, _coefficient(table, at, known, GIVEN, FIRST, DTYPE))
            tl.store(means, m, mask=inside)
            squares = tl.load(tensors + 3).to(POINTER) + offsets
            v = _lerp(tl.load(squares, mask=inside), d * d, _coefficient(table, at, known, GIVEN, SECOND, DTYPE))
            tl.store(squares, v, mask=inside)
            if TENSORS > 4:
                maxima = tl.load(tensors + 4).to(POINTER) + offsets
                largest = tl.load(maxima, mask=inside)
                v = tl.where((v > largest) | (v != v), v, largest)
                tl.store(maxima, v, mask=inside)
            root = tl.sqrt_rn(v) if DTYPE == tl.float32 else tl.sqrt(v)
            root = _times(root, table, at, known, GIVEN, ROOT)
            root = _plus(root, 1.0, table, at, known, GIVEN, EPS)
            m = tl.div_rn(m, root) if DTYPE == tl.float32 else m / root
        w = _times(w, table, at, known, GIVEN, KEEP)
        if TENSORS > 2:
            w = _plus(w, m, table, at, known, GIVEN, MOVE)
        if TENSORS > 1:
            w = _plus(w, g, table, at, known, GIVEN, PULL)
        w = _plus(w, 1.0, table, at, known, GIVEN, PUSH)
        tl.store(weights, w, mask=inside)


@dataclass(frozen=True)
class _Lines:
    """The elements of a block, line by line.

    Args:
        kind: of the block.
        count: of the lines.
        depth: how many elements each line has.
        stride: from line to line or, in columns, from element to element.
        of_place: how many lines there are to a place.
    """

    kind: int
    count: int
    depth: int
    stride: int
    of_place: int = 1

    @classmethod
    def of(cls, views: Views, shape: tuple[int, ...]) -> _Lines | None:
        """``None`` if a block is not made of lines, or not of the same in all of its tensors."""
        view = views[0]
        axes = [axis for axis, size in enumerate(view.shape) if size > 1]
        if view.dtype not in DTYPES or len({(tensor.dtype, *map(tensor.stride, axes)) for tensor in views}) > 1:
            return None
        if view.numel() == 0:
            return cls(COLUMNS.value, prod(shape), 0, 0)
        order = sorted(axes, key=view.stride, reverse=True)
        held = [axis for axis in axes if shape[axis] > 1]
        places, places_stride = _joined(view, held)
        for start in range(len(order) - len(held) + 1):
            end = start + len(held)
            outer, outer_stride = _joined(view, order[:start])
            inner, inner_stride = _joined(view, order[end:])
            lines = None
            if order[start:end] != held:
                continue
            if start == 0 and places_stride > 0 and inner_stride == 1 and (inner > 1 or places_stride > 1):
                lines = cls((LONG if inner >= SIZES[0] // 2 else SHORT).value, places, inner, places_stride)
            elif outer_stride > 0 and _joined(view, order[start:])[1] == 1 and inner <= MOST_LINES:
                lines = cls(COLUMNS.value, places * inner, outer, outer_stride, inner)
            if lines is not None and max(lines.count, lines.depth) < MOST_INDICES:
                return lines
        return None

    @property
    def length(self) -> int:
        """How many elements of a line there are in an item."""
        size = SIZES[self.kind]
        return max(LENGTHS[self.kind], ceil(self.depth / MOST_PARTS[self.kind] / size) * size)

    @property
    def num_parts(self) -> int:
        return max(1, ceil(self.depth / self.length))

    @property
    def are_split(self) -> bool:
        """Whether a place has its sums from several lines or parts of lines."""
        return self.num_parts * self.of_place > 1

    @property
    def num_items(self) -> int:
        return self.num_parts * ceil(self.count / WIDTHS[self.kind])


def _joined(view: Tensor, axes: Sequence[int]) -> tuple[int, int]:
    """Size and stride of some axes as one, a stride of 0 if they do not make up one."""
    together = all(view.stride(one) == view.stride(after) * view.shape[after] for one, after in pairwise(axes))
    return prod(view.shape[axis] for axis in axes), (view.stride(axes[-1]) if axes else 1) if together else 0


class _Items:
    """A table of blocks, and which of them each item belongs to."""

    def __init__(self, rows: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device) -> None:
        first = [0, *accumulate(counts)]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        self.count = first[-1]
        self.owner = owner.to(device, torch.int32)
        self.blocks = torch.tensor([[start, *row] for start, row in zip(first, rows, strict=False)]).to(device)


class _Group:
    """The blocks of one dtype, which a launch works on, and the table of where things are.

    Args:
        dtype: of the blocks.
        numbers: of the blocks.
        items: of the blocks.
    """

    def __init__(self, dtype: torch.dtype, numbers: Sequence[int], items: _Items) -> None:
        self.dtype = dtype
        self.items = items
        self._numbers = numbers
        self._words: list[int] = []
        self._table = items.blocks[:0]

    def table(self, coefficients: list[int], lists: Sequence[Views]) -> Tensor:
        """Where things are; the table is sent to the device if it is not the last one, and nothing waits for it."""
        words = coefficients + [views[k].data_ptr() for k in self._numbers for views in lists]
        if words != self._words:
            device = self._table.device
            host = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._words, self._table = words, host.to(device, non_blocking=True)
        return self._table


class _Plan:
    """How to work on blocks of given shapes, strides and dtypes.

    Args:
        lists: of tensors of the blocks.
        shapes: of what broadcasts to them.
        count: how many numbers are found for each place.

    Attributes:
        groups: of blocks that are worked on by one launch.
        rest: numbers of the other blocks, and where their places are.
        split: the items of the sums that are found in parts.
        num_places: of all blocks.
        num_sums: numbers of sums and parts of sums, of each of the ``count`` kinds.
    """

    def __init__(self, lists: Sequence[Views], shapes: Shapes, count: int) -> None:
        device = lists[0][0].device
        starts = [0, *accumulate(prod(shape) for shape in shapes)]
        found = [_Lines.of(views, shape) for views, shape in zip(zip(*lists, strict=True), shapes, strict=True)]
        blocks = {k: lines for k, lines in enumerate(found) if lines is not None}
        self.rest = [(k, slice(*starts[k : k + 2])) for k in range(len(shapes)) if k not in blocks]
        split = [k for k, lines in blocks.items() if lines.are_split]
        num_parts = sum(blocks[k].num_parts * blocks[k].count for k in split)
        self.num_places = self.num_sums = starts[-1]
        rows = {}
        for k, lines in blocks.items():
            target = [starts[k], self.num_places]
            if lines.are_split:
                target = [(count - 1) * self.num_places + self.num_sums, num_parts]
                self.num_sums += lines.num_parts * lines.count
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
    """The passes through Triton, for tensors of float32 and float64 on one device.

    Blocks whose tensors differ in their strides, that are not made of lines, or that have another dtype, are worked on
    operation by operation. Sums are found in the dtype that is asked for.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}

    def __reduce__(self) -> tuple[type[TritonKernels], tuple[()]]:
        return TritonKernels, ()  # plans are made again; tables are of the tensors of one optimizer

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().sums_and_squares, 2, (views,), shapes, dtype)

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().products, 1, (views, others), shapes, dtype)

    def _sums(
        self, eager: Callable[..., Tensor], count: int, lists: Sequence[Views], shapes: Shapes, dtype: torch.dtype
    ) -> Tensor:
        plan = self._plan(lists, shapes, count)
        sums = torch.empty(count * plan.num_sums, dtype=dtype, device=lists[0][0].device)
        found = sums[: count * plan.num_places].view(count, plan.num_places)
        with torch.cuda.device_of(sums):
            for group in plan.groups:
                items, table = group.items, group.table([0] * len(NAMES), lists)
                _sums[(items.count,)](items.owner, items.blocks, table, sums, len(lists), DTYPES[group.dtype])
            if plan.split is not None:
                _sums_of_parts[(plan.split.count, count)](plan.split.owner, plan.split.blocks, sums)
        for k, places in plan.rest:
            found[:, places] = eager(*([views[k]] for views in lists), [shapes[k]], dtype)
        return found

    def _in_place(
        self,
        function: Callable[..., None],
        lists: Sequence[Views | None],
        shapes: Shapes,
        coefficients: Mapping[str, Coefficient | None],
    ) -> None:
        if not shapes:
            return
        own = [views for views in lists if views is not None]
        plan = self._plan(own, shapes, 0)
        given = {name: value for name, value in coefficients.items() if value is not None}
        with torch.cuda.device_of(own[0][0]):
            for group in plan.groups:
                words, kinds, kept = _words({"fade": 0.0, **given}, group.dtype, own[0][0].device)
                items, table = group.items, group.table(words, own)
                _update[(items.count,)](items.owner, items.blocks, table, kinds, len(own), DTYPES[group.dtype])
                del kept  # what the table points to has been used
        for number, views in enumerate(lists):
            if views is not None and number != GRADIENTS:
                torch.autograd.graph.increment_version(views)
        for k, places in plan.rest:
            vectors = {name: value[places] for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
            super()._in_place(function, [views and [views[k]] for views in lists], [shapes[k]], {**given, **vectors})

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
    """Coefficients as they are in the table, how they are given, and the tensors that the table points to."""
    words, kinds, kept = [0] * len(NAMES), 0, []
    for name, value in coefficients.items():
        number = NAMES.index(SAME.get(name, name))
        if isinstance(value, Tensor) and (value.ndim or value.device == device):
            kept.append(value.to(dtype).contiguous())
            words[number] = kept[-1].data_ptr()
            kinds += (VECTOR if value.ndim else SCALAR).value * 4**number
        else:
            words[number] = struct.unpack("q", struct.pack("d", value))[0]
            kinds += NUMBER.value * 4**number
    return words, kinds, kept
