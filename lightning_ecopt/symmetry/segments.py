"""Sums over groups of entries that are the same on every run, every rank and every device."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 32


class SegmentSum:
    """Add up the entries of a vector that belong together.

    ``index_add_`` adds in an order that changes from run to run on accelerators, so that data-parallel ranks would
    drift apart; here the order is fixed by padded gathers, level upon level, ``WIDTH`` entries at a time.

    Args:
        groups: ``int[S]``, the group of each entry.
        num_groups: number of groups.

    Example::

        total = SegmentSum(torch.tensor([0, 2, 0]), 3)
        total(torch.tensor([1.0, 2.0, 3.0]))  # tensor([4., 0., 2.])
    """

    def __init__(self, groups: Tensor, num_groups: int) -> None:
        device = groups.device
        groups = groups.cpu()
        self._levels: list[Tensor] = []
        while len(groups) > len(groups.unique()):
            order = groups.argsort(stable=True)
            counts = torch.bincount(groups, minlength=num_groups)
            rows = (counts + WIDTH - 1) // WIDTH
            rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[groups[order]]
            row = (rows.cumsum(0) - rows)[groups[order]] + rank // WIDTH
            index = torch.full((int(rows.sum()), WIDTH), len(groups))  # one past the end is a zero
            index[row, rank % WIDTH] = order
            self._levels.append(index.to(device))
            groups = torch.arange(num_groups).repeat_interleave(rows)
        last = torch.full((num_groups,), len(groups))
        last[groups] = torch.arange(len(groups))
        self._last = last.to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """Sums ``[num_groups]`` of ``values [S]``."""
        zero = values.new_zeros(1)
        for index in self._levels:
            values = torch.cat([values, zero])[index].sum(1)
        return torch.cat([values, zero])[self._last]
