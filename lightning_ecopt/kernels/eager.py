"""The passes as sequences of tensor operations, which all other kernels must agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor

from lightning_ecopt.common.sides import Operands, Sides
from lightning_ecopt.common.tensors import piece_length, pieces
from lightning_ecopt.kernels.allocation import Allocated, Paths, allocate_, free_gradient
from lightning_ecopt.kernels.clipping import Clipping, RowGradients, clipping
from lightning_ecopt.kernels.passes import Coefficient, Elements, Given, Product, Shapes, Views

#: Changes one tensor of each list in place, by coefficients that broadcast to them.
Update = Callable[..., None]
#: Position of the gradients among the lists of an in-place pass, which changes all lists but this one.
GRADIENTS = 1


class EagerKernels:
    """Runs the passes operation by operation; see :mod:`~lightning_ecopt.kernels.passes` for what they compute.

    Blocks of one element at each place, such as biases and gains, are tiny and many. Those that come first are worked
    on as one vector: some operations for all of them instead of some for each.
    """

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        few = _num_single(views, shapes)
        found = []
        if few:
            values = _flat(views[:few], dtype)
            found.append(torch.stack([values, values.square()]))
        if few < len(views):
            found.append(_sums_and_squares(views[few:], shapes[few:], dtype))
        return torch.cat(found, 1)

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        few = _num_single(views, shapes)
        found = [_flat(views[:few], dtype) * _flat(others[:few], dtype)] if few else []
        if few < len(views):
            found.append(_products(views[few:], others[few:], shapes[few:], dtype))
        return torch.cat(found)[None]

    def both_sides(self, sides: Sides, first: Operands, second: Operands, sign: float) -> Tensor | None:
        """See :class:`~lightning_ecopt.common.sides.Passes`: the caller does it."""
        return None

    def rescale_(self, sides: Sides, tensors: Operands, factors: Callable[[], Tensor]) -> bool:
        """See :class:`~lightning_ecopt.common.sides.Passes`: the caller does it."""
        return False

    def magnitudes(self, tensors: Sequence[Tensor], sample: int) -> Tensor | None:
        """See :class:`~lightning_ecopt.common.sides.Passes`: the caller does it."""
        return None

    def affine_(self, views: Views, *, shapes: Shapes, **coefficients: Coefficient | None) -> None:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        before = [0 if view.is_inference() else view._version for view in views]
        try:
            self._in_place(_affine_, [views], shapes, coefficients)
        except BaseException:
            _take_back_(views, before, shapes, **coefficients)
            raise

    def sgd_(
        self,
        weights: Views,
        gradients: Views,
        momenta: Views | None,
        *,
        shapes: Shapes,
        **coefficients: Given,
    ) -> None:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        self._in_place(_sgd_, [weights, gradients, momenta], shapes, coefficients)

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
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        self._in_place(_adam_, [weights, gradients, means, squares, maxima], shapes, coefficients)

    def gather(self, tensors: Sequence[Tensor | None], elements: Elements, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        found = torch.zeros(elements.size, dtype=dtype, device=elements.at.device)
        parts = [
            found.new_zeros(len(at)) if tensor is None else tensor.take(at)
            for tensor, at in zip(tensors, elements.at.long().split(elements.counts), strict=True)
        ]
        if parts:
            found[elements.slots] = torch.cat(parts).to(dtype)
        return found

    def scatter_(self, tensors: Sequence[Tensor | None], elements: Elements, values: Tensor) -> None:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        columns = (column.split(elements.counts) for column in (elements.at.long(), values[elements.slots]))
        for tensor, at, value in zip(tensors, *columns, strict=True):
            if tensor is not None:  # Tensor.put_ raises under torch.use_deterministic_algorithms
                flat = tensor.is_contiguous()
                whole, index = (tensor.view(-1), (at,)) if flat else (tensor, torch.unravel_index(at, tensor.shape))
                whole[index] = value if value.dtype == tensor.dtype else value.to(tensor.dtype)

    def clipping(self, gradients: RowGradients) -> Clipping:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return clipping(gradients)

    def free_gradient(self, paths: Paths, sums: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return free_gradient(paths, sums, weights, gradients)

    def allocate_(self, paths: Paths, factor: Tensor, weights: Tensor, max_ratio: float | None) -> Allocated:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return allocate_(paths, factor, weights, max_ratio)

    def _in_place(
        self,
        update: Update,
        lists: Sequence[Views | None],
        shapes: Shapes,
        coefficients: Mapping[str, Given],
    ) -> None:
        """Make one in-place pass: ``affine_``, ``sgd_`` and ``adam_`` come down to this, however they are run.

        Subclasses override :meth:`_launch_`, not the pass: it works on the blocks that they have kernels for. Tensor
        operations do the rest.

        Args:
            update: changes one block.
            lists: of views, as ``update`` takes them; ``None`` for state that the base optimizer does not have.
            shapes: of the places.
            coefficients: by name; those that are ``None`` are left out.
        """
        if not shapes:
            return
        present = {name: value for name, value in coefficients.items() if value is not None}
        left = self._launch_(lists, shapes, present)
        if left is None:
            self._operate_(update, lists, shapes, values_of(present))
            return
        of_all = values_of(present) if left else {}
        for k, places in left:
            own = {name: value[places] if _is_vector(value) else value for name, value in of_all.items()}
            self._operate_(update, [views and [views[k]] for views in lists], [shapes[k]], own)

    def _launch_(
        self, lists: Sequence[Views | None], shapes: Shapes, coefficients: Mapping[str, Coefficient | Product]
    ) -> Sequence[tuple[int, slice]] | None:
        """Change the blocks that there are kernels for.

        Returns:
            The numbers of the other blocks, and where their places are in vectors; ``None`` if there are no kernels.
        """
        return None

    def _operate_(
        self,
        update: Update,
        lists: Sequence[Views | None],
        shapes: Shapes,
        coefficients: Mapping[str, Coefficient],
    ) -> None:
        """Change blocks by tensor operations."""
        vectors = {name: value for name, value in coefficients.items() if _is_vector(value)}
        numbers = {name: value for name, value in coefficients.items() if name not in vectors}
        few = _num_single(lists[0] or (), shapes)
        if few:
            places = sum(map(prod, shapes[:few]))
            own = {name: vector[:places] for name, vector in vectors.items()}
            _update_as_one_(update, [views and views[:few] for views in lists], {**own, **numbers})
            vectors = {name: vector[places:] for name, vector in vectors.items()}
        if few < len(shapes):
            rest = [views and views[few:] for views in lists]
            # The others make no tensors beside those that they change.
            _update_each_(update, rest, shapes[few:], vectors, numbers, in_pieces=update is _adam_)


def values_of(coefficients: Mapping[str, Coefficient | Product]) -> dict[str, Coefficient]:
    """Coefficients, with the values of those that are products."""
    return {name: value.value() if isinstance(value, Product) else value for name, value in coefficients.items()}


def _take_back_(
    views: Views, before: Sequence[int], shapes: Shapes, times: Coefficient | None, plus: Coefficient | None = None
) -> None:
    """Undo an affine pass that has failed on the way, where views have another version than ``before``."""
    assert times is not None  # the pass needs it
    both = (times, 0.0 if plus is None else plus)
    changes: dict[int, int] = {}  # of each memory: its views share a version, and change in their order
    first = 0
    for view, version, shape in zip(views, before, shapes, strict=True):
        places, first = slice(first, first + prod(shape)), first + prod(shape)
        memory = view.untyped_storage().data_ptr()
        left = changes.setdefault(memory, 0 if view.is_inference() else view._version - version)
        if left > 0:
            changes[memory] -= 1
            factor, shift = (c[places].view(shape) if _is_vector(c) else c for c in both)
            view.sub_(shift).div_(factor)


def _is_vector(value: Coefficient) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 1


def _update_as_one_(update: Update, lists: Sequence[Views | None], coefficients: Mapping[str, Coefficient]) -> None:
    """Change blocks of one element at each place, by coefficients over their elements, as one vector ``[P]``."""
    flat = [None if views is None else _flat(views) for views in lists]
    update(*flat, **coefficients)
    for number, (views, whole) in enumerate(zip(lists, flat, strict=True)):
        if views is not None and whole is not None and number != GRADIENTS:
            parts = whole.split([view.numel() for view in views])
            parts = [part if v.ndim == 1 else part.view_as(v) for part, v in zip(parts, views, strict=True)]
            if any(view.is_neg() for view in views):  # which a copy of lists does not write to
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part)
            else:
                torch._foreach_copy_(list(views), parts)


def _update_each_(
    update: Update,
    lists: Sequence[Views | None],
    shapes: Shapes,
    vectors: Mapping[str, Tensor],
    numbers: Mapping[str, Coefficient],
    in_pieces: bool,
) -> None:
    """Change block by block, each as a whole or in pieces."""
    first = lists[0]
    assert first is not None
    counts = [prod(shape) for shape in shapes]
    split = {name: vector.split(counts) for name, vector in vectors.items()}
    for k, (view, shape) in enumerate(zip(first, shapes, strict=True)):
        # Of sixteen bits are only tensors: factors that such a type cannot hold may have products that it can.
        dtype = torch.promote_types(view.dtype, torch.float32)
        own = {name: parts[k].view(shape).to(dtype) for name, parts in split.items()}
        for piece in _pieces(view) if in_pieces else [None]:
            tensors = [None if views is None else _cut(views[k], piece) for views in lists]
            # A coefficient that broadcasts along the first axis is the same for all pieces.
            of_piece = {name: _cut(v, piece if shape[0] > 1 else None) for name, v in own.items()}
            update(*tensors, **of_piece, **numbers)


def _num_single(views: Views, shapes: Shapes) -> int:
    """How many views, from the first on, have one element at each place."""
    pairs = enumerate(zip(views, shapes, strict=True))
    return next((k for k, (view, shape) in pairs if view.shape != shape), len(views))


def _flat(views: Views, dtype: torch.dtype | None = None) -> Tensor:
    flat = torch.cat([view if view.ndim == 1 else view.reshape(-1) for view in views])
    return flat if dtype is None else flat.to(dtype)


def _pieces(view: Tensor) -> list[slice] | list[None]:
    """Slices of the first axis that cut a view into pieces; ``[None]`` leaves it whole."""
    if piece_length(view, "step") >= len(view):
        return [None]
    return list(pieces(view, "step"))


def _cut(tensor: Tensor, piece: slice | None) -> Tensor:
    return tensor if piece is None else tensor[piece]


def _sums_and_squares(views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
    sums, squares = [], []
    for view, shape in zip(views, shapes, strict=True):
        axes = _axes(view, shape)
        sums.append((view.sum(axes, dtype=dtype) if axes else view.to(dtype)).reshape(-1))
        # A norm squared, unlike a sum of squares, needs no memory for the squares.
        norm = torch.linalg.vector_norm(view, dim=axes, dtype=dtype) if axes else view.to(dtype)
        squares.append(norm.square().reshape(-1))
    return torch.cat([*sums, *squares]).view(2, -1)


def _products(views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
    found = []
    for view, other, shape in zip(views, others, shapes, strict=True):
        axes = _axes(view, shape)
        parts = []
        for piece in _pieces(view):
            product = _cut(view, piece).to(dtype) * _cut(other, piece)  # which may fit where the factors' type ends
            parts.append(product.sum(axes, dtype=dtype) if axes else product.to(dtype))
        # Pieces lie along the first axis: they have places of their own, or each has a part of every sum.
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if shape[0] > 1 else torch.stack(parts).sum(0)
        found.append(whole.reshape(-1))
    return torch.cat(found)


def _axes(view: Tensor, shape: tuple[int, ...]) -> list[int]:
    """Axes along which the elements of a block have the same place."""
    return [axis for axis, (places, size) in enumerate(zip(shape, view.shape, strict=True)) if places != size]


def _affine_(x: Tensor, *, times: Coefficient, plus: Coefficient | None = None) -> None:
    if plus is None:
        x.mul_(times)
    else:  # one operation, so that a failure finds a tensor changed or unchanged
        plus, times = (value if isinstance(value, Tensor) else x.new_tensor(value) for value in (plus, times))
        torch.addcmul(plus, x, times, out=x)


def _sgd_(
    w: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    fade: Coefficient = 0.0,
    gain: Coefficient | None = None,
    shift: Coefficient | None = None,
    decay: Coefficient | None = None,
    keep: Coefficient | None = None,
    move: Coefficient | None = None,
    pull: Coefficient | None = None,
    push: Coefficient | None = None,
) -> None:
    # m = fade m + gain g + shift + decay w
    if m is not None:
        m.mul_(fade)
        _add_product_(m, w, decay)
        _add_product_(m, g, gain)
        if shift is not None:
            m.add_(shift)
    # w = keep w + move m + pull g + push
    if keep is not None:
        w.mul_(keep)
    if m is not None:
        _add_product_(w, m, move)
    _add_product_(w, g, pull)
    if push is not None:
        w.add_(push)


def _add_product_(x: Tensor, y: Tensor, factor: Coefficient | None) -> None:
    # A factor that is left out must not become zero: 0 * inf is not 0.
    if isinstance(factor, Tensor) and factor.ndim:
        x.addcmul_(y, factor)
    elif factor is not None:
        x.add_(y * factor)


def _adam_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    largest: Tensor | None,
    *,
    gain: Coefficient,
    shift: Coefficient | None = None,
    decay: Coefficient | None = None,
    first: Coefficient,
    second: Coefficient,
    keep: Coefficient | None = None,
    move: Coefficient,
    root: Coefficient,
    eps: Coefficient,
) -> None:
    # d = gain g + shift + decay w, in the only memory that the step needs
    d = g * gain
    if shift is not None:
        d.add_(shift)
    _add_product_(d, w, decay)
    # m = m + first (d - m);  v = (1 - second) v + second d^2, which is infinite where d^2 has overflown, and never NaN
    m.lerp_(d, first)
    d.mul_(second**0.5)
    v.mul_(1 - second).addcmul_(d, d)
    if largest is not None:
        torch.maximum(largest, v, out=largest)
        v = largest
    # w = keep w + move m / (root sqrt(v) + eps); d is not needed any more
    if keep is not None:
        w.mul_(keep)
    torch.sqrt(v, out=d)
    torch.div(m, d.mul_(root).add_(eps), out=d)
    _add_product_(w, d, move)
