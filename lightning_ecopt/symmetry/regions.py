"""Box-shaped regions of parameters: slices along every axis, ``(slice(0, 4, 1), slice(1, 8, 2))``.

Every slice has a start, a step, and a stop that is one more than its last number, so that equal regions are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_ecopt.symmetry.labels import IntArray, ParameterView

Region = tuple[slice, ...]


def box(view: ParameterView, shape: Sequence[int]) -> Region | None:
    """The slices of the parameter that ``view`` covers; ``None`` if it does not cover a regular box."""
    region = []
    for axis, (index, size) in enumerate(zip(view.axes, shape, strict=True)):
        if axis in view.picked:
            region.append(slice(0, size, 1))
            continue
        runs = _runs(np.unique(index))
        if len(runs) != 1:
            return None
        region += runs
    # Axes that share an axis of the view (flattened together) must still cover their full product.
    shared = [k for k in view.varying() if sum(axis.shape[k] > 1 for axis in view.axes) > 1]
    if shared:
        together = [axis for axis in view.axes if any(axis.shape[k] > 1 for k in shared)]
        numbers = np.stack([axis.ravel() for axis in np.broadcast_arrays(*together)])
        if len(np.unique(numbers, axis=1).T) != np.prod([len(np.unique(axis)) for axis in together]):
            return None
    return tuple(region)


def _runs(numbers: IntArray) -> list[slice]:
    """Slices that together have the given numbers, which increase; as few as there are changes of the step."""
    runs = []
    while len(numbers):
        steps = np.diff(numbers)
        end = 1 + int(np.argmax(np.append(steps != steps[0], True))) if len(steps) else 1
        step = int(steps[0]) if end > 1 else 1
        runs.append(slice(int(numbers[0]), int(numbers[end - 1]) + 1, step))
        numbers = numbers[end:]
    return runs


def _numbers(part: slice) -> IntArray:
    return np.arange(part.start, part.stop, part.step)


def overlap(first: Region, second: Region) -> Region | None:
    """The elements that two regions have in common; ``None`` if they have none."""
    if any(a.stop <= b.start or b.stop <= a.start for a, b in zip(first, second, strict=True)):
        return None
    common: list[slice] = []
    for a, b in zip(first, second, strict=True):
        part = [a] if a == b else _runs(np.intersect1d(_numbers(a), _numbers(b)))  # one run at most: steps are even
        if not part:
            return None
        common += part
    return tuple(common)


def without(region: Region, part: Region) -> list[Region]:
    """Regions that together have the elements of ``region`` that are not in ``part``, a region in it."""
    rest = []
    for axis, (all_of, inner) in enumerate(zip(region, part, strict=True)):
        if all_of != inner:
            outer = _runs(np.setdiff1d(_numbers(all_of), _numbers(inner)))
            rest += [(*part[:axis], run, *region[axis + 1 :]) for run in outer]
    return rest


def cut(ids: IntArray, region: Region, part: Region) -> IntArray:
    """Of a label that broadcasts to ``region``, what belongs to ``part``, a region in it."""
    for axis, (all_of, inner) in enumerate(zip(region, part, strict=True)):
        if all_of != inner and ids.shape[axis] > 1:
            ids = ids.take((_numbers(inner) - all_of.start) // all_of.step, axis)
    return ids
