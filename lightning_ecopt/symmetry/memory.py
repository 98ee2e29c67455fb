"""The labels of all tensors of a call, kept by the memory that they describe.

Two views of one piece of memory have labels that depend on each other: after ``x[:, 0] = 0`` the label of ``x`` has
changed, too. So a label belongs to a storage and to a view of it, that is, offset, shape and strides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ecopt.symmetry.aten import is_inexact
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    Cases,
    IntArray,
    ParameterView,
    Value,
    align,
    are_alike,
    arrays_in,
    compress,
    compressed,
    constant,
    map_value,
    stretch,
    varying,
)
from lightning_ecopt.symmetry.picking import in_any_case
from lightning_ecopt.symmetry.scales import MOST_ENTRIES

View = tuple[int, tuple[int, ...], tuple[int, ...], int]  # offset, shape and strides in elements; bytes of an element
_SPECIAL = (ParameterView, Cases)  # no labels


@dataclass(eq=False)
class _Storage:
    """The labels of one piece of memory, by the views of it that have been seen.

    The first of these views counts as the whole: the labels of further ones are found from its label.
    """

    reference: StorageWeakRef  # keeps the address from being used again, by which the labels are found
    age: int  # how many steps had been taken when it was made
    external: bool = False  # was there before the call, so that others may read it afterwards
    is_parameter: bool = False
    is_copy: bool = False  # follows a parameter, so that whatever is written to it must scale like that
    marks: frozenset[str] = frozenset()  # names of parameters from whose gradients it was made
    views: dict[View, Value | Cases] = field(default_factory=dict)


class Memory:
    """Labels of all tensors that the call has touched.

    Args:
        equations: where labels are related.

    Attributes:
        num_steps: how many steps of optimizers there have been. What was computed before the last one is held fixed if
            it is read again, because a step may rescale weights, and not what was computed from them.
        has_marks: whether there are tensors with marks.
    """

    def __init__(self, equations: Equations) -> None:
        self.equations = equations
        self.storages: dict[int, _Storage] = {}
        self.num_steps = 0
        self.has_marks = False

    def _find(self, tensor: Tensor) -> tuple[_Storage, bool] | None:
        """The storage of a tensor and whether it is new; ``None`` for a tensor without one (sparse, opaque)."""
        storage = storage_of(tensor)
        if storage is None:
            return None
        found = self.storages.get(storage._cdata)
        if found is None:
            found = self.storages[storage._cdata] = _Storage(StorageWeakRef(storage), self.num_steps)
            return found, True
        return found, False

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Register a parameter whose scales are looked for."""
        found = self._find(tensor)
        if found is None or not is_ordinary(tensor) or not tensor.dtype.is_floating_point:
            self.equations.hold_fixed(ParameterView.whole(name, tensor.shape))
            return
        storage, _ = found
        storage.external = storage.is_parameter = True
        storage.views[view_of(tensor)] = ParameterView.whole(name, tensor.shape)

    def add_copy(self, name: str, tensor: Tensor) -> None:
        """Register a tensor that is rescaled whenever a parameter is: its uses are uses of the parameter."""
        self.add_parameter(name, tensor)
        found = self._find(tensor)
        if found is not None:
            found[0].is_copy = True

    def add_again(self, name: str, tensor: Tensor) -> None:
        """Register a parameter anew if it has other memory by now: ``p.data = ...``."""
        storage = storage_of(tensor)
        found = None if storage is None else self.storages.get(storage._cdata)
        if found is None or not found.is_parameter:
            if found is not None:
                found.views = {}
            self.add_parameter(name, tensor)

    def read(self, tensor: Tensor) -> Value | Cases:
        """The label of a tensor. Memory first met as an input is constant and stays after the call."""
        found = self._find(tensor) if is_ordinary(tensor) else None
        if found is None:
            return constant(FIXED, tensor.dim())
        storage, new = found
        view = view_of(tensor)
        if new:
            storage.external = True
            storage.views[view] = constant(FIXED, tensor.ndim)
        if storage.age < self.num_steps and not storage.is_parameter:
            self._fix_all(storage)
            storage.age = self.num_steps
        if view not in storage.views:  # one that nobody saw being made, or that was not there before a change in place
            self._derive(storage, view)
        value = storage.views[view]
        if isinstance(value, Cases):
            value = storage.views[view] = value.simplified(self.equations.simplify)
        elif not isinstance(value, ParameterView):
            value = storage.views[view] = self.equations.simplify(value)
        return value

    def _derive(self, storage: _Storage, view: View) -> None:
        """Find the label of a view from the label of the whole; where that is impossible, hold all views fixed."""
        whole, value = next(iter(storage.views.items()), (view, constant(FIXED, len(view[1]))))
        found = None if isinstance(value, Cases) else _derived(value, whole, view)
        if found is None:
            self._fix_all(storage)
            found = constant(FIXED, len(view[1]))
        storage.views[view] = found

    def mark(self, tensors: Iterable[Tensor], names: Collection[str]) -> None:
        """Remember that tensors were made from gradients by the named parameters."""
        for found in map(self._find, tensors) if names else ():
            if found is not None and not found[0].is_parameter:
                found[0].marks |= frozenset(names)
                self.has_marks = True

    def marks(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Names of the parameters from whose gradients any of the tensors was made."""
        if not self.has_marks:
            return frozenset()
        storages = [storage_of(tensor) for tensor in tensors]
        found = [self.storages.get(storage._cdata) for storage in storages if storage is not None]
        return frozenset().union(*(storage.marks for storage in found if storage is not None))

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether an operation has read or written the memory of the tensor."""
        storage = storage_of(tensor)
        return storage is None or storage._cdata in self.storages

    def is_new(self, tensor: Tensor) -> bool:
        """Whether the call has made the memory of the tensor."""
        storage = storage_of(tensor)
        found = None if storage is None else self.storages.get(storage._cdata)
        return found is not None and not found.external

    def write(self, tensor: Tensor, value: Value | Cases, *, always_empty: bool = False) -> None:
        """Set the label of the output of an operation.

        An empty tensor fits any label, but only if it would be empty for every batch. ``always_empty=True`` says so;
        with an empty example batch it is false, and the label is held fixed.
        """
        found = self._find(tensor) if is_ordinary(tensor) else None
        if found is None or not is_inexact(tensor) or (tensor.numel() == 0 and not always_empty):
            self.equations.hold_fixed(value)
            value = constant(FIXED, tensor.dim())
        elif tensor.numel() == 0:
            value = constant(ZERO, tensor.dim())
        if found is not None:
            if isinstance(value, Cases):
                value = self._in_place_of(found[0].views.get(view_of(tensor)), value.simplified(compressed))
            elif not isinstance(value, ParameterView):
                value = compressed(value)
            found[0].views[view_of(tensor)] = value

    def _in_place_of(self, earlier: Value | Cases | None, value: Value | Cases) -> Value | Cases:
        """The label of a view that was seen before; one label for all cases if their rows lay along other axes then.

        Views that differ in the order of axes of size one, as in an example with one row, look the same.
        """
        if isinstance(earlier, Cases) and isinstance(value, Cases) and earlier.axes != value.axes:
            return in_any_case(self.equations, value)
        return value

    def overwrite(self, tensor: Tensor, value: Value | Cases) -> None:
        """Set the label of memory that an operation has changed in place.

        A part of the memory may get a label of its own if it is a box of the whole. Otherwise, and if the memory was
        there before the call, all labels of the memory are held fixed, as a later reader would miss the change.
        """
        before = self.read(tensor)
        if isinstance(before, ParameterView) and isinstance(value, ParameterView):
            is_same = before.shows_same(value)
        else:
            is_same = are_alike(before, value)
        if is_same:
            return
        found = self._find(tensor)
        if found is not None and found[0].is_copy and isinstance(before, ParameterView):
            self.tie(before, value)
            return
        if found is not None:
            storage, view = found[0], view_of(tensor)
            if not storage.external:
                if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                    storage.views = {}
                    self.write(tensor, value)
                    return
                whole, base = next(iter(storage.views.items()))
                box = _box(whole, view)
                if box is not None and not isinstance(base, _SPECIAL) and not isinstance(value, _SPECIAL):
                    labels = self.equations.whole(base), self.equations.whole(value)
                    storage.views = {whole: box.put(*labels, whole[1])}  # other views are found from it again
                    return
            self._fix_all(storage)
            storage.views[view] = constant(FIXED, tensor.ndim)
        self.equations.hold_fixed(value)

    def tie(self, parameter: ParameterView, value: Value | Cases) -> None:
        """Demand that the elements of a parameter scale by a label."""
        value = in_any_case(self.equations, value) if isinstance(value, Cases) else value
        ids = self.equations.materialise(value) if isinstance(value, ParameterView) else self.equations.whole(value)
        self.equations.assign(parameter, align(ids, parameter.ndim), constant(FIXED, 0), additive=False)

    def _fix_all(self, storage: _Storage) -> None:
        for view, value in storage.views.items():
            self.equations.hold_fixed(value)
            storage.views[view] = constant(FIXED, len(view[1]))


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor; ``None`` for a tensor without one (sparse, opaque)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def view_of(tensor: Tensor) -> View:
    """Offset, shape and strides of a tensor in its storage, and how large its elements are."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()


def is_ordinary(tensor: Tensor) -> bool:
    """Whether the tensor is dense, and its class leaves the meaning of operations alone."""
    kind = type(tensor)
    plain = issubclass(kind, FakeTensor) or kind.__torch_dispatch__ in _PLAIN
    return plain and tensor.layout is torch.strided and not tensor.is_nested


_PLAIN = (Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl)


@dataclass(frozen=True, eq=False)
class _Box:
    """A view that shows a box of the whole, its axes in any order.

    Args:
        part: the slices of the whole.
        axes: for each axis of the view its axis in the whole, ``None`` for one along which nothing changes.
    """

    part: tuple[slice, ...]
    axes: tuple[int | None, ...]

    def of(self, ids: IntArray) -> IntArray:
        """The label of the view, from the label ``ids`` of the whole."""
        taken = ids[tuple(slice(None) if size == 1 else part for size, part in zip(ids.shape, self.part, strict=True))]
        kept = [axis for axis in self.axes if axis is not None]
        taken = taken.transpose(*kept, *(axis for axis in range(ids.ndim) if axis not in kept))
        taken = taken.reshape(taken.shape[: len(kept)])
        return np.expand_dims(taken, tuple(k for k, axis in enumerate(self.axes) if axis is None))

    def put(self, ids: IntArray, new: IntArray, shape: Sequence[int]) -> IntArray:
        """The label of the whole, which was ``ids``, after the view has got the label ``new``."""
        kept = [axis for axis in self.axes if axis is not None]
        new = new.squeeze(tuple(k for k, axis in enumerate(self.axes) if axis is None)).transpose(np.argsort(kept))
        new = np.expand_dims(new, tuple(axis for axis in range(len(shape)) if axis not in kept))
        partial = {axis for axis, part in enumerate(self.part) if part != slice(None)}
        result = np.array(stretch(ids, shape, partial | {axis for axis, size in enumerate(new.shape) if size > 1}))
        result[self.part] = new
        return compress(result)


def _box(whole: View, view: View) -> _Box | None:
    """Find the box of ``whole`` that ``view`` shows; ``None`` if it shows no box, or complex numbers as real ones.

    An axis of the view belongs to an axis of the whole if its stride is a multiple of that axis' stride, and it does
    not reach beyond that axis' end.
    """
    offset, shape, strides, size_of_element = whole
    if view[3] != size_of_element:
        return None
    rest = view[0] - offset
    part = [slice(None)] * len(shape)
    starts = {}
    smallest = None
    for axis in sorted((k for k, size in enumerate(shape) if size > 1), key=lambda k: -strides[k]):
        if smallest is not None and strides[axis] * shape[axis] > smallest:
            return None  # axes overlap
        smallest = strides[axis]
        starts[axis], rest = divmod(rest, smallest) if smallest else (0, -1)
        if not 0 <= starts[axis] < shape[axis]:
            return None
    if rest:
        return None
    axes: list[int | None] = []
    for size, stride in zip(view[1], view[2], strict=True):
        if size == 1 or stride == 0:
            axes.append(None)
            continue
        fitting = [
            axis
            for axis, start in starts.items()
            if axis not in axes
            and stride % strides[axis] == 0
            and start + (size - 1) * (stride // strides[axis]) < shape[axis]
        ]
        if not fitting:
            return None
        axis = max(fitting, key=lambda k: strides[k])
        step = stride // strides[axis]
        if (starts[axis], size, step) != (0, shape[axis], 1):
            part[axis] = slice(starts[axis], starts[axis] + (size - 1) * step + 1, step)
        axes.append(axis)
    for axis, start in starts.items():
        if axis not in axes:
            part[axis] = slice(start, start + 1)
    return _Box(tuple(part), tuple(axes))


def _derived(value: Value, whole: View, view: View) -> Value | None:
    """The label of a view, from that of the whole; ``None`` if it cannot be found."""
    arrays = arrays_in(value)
    if not isinstance(value, ParameterView):
        if not varying(*arrays):
            return map_value(value, lambda ids: ids.reshape((1,) * len(view[1])))
        box = _box(whole, view)
        if box is not None:
            return map_value(value, box.of)
    places = _places(whole, view, varying(*arrays))
    nowhere = np.zeros((1,) * len(view[1]), dtype=np.int64)

    def indices(ids: IntArray) -> list[IntArray]:
        return [place if size > 1 else nowhere for place, size in zip(places or (), ids.shape, strict=True)]

    if places is None or any(np.broadcast(*indices(ids)).size > MOST_ENTRIES for ids in arrays if ids.ndim):
        return None
    return map_value(value, lambda ids: compress(ids[tuple(indices(ids))]))


def _places(whole: View, view: View, axes: set[int]) -> list[IntArray] | None:
    """The indices along axes of ``whole`` of the elements of a view, which may read some of them twice; 0 along others.

    An element is found by its place in memory. ``None`` if ``whole`` has gaps or elements of another size, the view
    reads beyond it.
    """
    first = view[0] - whole[0]
    reach = [(size - 1) * step for size, step in zip(*view[1:3], strict=True)]
    is_even = _is_dense(*whole[1:3]) and whole[3] == view[3]  # no complex numbers as real ones
    if not is_even or 0 in view[1] or first < 0 or first + sum(reach) >= prod(whole[1]):
        return None
    places = [np.zeros((1,) * len(reach), dtype=np.int64)] * len(whole[1])
    for axis in axes:
        size, stride = whole[1][axis], whole[2][axis]
        steps = {k: step for k, step in enumerate(view[2]) if step % (stride * size)}  # others go round
        inside = {k for k, step in steps.items() if step % stride}
        if first % stride + sum(reach[k] for k in inside) < stride:
            steps = {k: step for k, step in steps.items() if k not in inside}  # these stay at one index
        place = np.full_like(places[axis], first)
        for k, step in steps.items():
            place = place + step * np.expand_dims(np.arange(view[1][k]), [n for n in range(len(reach)) if n != k])
        places[axis] = place // stride % size
    return places


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie without gaps, and each by itself."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
