"""The unknown scales of one forward call, and the equations that its operations impose on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_ecopt.symmetry.labels import (
    GROUND,
    ZERO,
    IntArray,
    ParameterView,
    Value,
    align,
    compress,
    constant,
)


@dataclass(frozen=True)
class Operation:
    """One operation of the call: its ATen name and the module that was running."""

    name: str
    module: str


@dataclass(eq=False)
class Use:
    """One way in which a box-shaped region of a parameter was consumed.

    The elements of the region are multiplied by the scale ``incoming`` and divided by the scale ``outgoing``, two
    labels that broadcast to the region. ``additive`` marks a bias.
    """

    region: tuple[slice, ...]
    incoming: IntArray
    outgoing: IntArray
    additive: bool


@dataclass(eq=False)
class Tracer:
    """Collects scales and equations; knows nothing of how the operations are watched.

    Args:
        shapes: shapes of the parameters whose scales may change, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_scales: int = 1
    operation: Operation = Operation("input", "")
    uses: dict[str, list[Use]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    equalities: list[IntArray] = field(default_factory=list)
    groundings: list[tuple[Operation, IntArray]] = field(default_factory=list)

    def fresh(self, shape: Sequence[int]) -> IntArray:
        """New scales, one for each element of ``shape``."""
        count = int(np.prod(shape, dtype=np.int64))
        ids = np.arange(self.num_scales, self.num_scales + count, dtype=np.int64).reshape(tuple(shape))
        self.num_scales += count
        return ids

    def equate(self, first: IntArray, second: IntArray) -> IntArray:
        """Demand that two labels agree element by element; returns the common label."""
        first, second = np.broadcast_arrays(first, second)
        differ = (first != second) & (first != ZERO) & (second != ZERO)
        if differ.any():
            pairs = np.unique(np.stack([first[differ], second[differ]], 1), axis=0)
            grounded = (pairs == GROUND).any(1)
            if grounded.any():
                self.groundings.append((self.operation, np.unique(pairs[grounded].max(1))))
            if not grounded.all():
                self.equalities.append(pairs[~grounded])
        return compress(np.where(first == ZERO, second, first))

    def ground(self, value: Value) -> None:
        """Demand that the elements do not change."""
        if isinstance(value, ParameterView):
            self.assign(value, constant(GROUND, 0), constant(GROUND, 0), additive=False)
        else:
            self.equate(value, constant(GROUND, value.ndim))

    def uniform(self, ids: IntArray, axes: Iterable[int]) -> IntArray:
        """Demand one label along ``axes``; returns the label with size 1 there."""
        axes = tuple(axis for axis in axes if ids.shape[axis] > 1)
        if not axes:
            return ids
        representative = ids.max(axis=axes, keepdims=True)  # the largest number is not ZERO unless all are
        self.equate(ids, representative)
        return representative

    def materialise(self, view: ParameterView) -> IntArray:
        """The label of a parameter that is used as a tensor among others: one new scale per element of a vector.

        A parameter with more than one axis is grounded: its scales would be as many as its elements.
        """
        long_axes = [axis for axis in view.axes if axis.size > 1]
        ndim = max((axis.ndim for axis in view.axes), default=0)
        if len(long_axes) > 1:
            self.ground(view)
            return constant(GROUND, ndim)
        varying = view.varying()
        shape = [max(axis.shape[k] for axis in view.axes) if k in varying else 1 for k in range(ndim)]
        ids = self.fresh(shape)
        self.assign(view, ids, constant(GROUND, 0), additive=False)
        return ids

    def assign(self, view: ParameterView, incoming: IntArray, outgoing: IntArray, *, additive: bool) -> None:
        """Record that the elements of ``view`` scale by ``incoming - outgoing``, labels that broadcast to the view.

        Every further use of the same elements must agree. A use whose elements are not a regular box of the parameter,
        or overlap another box in part only, grounds the whole parameter.
        """
        self.seen.add(view.name)
        region = _box(view, self.shapes[view.name])
        if region is None:
            self._ground_parameter(view.name, (incoming, outgoing))
            return
        use = Use(region, self._pull_back(view, incoming), self._pull_back(view, outgoing), additive)
        for earlier in self.uses.setdefault(view.name, []):
            if earlier.region == use.region:
                earlier.incoming = self.equate(earlier.incoming, use.incoming)
                earlier.outgoing = self.equate(earlier.outgoing, use.outgoing)
                earlier.additive &= additive
                return
            if _overlap(earlier.region, use.region, self.shapes[view.name]):
                self._ground_parameter(view.name, (incoming, outgoing))
                return
        self.uses[view.name].append(use)

    def _ground_parameter(self, name: str, labels: Iterable[IntArray]) -> None:
        for ids in labels:
            self.ground(ids)
        for use in self.uses.get(name, []):
            self.ground(use.incoming)
            self.ground(use.outgoing)
        ndim = len(self.shapes[name])
        whole = tuple(slice(0, size, 1) for size in self.shapes[name])
        self.uses[name] = [Use(whole, constant(GROUND, ndim), constant(GROUND, ndim), additive=False)]

    def _pull_back(self, view: ParameterView, ids: IntArray) -> IntArray:
        """Carry a label of a view back to the box of the parameter that the view shows."""
        ndim = max((axis.ndim for axis in view.axes), default=0)
        ids = align(ids, ndim)
        # The parameter is the same wherever the view only repeats it.
        repeated = [k for k in range(ndim) if ids.shape[k] > 1 and k not in view.varying()]
        ids = compress(self.uniform(ids, repeated))
        changing = {k for k, size in enumerate(ids.shape) if size > 1}
        # Axes of the parameter on which the label depends; along the others it has size 1.
        wanted = {
            axis
            for axis, index in enumerate(view.axes)
            if changing & {k for k, size in enumerate(index.shape) if size > 1}
        }
        positions, shape = [], []
        for axis, index in enumerate(view.axes):
            numbers, position = np.unique(index, return_inverse=True)
            shape.append(len(numbers) if axis in wanted else 1)
            positions.append(position.reshape(index.shape) if axis in wanted else np.zeros((1,) * ndim, np.int64))
        *positions, ids = np.broadcast_arrays(*positions, ids)
        result = np.full(shape, ZERO, dtype=np.int64)
        result[tuple(positions)] = ids
        self.equate(result[tuple(positions)], ids)  # one element reached twice must have one label
        return compress(result)


def _box(view: ParameterView, shape: Sequence[int]) -> tuple[slice, ...] | None:
    """The slices of the parameter that ``view`` covers; ``None`` if it does not cover a regular box."""
    region = []
    for axis in view.axes:
        numbers = np.unique(axis)
        steps = np.unique(np.diff(numbers)) if len(numbers) > 1 else np.ones(1, np.int64)
        if len(numbers) == 0 or len(steps) > 1:
            return None
        region.append(slice(int(numbers[0]), int(numbers[-1]) + 1, int(steps[0])))
    # Axes that share an axis of the view (flattened together) must still cover their full product.
    shared = [k for k in view.varying() if sum(axis.shape[k] > 1 for axis in view.axes) > 1]
    if shared:
        together = [axis for axis in view.axes if any(axis.shape[k] > 1 for k in shared)]
        numbers = np.stack([axis.ravel() for axis in np.broadcast_arrays(*together)])
        if len(np.unique(numbers, axis=1).T) != np.prod([len(np.unique(axis)) for axis in together]):
            return None
    return tuple(region)


def _overlap(first: Sequence[slice], second: Sequence[slice], shape: Sequence[int]) -> bool:
    return all(
        len(np.intersect1d(np.arange(size)[a], np.arange(size)[b]))
        for a, b, size in zip(first, second, shape, strict=True)
    )
