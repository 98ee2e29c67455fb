"""Vectors whose entries are mostly equal to those before them, in little memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Vectors as runs of equal entries.

    Args:
        values: the entries of each run in all V vectors, ``[V, S]``.
        lengths: of the runs, ``int64[S]``.
        size: the number R of entries of a vector.
    """

    values: Tensor
    lengths: Tensor
    size: int

    @classmethod
    def of(cls, *vectors: Tensor) -> Runs:
        """The runs of vectors ``[R]``, over which none of them changes.

        Example::

            Runs.of(torch.tensor([3.0, 3.0, 5.0]))  # values [[3, 5]], lengths [2, 1], size 3
        """
        together = torch.stack(vectors)
        size = together.shape[1]
        changes = (together[:, 1:] != together[:, :-1]).any(0).nonzero()[:, 0] + 1
        starts = torch.cat([changes.new_zeros(min(size, 1)), changes])
        return cls(together[:, starts], starts.diff(append=starts.new_tensor([size] * min(size, 1))), size)

    def vectors(self) -> Tensor:
        """The vectors, ``[V, R]``, made anew at each call."""
        return self.values.repeat_interleave(self.lengths, 1, output_size=self.size)
