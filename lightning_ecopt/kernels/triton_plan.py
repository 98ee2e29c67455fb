"""What the kernels of Triton are launched with: how blocks are cut into items, and the tables that programs read.

:class:`TritonKernels` makes a :class:`_Plan` for each set of blocks: by their sizes and strides it sees each block as
lines (:class:`_Lines`), and puts the blocks of one dtype in a group, which one launch works on (:class:`_Group`). Plans
are kept, so that a step only checks whether tensors have moved and sends their new addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil

import torch
import triton.language as tl
from torch import Tensor

from lightning_ecopt.kernels import triton as device_code
from lightning_ecopt.kernels.eager import values_of
from lightning_ecopt.kernels.lines import NAMES, LineKernels, Lines, Words, lines_and_rest
from lightning_ecopt.kernels.passes import Coefficient, Product, Shapes, Views
from lightning_ecopt.kernels.triton import PARTS_WIDTH, SIZES, WIDTHS

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
#: For each kind of block: how many elements of a line an item has, and into how many items lines are cut at most. Lines
#: that are too long for both have longer items.
LENGTHS, MOST_PARTS = (4096, 512, 64), (1024, 1024, 256)


class _Lines(Lines):
    """Lines, and the items that they are cut into."""

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
        blocks, starts, self.rest = lines_and_rest(_Lines, lists, shapes)
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


class TritonKernels(LineKernels[_Plan]):
    """Runs the passes through Triton, for tensors of float32 and float64 on one device.

    A pass over sums takes one launch for each dtype, and one more if sums have parts; a pass that changes tensors takes
    one for each dtype. Sums are accumulated in the dtype that is asked for.
    """

    def _make_plan(self, lists: Sequence[Views], shapes: Shapes, count: int) -> _Plan:
        return _Plan(lists, shapes, count)

    def add(self, plan: _Plan, lists: Sequence[Views], count: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.lines.LineKernels`."""
        sums = torch.empty(plan.num_sums, dtype=dtype, device=lists[0][0].device)
        with torch.cuda.device_of(sums):
            for group in plan.groups:
                items, table = group.items, group.table([0] * len(NAMES), lists)
                device_code.sums[(items.count,)](
                    items.owner, items.blocks, table, sums, len(lists), DTYPES[group.dtype]
                )
            if plan.split is not None:
                device_code.sums_of_parts[(plan.split.count, count)](plan.split.owner, plan.split.blocks, sums)
        return sums[: count * plan.num_places].view(count, plan.num_places)

    def _change_(self, plan: _Plan, lists: Sequence[Views], coefficients: Mapping[str, Coefficient | Product]) -> None:
        values = values_of(coefficients)
        with torch.cuda.device_of(lists[0][0]):
            for group in plan.groups:
                words = Words.of(values, group.dtype, lists[0][0].device)
                given = sum(kind * 4**number for number, kind in enumerate(words.kinds))
                items, table = group.items, group.table(words.words, lists)
                device_code.update[(items.count,)](
                    items.owner, items.blocks, table, given, len(lists), DTYPES[group.dtype]
                )
                del words  # not earlier: the table has addresses in its tensors
