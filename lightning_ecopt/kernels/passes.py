"""The passes over weights, gradients and optimizer state that a step in the equivalent-class space consists of.

A *block* is a box-shaped part of a parameter whose elements share coefficients along some axes. A *place* is one set of
coefficients: a weight ``[out, in]`` with one coefficient for each row is a block of ``out`` places, and its ``shape``
is ``(out, 1)``, which broadcasts to the block; a bias ``[out]`` has the shape ``(out,)``. A pass works on B blocks at
once. It takes

- lists of B tensors, one list for the weights, one for their gradients, and so on: the views of the blocks in them;
- the B shapes of the places of these blocks;
- coefficients: vectors ``[P]`` over the places of all blocks, one block after the other, or numbers, or tensors without
  axes; in the steps also products of such. In the formulas a coefficient multiplies, element by element, the view that
  follows it.

Two passes return sums over the elements at each place:

========================  ========================  ==========
``sums_and_squares``      sum x, sum x^2            ``[2, P]``
``products``              sum x y                   ``[1, P]``
========================  ========================  ==========

Three change views in place, of weights w, gradients g, momentum m and mean squares v::

    affine_    x = times x + plus

    sgd_       m = fade m + gain g + shift + decay w
               w = keep w + move m + pull g + push

    adam_      d = gain g + shift + decay w
               m = m + first (d - m)
               v = (1 - second) v + second d^2
               w = keep w + move m / (root sqrt(v) + eps)    AMSGrad: with the largest v so far in the place of v

``gather`` and ``scatter_`` read and write single elements, each with a slot in a vector. Between the passes
``clipping``, ``free_gradient`` and ``allocate_`` work on vectors over rows and units: what the sums say of the
coefficients.

An equivalent-class step divides the weights by scales s, changes the gradients, lets the base optimizer take its step
and multiplies the weights by s again. Taken one by one, each of these reads and writes all weights. The coefficients
hold all of them, so that one pass does. For instance, SGD at w / s with gradients t g arrives at w - lr s t g: ``pull``
is -lr s t, and nothing else is given.

==========  =========================================================================  ===========
name        what it is                                                                 if left out
==========  =========================================================================  ===========
``times``   factor of a tensor
``plus``    what is added to a tensor                                                  0
``fade``    how much of the momentum stays: SGD's ``momentum``                         0
``gain``    factor of the gradient on its way into the state                           0
``shift``   what is added to the gradient on its way into the state                    0
``decay``   weight decay on its way into the state                                     0
``keep``    how much of the weight stays: rescaling, and decay beside the state        1
``move``    minus the length of the step along m, or along Adam's quotient             0
``pull``    minus the length of the step along the gradient itself                     0
``push``    what is added to the weight whatever m and g are                           0
``first``   weight of the newest gradient in the mean m: 1 - beta1
``second``  weight of its square in v: 1 - beta2
``root``    factor of sqrt(v): 1 / sqrt(1 - beta2^t) after t steps
``eps``     Adam's eps
==========  =========================================================================  ===========

Those without a value in the last column must be given to the passes that use them; ``adam_`` needs ``gain`` and
``move``, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_ecopt.common.sides import Passes
from lightning_ecopt.kernels.allocation import Allocated, Paths
from lightning_ecopt.kernels.clipping import Clipping, RowGradients

#: The views of B blocks in tensors of one sort, such as the gradients.
Views = Sequence[Tensor]
#: The shapes of the places of B blocks.
Shapes = Sequence[tuple[int, ...]]
#: A vector over all places ``[P]``, a tensor without axes, or a number.
Coefficient = Tensor | float


class Product(NamedTuple):
    """A coefficient ``factor * times[0] * times[1] / over``, of which kernels may make no vector of its own.

    Args:
        factor: a number, or a vector over all places.
        times: at most two vectors over all places.
        over: such a vector, if there is one.
    """

    factor: Coefficient
    times: tuple[Tensor, ...] = ()
    over: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Product:
        """The product of other vectors."""
        factor = change(self.factor) if isinstance(self.factor, Tensor) and self.factor.ndim else self.factor
        return Product(factor, tuple(map(change, self.times)), None if self.over is None else change(self.over))

    def value(self) -> Coefficient:
        """What it comes to."""
        found = self.factor
        for vector in self.times:
            found = vector if not isinstance(found, Tensor) and found == 1 else found * vector
        return found if self.over is None else found / self.over


#: What a pass takes for one of its names.
Given = Coefficient | Product | None


class Elements(NamedTuple):
    """Single elements of some tensors, each with a slot of its own in a vector.

    Args:
        counts: how many of them are in each tensor.
        at: their flat indices in their tensors, one tensor after the other, ``int32[n]`` or ``int64[n]``.
        slots: their entries in the vector, ``[n]`` of the same type.
        size: of the vector.
    """

    counts: Sequence[int]
    at: Tensor
    slots: Tensor
    size: int


class Kernels(Passes, Protocol):
    """Runs the passes in one way; see the module for what each of them computes."""

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """Return the sums of the elements at each place, and of their squares, ``[2, P]`` in ``dtype``."""

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """Return the sums of the products of two tensors at each place, ``[1, P]`` in ``dtype``."""

    def affine_(self, views: Views, *, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """Multiply by ``times`` and add ``plus``; if an operation fails, no view has changed, but for rounding."""

    def sgd_(
        self,
        weights: Views,
        gradients: Views,
        momenta: Views | None,
        *,
        shapes: Shapes,
        **coefficients: Given,
    ) -> None:
        """Take a step of SGD, without momentum if ``momenta`` is ``None``. Gradients are only read."""

    def adam_(
        self,
        weights: Views,
        gradients: Views,
        means: Views,
        squares: Views,
        maxima: Views | None,
        *,
        shapes: Shapes,
        **coefficients: Given,
    ) -> None:
        """Take a step of Adam, with AMSGrad if there are ``maxima`` of mean squares. Gradients are only read."""

    def gather(self, tensors: Sequence[Tensor | None], elements: Elements, dtype: torch.dtype) -> Tensor:
        """Return elements of tensors in a vector, ``[size]`` in ``dtype``, with zeros where there are none."""

    def scatter_(self, tensors: Sequence[Tensor | None], elements: Elements, values: Tensor) -> None:
        """Overwrite elements of tensors with those of a vector ``[size]``; ``None`` are left out."""

    def clipping(self, gradients: RowGradients) -> Clipping:
        """Find how gradients are centred and clipped: :func:`~lightning_ecopt.kernels.clipping.clipping`."""

    def free_gradient(self, paths: Paths, sums: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
        """Find dL/dv of free coordinates: :func:`~lightning_ecopt.kernels.allocation.free_gradient`."""

    def allocate_(self, paths: Paths, factor: Tensor, weights: Tensor, max_ratio: float | None) -> Allocated:
        """Take over free coordinates: :func:`~lightning_ecopt.kernels.allocation.allocate_`."""
