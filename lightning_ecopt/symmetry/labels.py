"""Labels: by which factor each element of a tensor is multiplied when the network is rescaled.

A label is an integer array that broadcasts to the shape of its tensor; it has size 1 along every axis on which it does
not change. Each entry is a *scale*, the number of an unknown factor: elements with the same scale are multiplied by the
same factor. For images ``[batch, 3, height, width]`` the label ``[1, 3, 1, 1]`` with the scales 5, 6, 7 says that each
channel has a factor of its own. Two scales are no unknowns:

- ``FIXED``: the factor is one, the element must not change;
- ``ZERO``: the element is zero, so any factor will do.

A parameter has no label until an operation consumes it; until then a :class:`ParameterView` says which elements of it a
tensor shows. The functions here know nothing of networks: they do to an array what an operation did to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

FIXED = 0
ZERO = -1


def constant(number: int, ndim: int) -> IntArray:
    """The label of a tensor with ``ndim`` axes all of whose elements have one scale."""
    return np.full((1,) * ndim, number, dtype=np.int64)


def compress(ids: IntArray) -> IntArray:
    """Shrink to size 1 every axis along which ``ids`` does not change."""
    for axis, size in enumerate(ids.shape):
        if size > 1:
            first = ids.take([0], axis)
            if (ids == first).all():
                ids = first
    return ids


def varying(*labels: IntArray) -> set[int]:
    """Axes along which one of the arrays has more than one entry."""
    return {k for ids in labels for k, size in enumerate(ids.shape) if size > 1}


def align(ids: IntArray, ndim: int) -> IntArray:
    """Prepend axes of size 1, as broadcasting does, until there are ``ndim``."""
    return ids.reshape((1,) * (ndim - ids.ndim) + ids.shape)


def along_channels(ids: IntArray, ndim: int) -> IntArray:
    """Place the label ``[C]`` of a vector along the channels of a tensor ``[N, C, ...]`` with ``ndim`` axes."""
    return ids.reshape((1, -1) + (1,) * (ndim - 2))


def stretch(ids: IntArray, shape: Sequence[int], axes: Iterable[int]) -> IntArray:
    """Repeat ``ids`` to the size of the tensor, whose shape is ``shape``, along ``axes`` only."""
    target = list(ids.shape)
    for axis in axes:
        target[axis] = shape[axis]
    return np.broadcast_to(ids, target)


def unique_rows(table: IntArray) -> tuple[IntArray, IntArray]:
    """Find the different rows of a table ``[N, K]`` of non-negative numbers.

    Returns:
        the different rows ``[M, K]``, and for each row of the table its number among them ``[N]``.
    """
    # Column by column, rows that agree so far share a number; np.unique(axis=0) would compare whole rows, far slower.
    place = np.zeros(len(table), dtype=np.int64)
    for column in table.T:
        _, first, place = np.unique(
            place * (column.max(initial=0) + 1) + column, return_index=True, return_inverse=True
        )
        place = place.reshape(-1)
    return table[first], place


def reshape(ids: IntArray, old: Sequence[int], new: Sequence[int]) -> IntArray:
    """Do to a label what ``tensor.reshape(new)`` did to its tensor of shape ``old``.

    Axes are matched in groups of equal size: from ``[2, 3, 4]`` to ``[6, 4]``, the groups ``[2, 3]`` and ``[6]``, then
    ``[4]`` and ``[4]``. The label is repeated to the size of its tensor within groups along which it changes, only.
    """
    if 0 in old:
        return constant(FIXED, len(new))
    if ids.size == 1:
        return ids.reshape((1,) * len(new))
    source: list[int] = []
    target: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        changes = any(size > 1 for size in ids.shape[first_old:i])
        source += [size if changes else 1 for size in old[first_old:i]]
        target += [size if changes else 1 for size in new[first_new:j]]
    return compress(np.broadcast_to(ids, source).reshape(target))


@dataclass(frozen=True, eq=False)
class ParameterView:
    """A parameter, or what view operations have made of it, before an operation has consumed it.

    Args:
        name: the parameter's name in the module.
        axes: for each axis of the parameter the index from which every element of the view came, an array that
            broadcasts to the shape of the view. View operations act on these arrays as they act on labels.
        factor: the label of what the elements have been multiplied by since; it broadcasts to the view.
        picked: axes of the parameter along which data decides which elements the view shows, as in an embedding.
        added: other parameters that have been added to it.

    Example::

        weight = ParameterView.whole("weight", (3, 4))  # axes: [[0], [1], [2]] and [[0, 1, 2, 3]]
        weight.map(lambda axis: axis.T)  # weight.t(): axes [[0, 1, 2]] and [[0], [1], [2], [3]]
    """

    name: str
    axes: tuple[IntArray, ...]
    factor: IntArray
    picked: frozenset[int] = frozenset()
    added: tuple[ParameterView, ...] = ()

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> ParameterView:
        """The view that is the parameter itself. A scalar counts as a vector of one element."""
        if not shape:
            return cls(name, (np.zeros((), dtype=np.int64),), constant(FIXED, 0))
        return cls(
            name,
            tuple(
                np.arange(size, dtype=np.int64).reshape([-1 if k == axis else 1 for k in range(len(shape))])
                for axis, size in enumerate(shape)
            ),
            constant(FIXED, len(shape)),
        )

    @property
    def ndim(self) -> int:
        """Number of axes of the view."""
        return max((axis.ndim for axis in self.axes), default=0)

    @property
    def is_matrix(self) -> bool:
        """Whether the view changes along more than one axis of the parameter."""
        return sum(axis.size > 1 for axis in self.axes) > 1

    def map(self, view: Callable[[IntArray], IntArray]) -> ParameterView:
        """Do to the view what an operation did to the tensor."""
        return self.each(lambda v: replace(v, axes=tuple(view(axis) for axis in v.axes), factor=view(v.factor)))

    def each(self, change: Callable[[ParameterView], ParameterView]) -> ParameterView:
        """Change the view, and all that have been added to it, one by one."""
        return replace(change(replace(self, added=())), added=tuple(part.each(change) for part in self.added))

    def parts(self) -> list[ParameterView]:
        """The view and all that have been added to it, each by itself."""
        return [replace(self, added=()), *(part for view in self.added for part in view.parts())]

    def shows_same(self, other: ParameterView) -> bool:
        """Whether another view shows the same elements in the same order, of the same parameter or of a copy of it."""
        mine, others = self.parts(), other.parts()
        first, second = mine[0], others[0]
        if len(mine) + len(others) > 2:
            return all(part.shows_same(first) for part in [*mine[1:], *others])
        if first.name != second.name or first.picked or second.picked or first.ndim != second.ndim:
            return False
        pairs = zip((*first.axes, first.factor), (*second.axes, second.factor), strict=True)
        return all(np.array_equal(one, other) for one, other in pairs)

    def varying(self) -> set[int]:
        """The axes of the view along which the element of the parameter changes."""
        return {k for axis in self.axes for k, size in enumerate(axis.shape) if size > 1}


Value = IntArray | ParameterView


class Choice(NamedTuple):
    """What data choose: which of ``number`` cases holds for each row.

    Choices that are equal choose the same: they are of one kind, and read tensors of the same ``values``.
    """

    kind: str
    values: int
    number: int


@dataclass(frozen=True, eq=False)
class Cases:
    """Labels of a tensor for whose rows data choose among cases, such as the experts of a mixture.

    Whatever the data choose, the row r of the tensor is row r of one of several tensors that nobody computes, one for
    each case. These have ``value`` as their label. All that is done row by row is done to each of them.

    Args:
        choice: by which rows have their cases. Tensors with equal choices, and rows along the same axes, have the same
            cases in the same rows.
        axes: the axes along which the rows lie, in the order in which the choice has them.
        value: the label, or the parameter view, with one more axis in front, that of the cases.

    Example: of ``weight[expert]``, where ``weight`` is [experts, out, in], the rows lie along axis 0. The value is the
    view [experts, 1, out, in] of all of ``weight``.
    """

    choice: Choice
    axes: tuple[int, ...]
    value: Value

    def simplified(self, simplify: Callable[[IntArray], IntArray]) -> Value | Cases:
        """The same with a simpler label; the label itself, if it is the same in all cases."""
        value = self.value if isinstance(self.value, ParameterView) else simplify(self.value)
        if isinstance(value, ParameterView):
            arrays = [array for part in value.parts() for array in (*part.axes, part.factor)]
        else:
            arrays = [value]
        if all(array.shape[0] == 1 for array in arrays):
            return map_value(value, lambda ids: ids[0])
        return replace(self, value=value)

    def is_like(self, other: object) -> bool:
        """Whether the other has the same label in the same cases."""
        return (
            isinstance(other, Cases)
            and (self.choice, self.axes) == (other.choice, other.axes)
            and not isinstance(self.value, ParameterView)
            and not isinstance(other.value, ParameterView)
            and np.array_equal(self.value, other.value)
        )


def map_value(value: Value, view: Callable[[IntArray], IntArray]) -> Value:
    """Do to a label, or to a parameter view, what an operation did to the tensor."""
    return value.map(view) if isinstance(value, ParameterView) else view(value)
