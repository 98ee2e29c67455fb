"""Boxes of tensors with the entries of their two sides, and the passes over them that kernels may make.

In C each pass reads memory once, and is one call however many tensors there are. Where that cannot be, kernels say so,
and the caller takes tensor operations.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import is_plain

#: Most axes of a box, after those that are one in memory have been joined; ``passes.c`` has the same.
AXES = 8
#: The tensors of some boxes; ``None`` for boxes that are left out.
Operands = Sequence[Tensor | None]


class Boxes(NamedTuple):
    """Boxes of one type, as C sees them.

    Args:
        table: what ``passes.c`` calls Box, of each.
        places: the number of each among all boxes, and where it begins in its two tensors, in bytes.
        elements: number of elements of each.
    """

    table: array[int]
    places: list[tuple[int, int, int]]
    elements: list[int]

    def addresses(self, first: Operands, second: Operands) -> array[int]:
        """Of both tensors of each box."""
        found = array("q")
        for k, at, other_at in self.places:
            found.append(_present(first[k]).data_ptr() + at)
            found.append(_present(second[k]).data_ptr() + other_at)
        return found


class Sides:
    """The entries of both sides of boxes of tensors; what kernels in C are told of them is kept.

    Args:
        views: of each box: makes a view of a tensor.
        shapes: of the two sides of each box, which broadcast to it.

    Example: rows and columns of a weight::

        sides = Sides([lambda weight: weight], [((64, 1), (1, 32))])
        sums = kernels.both_sides(sides, [weight], [gradient], sign=-1.0)  # [2, 96]
    """

    def __init__(
        self, views: Sequence[Callable[[Tensor], Tensor]], shapes: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> None:
        self._views, self._shapes = views, shapes
        self._starts = [0, *accumulate(prod(side) for both in shapes for side in both)]
        # What was seen at the last look, and what C is told of it.
        self._last: tuple[list[Any], dict[torch.dtype, Boxes] | None] = ([], None)

    @property
    def entries(self) -> int:
        """Number of entries of both sides of all boxes: E."""
        return self._starts[-1]

    def boxes(self, first: Operands, second: Operands) -> dict[torch.dtype, Boxes] | None:
        """The boxes that are not left out, by type; ``None`` if there is one that C cannot see."""
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
            if other.shape != one.shape or other.dtype != one.dtype or not (is_plain(one) and is_plain(other)):
                return None
            view, other_view = self._views[k](one), self._views[k](other)
            if not all(_broadcasts(side, view.shape) for side in self._shapes[k]):
                return None
            axes = _axes(view, other_view, self._shapes[k])
            if axes is None:
                return None
            if view.numel():
                table, places, elements = found.get(one.dtype, Boxes(array("q"), [], []))
                table.append(len(axes))
                table.extend(n for column in zip(*axes, *[(0,) * 5] * (AXES - len(axes)), strict=True) for n in column)
                table.extend(self._starts[2 * k : 2 * k + 2])
                places.append((k, view.data_ptr() - one.data_ptr(), other_view.data_ptr() - other.data_ptr()))
                elements.append(view.numel())
                found[one.dtype] = Boxes(table, places, elements)
        return found


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), is_plain(tensor)


def _broadcasts(side: Sequence[int], shape: Sequence[int]) -> bool:
    return len(side) == len(shape) and all(own in (1, size) for own, size in zip(side, shape, strict=True))


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


class Passes(Protocol):
    """The passes over whole tensors that kernels may be able to make."""

    def both_sides(self, sides: Sides, first: Operands, second: Operands, sign: float) -> Tensor | None:
        """Return the sums of the products of two tensors, and of their magnitudes, for each entry of either side.

        Args:
            sides: of boxes of the tensors.
            first: the tensors of each box; ``None`` where it is left out, and sums are zero.
            second: what they are multiplied by.
            sign: of the products in sums over the second side.

        Returns:
            ``float64[2, E]``, or ``None`` if the caller is to add up by tensor operations.
        """

    def rescale_(self, sides: Sides, tensors: Operands, factors: Callable[[], Tensor]) -> bool:
        """Multiply tensors in place by the factors of the entries of both sides, and round once.

        Args:
            sides: of boxes of the tensors.
            tensors: of each box; ``None`` where it is left out.
            factors: returns them, ``float64[E]``.

        Returns:
            Whether it is done; if not, nothing has changed, and the caller is to do it by tensor operations.
        """

    def magnitudes(self, tensors: Sequence[Tensor], sample: int) -> Tensor | None:
        """Return what is looked at in tensors, ``float64[5, N]``, or ``None`` if the caller is to look.

        It is the largest magnitude, NaN if an element is NaN; how many elements have it; and of the first ``sample``
        elements how many are not zero, and how many of these end, in 32 bits, in four and in twelve zeros. In C all
        tensors must be of one type, with their elements in memory in the order of their axes.
        """
