"""Box-shaped regions of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_ecopt.symmetry.labels import ParameterView


def box(view: ParameterView, shape: Sequence[int]) -> tuple[slice, ...] | None:
    """The slices of the parameter that ``view`` covers; ``None`` if it does not cover a regular box."""
    region = []
    for axis, (index, size) in enumerate(zip(view.axes, shape, strict=True)):
        if axis in view.picked:
            region.append(slice(0, size, 1))
            continue
        numbers = np.unique(index)
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


def overlap(first: Sequence[slice], second: Sequence[slice], shape: Sequence[int]) -> bool:
    """Whether two regions of a parameter have elements in common."""
    return all(
        len(np.intersect1d(np.arange(size)[a], np.arange(size)[b]))
        for a, b, size in zip(first, second, shape, strict=True)
    )
