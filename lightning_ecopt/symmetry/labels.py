"""Labels: by which factor each element of a tensor is multiplied when the network is rescaled.

A label is an integer array that broadcasts to the shape of its tensor; it has size 1 along every axis on which it does
not change. Each entry is a *scale*, the number of an unknown factor: elements with the same scale are multiplied by the
same factor. For images ``[batch, 3, height, width]`` the label ``[1, 3, 1, 1]`` with the scales 5, 6, 7 says that each
channel has a factor of its own. Two scales are no unknowns:

- ``FIXED``: the factor is one, the element must not change;
- ``ZERO``: the element is zero, so any factor will do.

A label that changes along several axes by a factor for each is kept as a :class:`Product` of labels that change along
one. A parameter has no label until an operation consumes it; until then a :class:`ParameterView` says which elements of
it a tensor shows. The functions here know nothing of networks: they do to an array what an operation did to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, TypeVar, cast

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
    ids = np.asarray(ids)  # indexing makes a number of an array without axes
    for axis, size in enumerate(ids.shape):
        if size > 1:
            first = ids.take([0], axis)
            if (ids == first).all():
                ids = first
    return ids


def align(ids: IntArray, ndim: int) -> IntArray:
    """Prepend axes of size 1, as broadcasting does, until there are ``ndim``."""
    return ids.reshape((1,) * (ndim - ids.ndim) + ids.shape)


def along_channels(ids: IntArray, ndim: int) -> IntArray:
    """Place the label ``[C]`` of a vector along the channels of a tensor ``[N, C, ...]`` with ``ndim`` axes."""
    return ids.reshape((1, -1) + (1,) * (ndim - 2))


def varying(*labels: IntArray) -> set[int]:
    """Axes along which one of the arrays has more than one entry."""
    return {k for ids in labels for k, size in enumerate(ids.shape) if size > 1}


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


@dataclass(eq=False)
class Product:
    """A label in factors: an element has the product of the scales that the factors give it.

    Args:
        factors: labels, which broadcast to the tensor. None of them is ``ZERO`` anywhere.
        whole: the label as one array, once that has been asked for.

    Example: the elements of ``x @ w`` scale by a factor for each row n, times one for each column p. That is the
    product of the labels [N, 1] and [1, P], N + P numbers; one array [N, P] would need a new scale for each element.
    """

    factors: tuple[IntArray, ...]
    whole: IntArray | None = None

    @property
    def ndim(self) -> int:
        """Number of axes of the tensor."""
        return self.factors[0].ndim

    def map(self, view: Callable[[IntArray], IntArray]) -> Product:
        """Do to the label what an operation did to the tensor."""
        return Product(tuple(view(ids) for ids in self.factors))


Label = IntArray | Product


def factors_of(label: Label) -> tuple[IntArray, ...]:
    """The factors of a label; an array is the only one of its own."""
    return label.factors if isinstance(label, Product) else (label,)


def clusters(factors: Iterable[IntArray]) -> list[set[int]]:
    """Sets of axes such that each factor changes along axes of one set only; one empty set if none changes."""
    found: list[set[int]] = []
    for ids in factors:
        axes = varying(ids)
        touched = [each for each in found if each & axes]
        if axes:
            found = [*(each for each in found if not each & axes), axes.union(*touched)]
    return found or [set()]


def crosses(*labels: Label) -> Iterator[list[list[IntArray]]]:
    """Parts of labels of one tensor, in factors, that are equal only if the labels are equal everywhere.

    If ``a(n) b(p) = c(n) d(p)`` for ``n = 0`` and all p, and for ``p = 0`` and all n, then for all n and p: divide both
    by the equation for ``n = p = 0``. So one row and one column of each label will do.
    """
    factors = [factors_of(label) for label in labels]
    for axes in clusters(chain(*factors)):
        yield [[ids if varying(ids) & axes else ids[(slice(1),) * ids.ndim] for ids in own] for own in factors]


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
        return varying(*self.axes)


Plain = IntArray | ParameterView
Value = Label | ParameterView
AnyValue = TypeVar("AnyValue", bound=Value)


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

    def simplified(self, simplify: Callable[[Label], Label]) -> Value | Cases:
        """The same with a simpler label; the label itself, if it is the same in all cases."""
        value = self.value if isinstance(self.value, ParameterView) else simplify(self.value)
        if all(array.shape[0] == 1 for array in arrays_in(value)):
            return map_value(value, lambda ids: ids[0])
        return replace(self, value=value)


def arrays_in(value: Value) -> list[IntArray]:
    """The arrays that a label or a parameter view is made of."""
    if isinstance(value, ParameterView):
        return [array for part in value.parts() for array in (*part.axes, part.factor)]
    return list(factors_of(value))


def are_alike(first: Value | Cases, second: Value | Cases) -> bool:
    """Whether two labels are the same, in the same cases. ``False`` may only say that it is not known."""
    if isinstance(first, Cases) and isinstance(second, Cases):
        return (first.choice, first.axes) == (second.choice, second.axes) and are_alike(first.value, second.value)
    if isinstance(first, ParameterView | Cases) or isinstance(second, ParameterView | Cases):
        return False
    pairs = factors_of(first), factors_of(second)
    return len(pairs[0]) == len(pairs[1]) and all(bool(np.all(a == b)) for a, b in zip(*pairs, strict=True))


def compressed(label: Label) -> Label:
    """The label with size 1 along every axis along which it does not change."""
    return map_value(label, compress)


def map_value(value: AnyValue, view: Callable[[IntArray], IntArray]) -> AnyValue:
    """Do to a label, or to a parameter view, what an operation did to the tensor."""
    changed = value.map(view) if isinstance(value, Product | ParameterView) else view(value)
    return cast(AnyValue, changed)
