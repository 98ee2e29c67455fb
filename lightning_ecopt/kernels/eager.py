"""The passes over weights, gradients and state that a step in the equivalent-class space consists of.

Each takes lists of views, one for each block of rows, and the shapes in which vectors over the P places of all blocks
broadcast to them. What follows a vector's name in the formulas below is the view that it is applied to, element by
element. Coefficients are such vectors ``[P]``, numbers, or tensors without axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

Views = Sequence[Tensor]
Shapes = Sequence[tuple[int, ...]]
Coefficient = Tensor | float
#: Elements of a view that are worked on at a time where operations have results of their own. On a CPU these stay in
#: the cache; an accelerator is given more at a time.
PIECE = 1 << 18
ACCELERATOR = 32
#: Position of the gradients, which are only read, among the lists of a step.
GRADIENTS = 1


class Kernels(Protocol):
    """One way to run the passes."""

    @property
    def partial(self) -> Kernels:
        """The way to run them where only some of the parameters take part."""

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """Sums of the elements at each place, and of their squares, ``[2, P]``."""

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """Sums of the products of two tensors at each place, ``[1, P]``."""

    def affine_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """Of one list, ``times x + plus``."""

    def sgd_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """Of weights w, gradients g and momenta m, which may be ``None``.

            m = fade m + gain g + shift + decay w    w = keep w + move m + pull g + push

        What is left out is 1 for ``keep``, and 0 for others.
        """

    def adam_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """Of weights w, gradients g, means m, mean squares v, and the maxima of these, which may be ``None``.

        d = gain g + shift + decay w    m = m + first (d - m)    v = v + second (d^2 - v)
        w = keep w + move m / (root sqrt(v) + eps)    with the maximum of all v, if these are there, for v
        """

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function of vectors."""


class EagerKernels:
    """Operation by operation, in place; what needs memory of its own is done piece by piece.

    The blocks in front that have one element at each place, all biases and gains, are worked on as one vector.
    """

    @property
    def partial(self) -> Kernels:
        """See :class:`Kernels`."""
        return self

    @property
    def _piece(self) -> int | None:
        return PIECE

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`Kernels`."""
        few = _num_single(views, shapes)
        single = [_flat(views[:few], dtype)] if few else []
        found = [torch.stack([values, values.square()]) for values in single]
        if few < len(views):
            found.append(self.run(_sums_and_squares, views[few:], shapes[few:], dtype))
        return torch.cat(found, 1)

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`Kernels`."""
        few = _num_single(views, shapes)
        found = [_flat(views[:few], dtype) * _flat(others[:few], dtype)] if few else []
        if few < len(views):
            found.append(self.run(_products, views[few:], others[few:], shapes[few:], dtype, self._piece))
        return torch.cat(found)[None]

    def affine_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`Kernels`."""
        self._in_place(_affine_, lists, shapes, coefficients)

    def sgd_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`Kernels`."""
        self._in_place(_sgd_, lists, shapes, coefficients)

    def adam_(self, *lists: Views | None, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`Kernels`."""
        self._in_place(_adam_, lists, shapes, coefficients)

    def _in_place(
        self,
        function: Callable[..., None],
        lists: Sequence[Views | None],
        shapes: Shapes,
        coefficients: Mapping[str, Coefficient | None],
    ) -> None:
        given = {name: value for name, value in coefficients.items() if value is not None}
        vectors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim == 1}
        numbers = {name: value for name, value in given.items() if name not in vectors}
        few = _num_single(lists[0] or (), shapes)
        if few:
            flat = [None if of is None else _flat(of[:few]) for of in lists]
            sizes = [prod(shape) for shape in shapes[:few]]
            own = {name: vector[: sum(sizes)] for name, vector in vectors.items()}
            function(*flat, **own, **numbers)
            for number, (of, whole) in enumerate(zip(lists, flat, strict=True)):
                if of is not None and whole is not None and number != GRADIENTS:
                    parts = [
                        part if view.ndim == 1 else part.view_as(view)
                        for part, view in zip(whole.split(sizes), of[:few], strict=True)
                    ]
                    torch._foreach_copy_(list(of[:few]), parts)
            vectors = {name: vector[sum(sizes) :] for name, vector in vectors.items()}
        if few < len(shapes):
            rest = [None if of is None else of[few:] for of in lists]
            size = self._piece if function is _adam_ else None  # others make nothing but what they change
            self.run(_each, function, rest, shapes[few:], vectors, numbers, size)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See :class:`Kernels`."""
        return function(*arguments)


def _each(
    function: Callable[..., None],
    lists: Sequence[Views | None],
    shapes: Shapes,
    vectors: Mapping[str, Tensor],
    numbers: Mapping[str, Coefficient],
    size: int | None,
) -> None:
    """Call a function for each block, or for pieces of it of at most about ``size`` elements."""
    first = lists[0]
    assert first is not None
    counts = [prod(shape) for shape in shapes]
    split = {name: vector.split(counts) for name, vector in vectors.items()}
    for k, (view, shape) in enumerate(zip(first, shapes, strict=True)):
        tensors = [None if of is None else of[k] for of in lists]
        own = {name: parts[k].view(shape).to(view.dtype) for name, parts in split.items()}
        length = _length(view, size)
        if length is None:
            function(*tensors, **own, **numbers)
            continue
        for start in range(0, len(view), length):
            part = slice(start, start + length)
            pieces = [None if tensor is None else tensor[part] for tensor in tensors]
            function(*pieces, **{name: v[part] if shape[0] > 1 else v for name, v in own.items()}, **numbers)


def _num_single(views: Sequence[Tensor], shapes: Shapes) -> int:
    """How many views, from the first on, have one element at each place."""
    pairs = enumerate(zip(views, shapes, strict=True))
    return next((k for k, (view, shape) in pairs if view.shape != shape), len(views))


def _flat(views: Views, dtype: torch.dtype | None = None) -> Tensor:
    flat = torch.cat([view if view.ndim == 1 else view.reshape(-1) for view in views])
    return flat if dtype is None else flat.to(dtype)


def _length(tensor: Tensor, size: int | None) -> int | None:
    """How many entries along the first axis make a piece; ``None`` for all."""
    if size is not None and tensor.device.type != "cpu":
        size *= ACCELERATOR
    if size is None or tensor.numel() <= size or len(tensor) == 1:
        return None
    return max(1, size * len(tensor) // tensor.numel())


def _sums_and_squares(views: Sequence[Tensor], shapes: Shapes, dtype: torch.dtype) -> Tensor:
    sums, squares = [], []
    for view, shape in zip(views, shapes, strict=True):
        axes = _axes(view, shape)
        sums.append((view.sum(axes, dtype=dtype) if axes else view.to(dtype)).reshape(-1))
        norm = torch.linalg.vector_norm(view, dim=axes, dtype=dtype) if axes else view.to(dtype)
        squares.append(norm.square().reshape(-1))
    return torch.cat([*sums, *squares]).view(2, -1)


def _products(
    views: Sequence[Tensor], others: Sequence[Tensor], shapes: Shapes, dtype: torch.dtype, size: int | None
) -> Tensor:
    found = []
    for view, other, shape in zip(views, others, shapes, strict=True):
        length = _length(view, size) or len(view)
        axes = _axes(view, shape)
        parts = [
            (one * two).sum(axes, dtype=dtype) if axes else (one * two).to(dtype)
            for one, two in zip(view.split(length), other.split(length), strict=True)
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if shape[0] > 1 else torch.stack(parts).sum(0)
        found.append(whole.reshape(-1))
    return torch.cat(found)


def _axes(view: Tensor, shape: tuple[int, ...]) -> list[int]:
    return [axis for axis, (own, size) in enumerate(zip(shape, view.shape, strict=True)) if own != size]


def _affine_(x: Tensor, *, times: Coefficient, plus: Coefficient | None = None) -> None:
    x.mul_(times)
    if plus is not None:
        x.add_(plus)


def _sgd_(
    w: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    fade: Coefficient = 0.0,
    gain: Tensor | None = None,
    shift: Coefficient | None = None,
    decay: Tensor | None = None,
    keep: Coefficient | None = None,
    move: Tensor | None = None,
    pull: Tensor | None = None,
    push: Coefficient | None = None,
) -> None:
    if m is not None:
        m.mul_(fade)
        _add_product_(m, w, decay)
        _add_product_(m, g, gain)
        if shift is not None:
            m.add_(shift)
    if keep is not None:
        w.mul_(keep)
    if m is not None:
        _add_product_(w, m, move)
    _add_product_(w, g, pull)
    if push is not None:
        w.add_(push)


def _add_product_(x: Tensor, y: Tensor, factor: Tensor | None) -> None:
    if factor is not None:
        x.addcmul_(y, factor)


def _adam_(
    w: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    maximum: Tensor | None,
    *,
    gain: Tensor,
    shift: Coefficient | None = None,
    decay: Tensor | None = None,
    first: Coefficient,
    second: Coefficient,
    keep: Coefficient | None = None,
    move: Tensor,
    root: Coefficient,
    eps: Coefficient,
) -> None:
    shown = g * gain
    if shift is not None:
        shown.add_(shift)
    _add_product_(shown, w, decay)
    mean.lerp_(shown, first)
    square.lerp_(shown.mul_(shown), second)
    if maximum is not None:
        torch.maximum(maximum, square, out=maximum)
        square = maximum
    if keep is not None:
        w.mul_(keep)
    torch.sqrt(square, out=shown)
    w.add_(shown.mul_(root).add_(eps).reciprocal_().mul_(mean).mul_(move))
