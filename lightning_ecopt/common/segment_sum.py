"""Sums over groups of entries that are the same on every run, every rank and every device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import to_device

#: How many entries one gather adds up. Most groups have two or three entries, and are padded to this number.
WIDTH = 4


class SegmentSum:
    """Add up the entries of a vector that belong to the same group.

    ``index_add_`` adds in an order that changes from run to run on accelerators, so that data-parallel ranks would
    drift apart. Here the order is fixed: entries are gathered into rows of ``WIDTH``, padded with zeros, and the rows
    are added up; this is repeated with the sums of the rows of those groups that still have several.

    Args:
        groups: ``int[E]``, the group of each entry; entries whose group is not below ``num_groups`` are left out.
        num_groups: number of groups K.
        device: of the vectors; by default that of ``groups``. Groups on the CPU reach a GPU without waiting for it.

    Example::

        total = SegmentSum(torch.tensor([0, 2, 0]), 3)
        total(torch.tensor([1.0, 2.0, 3.0]))  # tensor([4., 0., 2.])
    """

    def __init__(self, groups: Tensor, num_groups: int, device: torch.device | None = None) -> None:
        device = device or groups.device
        groups = groups.cpu()
        # Place 0 is the zero that pads; entries follow, then the sums of the rows of each level.
        entries, end = (groups < num_groups).nonzero()[:, 0], len(groups) + 1
        groups = groups[entries]
        order = groups.argsort(stable=True)
        groups, entries = groups[order], entries[order] + 1
        last = torch.zeros(num_groups, dtype=torch.int64, device="cpu")
        self._levels: list[Tensor] = []
        while True:
            counts = torch.bincount(groups, minlength=num_groups)
            last[groups] = entries  # right for groups of one entry; the others are overwritten
            if not bool((counts > 1).any()):
                break
            several = counts[groups] > 1
            groups, entries, counts = groups[several], entries[several], torch.where(counts > 1, counts, 0)
            rows = (counts + WIDTH - 1) // WIDTH
            rank = torch.arange(len(groups), device="cpu") - (counts.cumsum(0) - counts)[groups]
            row = (rows.cumsum(0) - rows)[groups] + rank // WIDTH
            index = torch.zeros(WIDTH, int(rows.sum()), dtype=torch.int32, device="cpu")
            index[rank % WIDTH, row] = entries.to(torch.int32)
            self._levels.append(to_device(index.view(-1), device))
            groups = torch.arange(num_groups, device="cpu").repeat_interleave(rows)
            entries, end = torch.arange(end, end + len(groups), device="cpu"), end + len(groups)
        self._last = to_device(last.to(torch.int32), device)

    def __call__(self, values: Tensor) -> Tensor:
        """Add up ``values [..., E]`` group by group: ``[..., K]``."""
        others = values.shape[:-1]
        values = torch.cat([values.new_zeros(*others, 1), values], -1)
        for index in self._levels:  # index_select, unlike brackets, makes no copy of the index in 64 bits
            values = torch.cat([values, values.index_select(-1, index).view(*others, WIDTH, -1).sum(-2)], -1)
        return values.index_select(-1, self._last)
