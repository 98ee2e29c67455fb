"""Ranks as threads of one process, each with its own pieces of the parameters, which no process group knows of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lightning_ecopt.common import sharding
from lightning_ecopt.common.parts import Layout
from lightning_ecopt.common.sharding import Ranks

T = TypeVar("T")


class Simulated:
    """Runs a function on several ranks at a time; what they add up meets at a barrier.

    Args:
        size: number of ranks.

    Attributes:
        sums: how many numbers each of the sums had.
    """

    def __init__(self, size: int) -> None:
        self.size, self.sums = size, list[int]()
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Tensor] = [torch.zeros(0)] * size
        self._here = threading.local()
        self._layouts: dict[int, Layout] = {}

    def lay_out(self, tensor: Tensor, layout: Layout | None) -> None:
        """Say what a rank holds in a tensor; ``None`` for all."""
        if layout is not None:
            self._layouts[_memory(tensor)] = layout

    def _add_up(self, values: Tensor) -> Tensor:
        if self._here.rank == 0:
            self.sums.append(values.numel())
        self._values[self._here.rank] = values.clone()
        self._barrier.wait()
        total = torch.stack(self._values).sum(0)
        self._barrier.wait()  # nobody begins another sum before all have read this one
        return values.copy_(total)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, parameters are cut as :meth:`lay_out` has said, and these ranks exchange sums."""

        def counts(_: Ranks, tensor: Tensor) -> bool:
            return _memory(tensor) in self._layouts or self._here.rank == 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "layout_of", lambda tensor: self._layouts.get(_memory(tensor)))
            patch.setattr(Ranks, "__init__", lambda ranks, parameters: None)
            patch.setattr(Ranks, "counts", counts)
            patch.setattr(Ranks, "sum_", lambda ranks, values: self._add_up(values))
            patch.setattr(Ranks, "_all", "simulated", raising=False)
            yield

    def run(self, function: Callable[[int], T]) -> list[T]:
        """Call a function with the number of each rank, all at a time; what it returns, by rank."""
        results: list[T] = [None] * self.size  # type: ignore[list-item]
        errors: list[BaseException] = []

        def call(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(self.size)]
        with self.in_place():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors
        return results


def _memory(tensor: Tensor) -> int:
    """What a parameter and its detached form have in common, also if a rank holds nothing of it."""
    return tensor.untyped_storage()._cdata


def cut(tensor: Tensor, layout: Layout | None) -> Tensor:
    """What a rank holds of a whole tensor, in memory of its own."""
    if layout is None:
        return tensor.clone()
    here = tensor.new_zeros(layout.local_shape)
    for part in layout.parts(_whole(tensor)):
        part.view(here).copy_((tensor if tensor.ndim else tensor.view(1))[part.places])
    return here


def put_together(pieces: Sequence[Tensor], layouts: Sequence[Layout | None], like: Tensor) -> Tensor:
    """The whole tensor of which ranks hold pieces."""
    if layouts[0] is None:
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        return pieces[0]
    found = torch.full_like(like, torch.nan)
    for piece, layout in zip(pieces, layouts, strict=True):
        assert layout is not None
        for part in layout.parts(_whole(like)):
            (found if found.ndim else found.view(1))[part.places] = part.view(piece)
    return found


def _whole(tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, length, 1) for length in tensor.shape or (1,))
