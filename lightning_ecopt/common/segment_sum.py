"""Sums over groups of entries that are the same on every run, every rank and every device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import padded

#: How many entries one gather adds up. Eight keeps both the number of levels and the padding small.
WIDTH = 8


class SegmentSum:
    """Add up the entries of a vector that belong to the same group.

    ``index_add_`` adds in an order that changes from run to run on accelerators, so that data-parallel ranks would
    drift apart. Here the order is fixed: entries are gathered into rows of ``WIDTH``, padded with zeros, and the rows
    are added up; this is repeated with the sums of the rows until each group has one entry left.

    Args:
        groups: ``int[E]``, the group of each entry; entries whose group is not below ``num_groups`` are left out.
        num_groups: number of groups K.

    Example::

        total = SegmentSum(torch.tensor([0, 2, 0]), 3)
        total(torch.tensor([1.0, 2.0, 3.0]))  # tensor([4., 0., 2.])
    """

    def __init__(self, groups: Tensor, num_groups: int) -> None:
        device = groups.device
        groups = groups.cpu()
        entries = (groups < num_groups).nonzero()[:, 0]
        groups, end = groups[entries], len(groups)  # index `end` is the zero that pads the entries
        order = groups.argsort(stable=True)
        groups, entries = groups[order], entries[order]
        self._levels: list[Tensor] = []
        counts = torch.bincount(groups, minlength=num_groups)
        while bool((counts > 1).any()):
            rows = (counts + WIDTH - 1) // WIDTH
            rank = torch.arange(len(groups), device="cpu") - (counts.cumsum(0) - counts)[groups]
            row = (rows.cumsum(0) - rows)[groups] + rank // WIDTH
            index = torch.full((int(rows.sum()), WIDTH), end, device="cpu")
            index[row, rank % WIDTH] = entries
            self._levels.append(index.to(device, torch.int32))
            groups, counts = torch.arange(num_groups, device="cpu").repeat_interleave(rows), rows
            entries, end = torch.arange(len(groups), device="cpu"), len(groups)
        last = torch.full((num_groups,), end, device="cpu")
        last[groups] = entries
        self._last = last.to(device, torch.int32)

    def __call__(self, values: Tensor) -> Tensor:
        """Add up ``values [E]`` group by group: ``[K]``."""
        for index in self._levels:
            values = padded(values, 0)[index].sum(1)
        return padded(values, 0)[self._last]
