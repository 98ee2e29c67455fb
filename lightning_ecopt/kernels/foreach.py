"""The passes of a small network, whose blocks are worked on together: what such a step costs is calls of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import ordinary_tensors
from lightning_ecopt.kernels import eager
from lightning_ecopt.kernels.eager import EagerKernels, Update
from lightning_ecopt.kernels.passes import Coefficient, Shapes, Views

#: A coefficient as torch._foreach_... takes it: one tensor for each block, or one number for all.
Spread = list[Tensor] | Tensor | float
#: How many sets of blocks are remembered.
MOST_SETS = 4


class ForeachKernels(EagerKernels):
    """Works on all blocks by one call of an operation, in memory of the size of the gradients.

    All weights have one type. Rows of one length are added up as one matrix. Coefficients are kept in memory of their
    own, so that they are cut into blocks once, and not at every step.
    """

    def __init__(self) -> None:
        self._sets: dict[int, _Set] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_sets": {}}  # a copy has memory of its own

    def _set(self, views: Views, shapes: Shapes) -> _Set:
        """What is known of some blocks; it is kept if their shapes are a tuple, which comes again."""
        found = self._sets.get(id(shapes)) or _Set(views, shapes)
        if isinstance(shapes, tuple) and id(shapes) not in self._sets:
            if len(self._sets) == MOST_SETS:  # the path rule has other rows after each refresh
                self._sets.clear()
            self._sets[id(shapes)] = found
        return found

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        sums, norms, known = [], [], self._set(views, shapes)
        for numbers, length in known.bundles:
            own = [views[k] for k in numbers]
            if length == 1:
                values = eager._flat(own, dtype)
                sums.append(values)
                norms.append(values)
            elif length:
                rows = _rows(own)
                sums.append(rows.sum(1, dtype=dtype))
                norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=dtype))
            else:
                (view,), axes = own, eager._axes(own[0], shapes[numbers[0]])
                sums.append(view.sum(axes, dtype=dtype).reshape(-1))
                norms.append(torch.linalg.vector_norm(view, dim=axes, dtype=dtype).reshape(-1))
        found = known.in_order(torch.cat([*sums, *norms]).view(2, -1))
        found[1].square_()
        return found

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        found, known = [], self._set(views, shapes)
        for numbers, length in known.bundles:
            own = [views[k] for k in numbers], [others[k] for k in numbers]
            if length == 1:
                found.append(eager._flat(own[0], dtype) * eager._flat(own[1], dtype))
            elif length:
                found.append((_rows(own[0]).to(dtype) * _rows(own[1])).sum(1, dtype=dtype))
            else:
                found.append(eager._products(*own, [shapes[k] for k in numbers], dtype, False))
        return known.in_order(torch.cat(found)[None])

    def _operate_(
        self, update: Update, lists: Sequence[Views | None], shapes: Shapes, coefficients: Mapping[str, Coefficient]
    ) -> None:
        together, weights = _TOGETHER.get(update), lists[0]
        if together is None or weights is None:
            super()._operate_(update, lists, shapes, coefficients)
        else:
            spread = self._set(weights, shapes).spread
            if update is eager._adam_:  # here, where it is a number still
                second = coefficients["second"]
                coefficients = {**coefficients, "second": 1 - second, "share": second**0.5}
            given = {name: spread(name, value) for name, value in coefficients.items()}
            together(*(None if views is None else list(views) for views in lists), **given)


class _Set:
    """What is known of some blocks from one step to the next.

    Args:
        views: of the blocks in the weights, or in other tensors of that size.
        shapes: of the places.

    Attributes:
        bundles: of blocks that can be worked on as one matrix of rows: their numbers, and the length of the rows, zero
            for a block by itself, which has none.
    """

    def __init__(self, views: Views, shapes: Shapes) -> None:
        self._shapes = shapes  # which nothing else may have the identity of
        self.bundles = _bundles(views, shapes)
        self._counts = [prod(shape) for shape in shapes]
        places = torch.arange(sum(self._counts), device="cpu").split(self._counts)
        order = torch.cat([places[k] for numbers, _ in self.bundles for k in numbers])
        self._order = None if bool((order.diff() == 1).all()) else order.argsort().to(views[0].device)
        on_cpu = all(view.device.type == "cpu" for view in views)
        self._type = views[0].dtype if on_cpu else None  # all views have one
        self._memory: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def in_order(self, values: Tensor) -> Tensor:
        """What the bundles give, ``[..., P]``, in the order of the blocks."""
        return values if self._order is None else values[..., self._order]

    def spread(self, name: str, value: Coefficient) -> Spread:
        """A coefficient for each block; a vector over the places of all, ``[P]``, is cut."""
        if isinstance(value, Tensor) and value.ndim:
            whole, parts = self._memory.get(name, (None, []))
            if whole is None or whole.dtype != value.dtype or whole.device != value.device:
                with ordinary_tensors():
                    whole = torch.empty_like(value)
                    blocks = zip(whole.split(self._counts), self._shapes, strict=True)
                    parts = [part.view(shape) for part, shape in blocks]
                self._memory[name] = whole, parts
            whole.copy_(value)
            return parts
        if self._type is None:
            return value
        # On a CPU torch would make a tensor of a number for each block.
        return [torch.as_tensor(value, dtype=self._type, device="cpu")] * len(self._shapes)


def _bundles(views: Views, shapes: Shapes) -> list[tuple[list[int], int]]:
    """Numbers of the blocks that can be worked on as one matrix of rows, and the length of these; zero if none are."""
    found: dict[int, list[int]] = {}
    for number, (view, shape) in enumerate(zip(views, shapes, strict=True)):
        length = _length(view, shape)
        found.setdefault(length or -number - 1, []).append(number)
    return [(numbers, max(length, 0)) for length, numbers in found.items()]


def _length(view: Tensor, shape: tuple[int, ...]) -> int:
    """How many elements follow each other at each place; zero if they do not."""
    places = shape[0]
    return view.numel() // places if prod(shape) == places and view.shape[:1] == shape[:1] else int(view.shape == shape)


def _rows(views: Views) -> Tensor:
    """Blocks whose rows have one length, as one matrix."""
    return torch.cat([view if view.ndim == 2 else view.flatten(1) for view in views])


def _times_(xs: list[Tensor], factor: Spread) -> None:
    torch._foreach_mul_(xs, factor)


def _plus_(xs: list[Tensor], values: Spread | None) -> None:
    if values is not None:
        torch._foreach_add_(xs, values)


def _plus_product_(xs: list[Tensor], ys: list[Tensor], factor: Spread | None) -> None:
    # A factor that is left out must not become zero: 0 * inf is not 0.
    if factor is not None:
        torch._foreach_addcmul_(xs, ys, factor if isinstance(factor, list) else [torch.as_tensor(factor)] * len(xs))


def _sgd_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor] | None,
    *,
    fade: Spread = 0.0,
    gain: Spread | None = None,
    shift: Spread | None = None,
    decay: Spread | None = None,
    keep: Spread | None = None,
    move: Spread | None = None,
    pull: Spread | None = None,
    push: Spread | None = None,
) -> None:
    # m = fade m + gain g + shift + decay w
    if ms is not None:
        _times_(ms, fade)
        _plus_product_(ms, ws, decay)
        _plus_product_(ms, gs, gain)
        _plus_(ms, shift)
    # w = keep w + move m + pull g + push
    if keep is not None:
        _times_(ws, keep)
    if ms is not None:
        _plus_product_(ws, ms, move)
    _plus_product_(ws, gs, pull)
    _plus_(ws, push)


def _adam_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    largest: list[Tensor] | None,
    *,
    gain: Spread,
    shift: Spread | None = None,
    decay: Spread | None = None,
    first: Spread,
    second: Spread,
    share: Spread,
    keep: Spread | None = None,
    move: Spread,
    root: Spread,
    eps: Spread,
) -> None:
    # d = gain g + shift + decay w
    ds = list(torch._foreach_mul(gs, gain))
    _plus_(ds, shift)
    _plus_product_(ds, ws, decay)
    # m = m + first (d - m);  v = second v + (share d)^2, which is infinite where d^2 has overflown, and never NaN
    torch._foreach_lerp_(ms, ds, first)  # type: ignore[arg-type]  # weights may be a list, which stubs do not know
    _times_(ds, share)
    _times_(vs, second)
    torch._foreach_addcmul_(vs, ds, ds)
    if largest is not None:
        torch._foreach_maximum_(largest, vs)
        vs = largest
    # w = keep w + move m / (root sqrt(v) + eps)
    if keep is not None:
        _times_(ws, keep)
    roots = list(torch._foreach_sqrt(vs))
    _times_(roots, root)
    _plus_(roots, eps)
    _plus_product_(ws, list(torch._foreach_div(ms, roots)), move)


_TOGETHER: Mapping[Update, Callable[..., None]] = {eager._sgd_: _sgd_, eager._adam_: _adam_}
