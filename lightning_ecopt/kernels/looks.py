"""Sums over both sides of boxes, and magnitudes, as they are asked for by those who look at gradients and weights.

In C each is one pass over memory, and one call however many tensors there are. Where that cannot be, nothing is
returned, and the caller adds up by tensor operations.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import is_lazy

#: Most axes of a box, after those that are one in memory have been joined; ``looks.c`` has the same.
AXES = 8
#: The tensors of some boxes; ``None`` for boxes that are left out.
Operands = Sequence[Tensor | None]


class Boxes(NamedTuple):
    """Boxes of one type, as C sees them.

    Args:
        table: what ``looks.c`` calls Box, of each.
        places: the number of each among all boxes, and where it begins in its two tensors, in bytes.
        elements: of all.
    """

    table: array[int]
    places: list[tuple[int, int, int]]
    elements: int

    def addresses(self, first: Operands, second: Operands) -> array[int]:
        """Of both tensors of each box."""
        found = array("q")
        for k, at, other_at in self.places:
            found.append(_present(first[k]).data_ptr() + at)
            found.append(_present(second[k]).data_ptr() + other_at)
        return found


class Sides:
    """The entries of both sides of boxes of tensors; what C is told of them is kept.

    Args:
        views: of each box: makes a view of a tensor.
        shapes: of the two sides of each box, which broadcast to it.

    Example: rows and columns of a weight::

        sides = Sides([lambda weight: weight], [((64, 1), (1, 32))])
        sums = sides.sums(kernels, [weight], [gradient], sign=-1.0)  # [2, 96]
    """

    def __init__(
        self, views: Sequence[Callable[[Tensor], Tensor]], shapes: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> None:
        self._views, self._shapes = views, shapes
        self._starts = [0, *accumulate(prod(side) for both in shapes for side in both)]
        self._last: tuple[list[Any], dict[torch.dtype, Boxes] | None] = (
            [],
            None,
        )  # what was seen, and what C is told of it

    @property
    def entries(self) -> int:
        """Number of entries of both sides of all boxes: E."""
        return self._starts[-1]

    def boxes(self, first: Operands, second: Operands | None = None) -> dict[torch.dtype, Boxes] | None:
        """The boxes that are not left out, by type; ``None`` if there is one that C cannot see."""
        second = first if second is None else second
        kinds = [None if one is None else _kind(one) for tensors in (first, second) for one in tensors]
        last = self._last
        if kinds != last[0]:
            self._last = last = kinds, self._made(first, second)
        return last[1]

    def _made(self, first: Operands, second: Operands) -> dict[torch.dtype, Boxes] | None:
        found: dict[torch.dtype, Boxes] = {}
        for k, (one, other) in enumerate(zip(first, second, strict=True)):
            if one is None or other is None:
                continue
            if other.dtype != one.dtype or is_lazy(one) or is_lazy(other) or not (one.is_cpu and other.is_cpu):
                return None
            view, other_view = self._views[k](one), self._views[k](other)
            axes = _axes(view, other_view, self._shapes[k])
            if axes is None:
                return None
            if view.numel():
                table, places, elements = found.get(one.dtype, Boxes(array("q"), [], 0))
                table.append(len(axes))
                table.extend(n for column in zip(*axes, *[(0,) * 5] * (AXES - len(axes)), strict=True) for n in column)
                table.extend(self._starts[2 * k : 2 * k + 2])
                places.append((k, view.data_ptr() - one.data_ptr(), other_view.data_ptr() - other.data_ptr()))
                found[one.dtype] = Boxes(table, places, elements + view.numel())
        return found


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), is_lazy(tensor)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # it was there when the table was made
    return tensor


def _axes(
    view: Tensor, other: Tensor, shapes: tuple[Sequence[int], Sequence[int]]
) -> list[tuple[int, int, int, int, int]] | None:
    """Of each axis of a box its size, and the steps in both tensors and in the entries of both sides.

    Axes are in the order in which they are in memory, and joined where they are one. ``None`` if there are too many.
    """
    steps = [[prod(side[axis + 1 :]) * (side[axis] > 1) for axis in range(len(side))] for side in shapes]
    every = list(zip(view.shape, view.stride(), other.stride(), *steps, strict=True))
    found: list[tuple[int, int, int, int, int]] = []
    for axis in sorted((each for each in every if each[0] > 1), key=lambda each: -each[1]):
        if found and all(outer == inner * axis[0] for outer, inner in zip(found[-1][1:], axis[1:], strict=True)):
            found[-1] = (found[-1][0] * axis[0], *axis[1:])
        else:
            found.append(axis)
    return (found or [(1, 1, 1, 0, 0)]) if len(found) <= AXES else None
