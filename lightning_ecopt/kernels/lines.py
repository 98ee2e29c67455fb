"""Kernels that address memory themselves: what those of Triton and those in C have in common.

They see a block as :class:`Lines`, are told coefficients as :class:`Words`, and make a plan for each set of blocks.
Plans are kept, so that a step looks up addresses and nothing else.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ecopt.common.tensors import is_lazy
from lightning_ecopt.kernels.allocation import Paths
from lightning_ecopt.kernels.clipping import Clipping, RowGradients
from lightning_ecopt.kernels.eager import GRADIENTS, EagerKernels
from lightning_ecopt.kernels.passes import Coefficient, Elements, Product, Shapes, Views

#: The kinds of blocks; :mod:`~lightning_ecopt.kernels.triton` has pictures of them. In ``passes.c`` the first two are
#: one.
LONG, SHORT, COLUMNS = range(3)
#: How many elements the lines of LONG have at least.
FROM_LONG = 512
DTYPES = (torch.float32, torch.float64)
#: Blocks with more lines, or with more elements in a line, are left to PyTorch: programs of Triton count them in 32
#: bits. Offsets in memory may be larger.
MOST_INDICES = 1 << 30
#: In columns a place has at most so many lines.
MOST_LINES = 1024
#: Plans are kept until there are so many, as when other parameters have gradients at every step.
MOST_PLANS = 64

#: The coefficients, in the order in which kernels are told them.
NAMES = ("fade", "gain", "shift", "decay", "keep", "move", "pull", "push", "first", "second", "root", "eps")
#: The affine pass is part of that of SGD, with these coefficients.
SAME = {"times": "keep", "plus": "push"}
_NUMBERS = {name: NAMES.index(SAME.get(name, name)) for name in (*NAMES, *SAME)}
_NUMBER, _INTEGER = struct.Struct("d"), struct.Struct("q")
#: What a coefficient is, if it is not left out: a number itself, the address of one, or that of a vector over places.
NUMBER, SCALAR, VECTOR = 1, 2, 3


@dataclass(frozen=True)
class Lines:
    """The elements of a block as lines; :mod:`~lightning_ecopt.kernels.triton` has pictures of the kinds.

    Args:
        kind: LONG, SHORT or COLUMNS.
        count: number of lines.
        depth: number of elements of each line.
        stride: elements in memory from line to line or, in columns, from element to element.
        of_place: number of lines of a place.
    """

    kind: int
    count: int
    depth: int
    stride: int
    of_place: int = 1

    @classmethod
    def of(cls, views: Views, shape: tuple[int, ...]) -> Self | None:
        """See a block as lines.

        Args:
            views: of the block, in each tensor of a pass.
            shape: of its places.

        Returns:
            ``None`` if its elements do not make lines, if its tensors differ in dtype, shape or strides, if they are
            not of float32 or float64, or if they do not have such places, of which tensor operations complain.
        """
        view = views[0]
        axes = [axis for axis, size in enumerate(view.shape) if size > 1]
        if view.dtype not in DTYPES or len({(tensor.dtype, tensor.shape) for tensor in views}) > 1:
            return None
        if len({tuple(map(tensor.stride, axes)) for tensor in views}) > 1 or any(map(is_lazy, views)):
            return None
        if len(shape) != view.ndim or any(
            places not in (1, size) for places, size in zip(shape, view.shape, strict=True)
        ):
            return None
        if view.numel() == 0:
            return cls(COLUMNS, prod(shape), 0, 0)
        # Axes from the outermost in memory to the innermost; those of the places must be neighbours among them.
        order = sorted(axes, key=view.stride, reverse=True)
        of_places = [axis for axis in axes if shape[axis] > 1]
        for start in range(len(order) - len(of_places) + 1):
            end = start + len(of_places)
            if order[start:end] == of_places:
                lines = cls._of_axes(view, order[:start], of_places, order[end:])
                if lines is not None and max(lines.count, lines.depth) < MOST_INDICES:
                    return lines
        return None

    @classmethod
    def _of_axes(cls, view: Tensor, outer: list[int], of_places: list[int], inner: list[int]) -> Self | None:
        """Lay lines along the inner axes or, in columns, along the outer ones."""
        places, places_stride = _joined(view, of_places)
        elements, stride = _joined(view, inner)
        if not outer and places_stride > 0 and stride == 1 and (elements > 1 or places_stride > 1):
            return cls(LONG if elements >= FROM_LONG else SHORT, places, elements, places_stride)
        depth, depth_stride = _joined(view, outer)
        if depth_stride > 0 and _joined(view, of_places + inner)[1] == 1 and elements <= MOST_LINES:
            return cls(COLUMNS, places * elements, depth, depth_stride, elements)
        return None


def _joined(view: Tensor, axes: Sequence[int]) -> tuple[int, int]:
    """Return size and stride of some axes as one axis; a stride of 0 if they do not make up one."""
    together = all(view.stride(one) == view.stride(after) * view.shape[after] for one, after in pairwise(axes))
    return prod(view.shape[axis] for axis in axes), (view.stride(axes[-1]) if axes else 1) if together else 0


class Words(NamedTuple):
    """The coefficients of a pass.

    Args:
        kinds: of each of ``NAMES``: 0 if it is left out, or NUMBER, SCALAR or VECTOR.
        words: the bits of a number in 64 bits, or an address.
        times: the addresses of the two vectors by which each is multiplied, or 0.
        over: the address of the vector by which each is divided, or 0.
        kept: the tensors at these addresses.
    """

    kinds: list[int]
    words: list[int]
    times: list[int]
    over: list[int]
    kept: list[Tensor]

    @classmethod
    def of(cls, coefficients: Mapping[str, Coefficient | Product], dtype: torch.dtype, device: torch.device) -> Words:
        """For blocks of a type on a device."""
        names = len(NAMES)
        found = cls([0] * names, [0] * names, [0] * (2 * names), [0] * names, [])
        found.kinds[_NUMBERS["fade"]] = NUMBER  # zero: momentum does not stay as it is if this is left out
        for name, value in coefficients.items():
            number = _NUMBERS[name]
            if isinstance(value, Product):
                for k, vector in enumerate(value.times):
                    found.times[2 * number + k] = found._address(vector, dtype)
                if value.over is not None:
                    found.over[number] = found._address(value.over, dtype)
                value = value.factor
            if isinstance(value, Tensor) and (value.ndim or value.device == device):
                found.words[number] = found._address(value, dtype)
                found.kinds[number] = VECTOR if value.ndim else SCALAR
            else:  # a number, or a tensor of the CPU, which does not wait for the device either
                (found.words[number],) = _INTEGER.unpack(_NUMBER.pack(value))
                found.kinds[number] = NUMBER
        return found

    def table(self) -> array[int]:
        """All but the tensors, as ``passes.c`` has it; it is good as long as these are kept."""
        return array("q", self.kinds + self.words + self.times + self.over)

    def _address(self, value: Tensor, dtype: torch.dtype) -> int:
        value = (value if value.dtype == dtype else value.to(dtype)).contiguous()
        self.kept.append(value)
        return value.data_ptr()


class Plan(Protocol):
    """How a pass works on blocks of given shapes, strides and types.

    Attributes:
        rest: numbers of the blocks that are left to PyTorch, and where their places are in vectors.
    """

    rest: list[tuple[int, slice]]


PlanT = TypeVar("PlanT", bound=Plan)
#: The coefficients of a pass.
OfPass = Mapping[str, Coefficient | Product]


class Step(NamedTuple):
    """What a step works on: blocks whose places are rows, one after another.

    Args:
        plan: of the pass of the base, which leaves nothing to PyTorch.
        lists: weights, gradients and state.
        shapes: of the places.
        dtype: of the sums.
    """

    plan: Any
    lists: Sequence[Views]
    shapes: Shapes
    dtype: torch.dtype


LinesT = TypeVar("LinesT", bound=Lines)


def lines_and_rest(
    kind: type[LinesT], lists: Sequence[Views], shapes: Shapes
) -> tuple[dict[int, LinesT], list[int], list[tuple[int, slice]]]:
    """The blocks that are made of lines, by number; the first places of all blocks, and their end; the plan's rest."""
    starts = [0, *accumulate(map(prod, shapes))]
    found = [kind.of(views, shape) for views, shape in zip(zip(*lists, strict=True), shapes, strict=True)]
    blocks = {k: lines for k, lines in enumerate(found) if lines is not None}
    return blocks, starts, [(k, slice(*starts[k : k + 2])) for k in range(len(shapes)) if k not in blocks]


def count_changes(lists: Sequence[Views]) -> None:
    """Tell autograd, which does not see what these kernels write, that all lists but the gradients have changed."""
    for number, views in enumerate(lists):
        if number != GRADIENTS:
            torch.autograd.graph.increment_version(views)


class LineKernels(EagerKernels, ABC, Generic[PlanT]):
    """Runs the passes over blocks that are made of lines; blocks that are not are left to tensor operations."""

    def __init__(self) -> None:
        self._plans: dict[Any, PlanT] = {}
        self._last: dict[tuple[int, int, int], tuple[Shapes, list[Any], PlanT]] = {}  # the last plans: they come again

    def __reduce__(self) -> tuple[Callable[[], EagerKernels], tuple[()]]:
        return type(self), ()  # plans hold addresses of the tensors of one optimizer

    @abstractmethod
    def _make_plan(self, lists: Sequence[Views], shapes: Shapes, count: int) -> PlanT:
        """Plan a pass that finds ``count`` sums for each place; 0 for passes that change tensors."""

    @abstractmethod
    def add(self, plan: PlanT, lists: Sequence[Views], count: int, dtype: torch.dtype) -> Tensor:
        """Find ``count`` sums for each place, ``[count, P]``; those of other blocks are not looked at."""

    @abstractmethod
    def _change_(self, plan: PlanT, lists: Sequence[Views], coefficients: OfPass) -> None:
        """Change the blocks of all lists but the gradients."""

    def sums_and_squares(self, views: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().sums_and_squares, 2, (views,), shapes, dtype)

    def products(self, views: Views, others: Views, shapes: Shapes, dtype: torch.dtype) -> Tensor:
        """See :class:`~lightning_ecopt.kernels.Kernels`."""
        return self._sums(super().products, 1, (views, others), shapes, dtype)

    def _sums(
        self, eager: Callable[..., Tensor], count: int, lists: Sequence[Views], shapes: Shapes, dtype: torch.dtype
    ) -> Tensor:
        plan = self.plan(lists, shapes, count)
        found = self.add(plan, lists, count, dtype)
        for k, places in plan.rest:
            found[:, places] = eager(*([views[k]] for views in lists), [shapes[k]], dtype)
        return found

    def _launch_(
        self, lists: Sequence[Views | None], shapes: Shapes, coefficients: OfPass
    ) -> Sequence[tuple[int, slice]]:
        """See :class:`~lightning_ecopt.kernels.EagerKernels`."""
        own = [views for views in lists if views is not None]
        plan = self.plan(own, shapes, 0)
        self.change_(plan, own, coefficients)
        return plan.rest

    def change_(self, plan: PlanT, lists: Sequence[Views], coefficients: OfPass) -> None:
        """Change the blocks of a plan that are made of lines; the second list has gradients, which stay as they are."""
        self._change_(plan, lists, coefficients)
        count_changes(lists)

    def step_(
        self,
        step: Step,
        rows: Callable[[Tensor, Tensor], RowGradients],
        coefficients: Callable[[Clipping], OfPass],
        terms: object,
    ) -> Clipping:
        """Take a step of the unit rule: sums, clipping, and the pass of the base.

        Args:
            step: what it works on.
            rows: what is known of the rows, given sums of gradients and sums of their squares.
            coefficients: of the pass. Its vectors may not be looked at before this returns.
            terms: stays the same object as long as rates stay the same; kernels may then keep the coefficients.
        """
        gradients = step.lists[GRADIENTS : GRADIENTS + 1]
        found = self.add(self.plan(gradients, step.shapes, 2), gradients, 2, step.dtype)
        clipped = self.clipping(rows(*found.unbind()))
        self.change_(step.plan, step.lists, coefficients(clipped))
        return clipped

    def path_step_(
        self,
        step: Step,
        paths: Paths,
        skeleton: Elements,
        coefficients: Callable[[Tensor, Tensor], OfPass],
        of_free: Callable[[], OfPass],
        terms: object,
        max_ratio: float | None,
    ) -> Tensor | int:
        """Take a step of the path rule: sums, free coordinates, the pass of the base, and skeleton weights.

        Args:
            step: what it works on.
            paths: of the skeleton.
            skeleton: its elements in the tensors of each list.
            coefficients: of the pass, given by what weights are divided before it, and by what after it, ``[R]`` each.
                Its vectors may not be looked at before this returns.
            of_free: the coefficients for the free coordinates, numbers or ``[H]``.
            terms: stays the same object as long as rates stay the same; kernels may then keep the coefficients.
            max_ratio: the guard.

        Returns:
            At how many units the guard was needed.
        """
        pair = step.lists[: GRADIENTS + 1]
        (sums,) = self.add(self.plan(pair, step.shapes, 1), pair, 1, step.dtype)
        weights, gradients, *state = (self.gather(views, skeleton, step.dtype) for views in step.lists)
        gradient = self.free_gradient(paths, sums, weights, gradients)
        moved, scale = paths.free_values, paths.weight_scale
        free = [[moved], [gradient], *([of.chunk(2)[1]] for of in state)]
        # One vector of float32 or float64: nothing is left to PyTorch.
        self.change_(self.plan(free, paths.shapes, 0), free, of_free())
        allocated = self.allocate_(paths, moved / paths.free_values, weights, max_ratio)
        self.change_(step.plan, step.lists, coefficients(scale, paths.weight_scale))
        self.scatter_(step.lists[0], skeleton, allocated.skeleton)
        for views, of in zip(step.lists[GRADIENTS + 1 :], state, strict=True):
            of.chunk(2)[0].zero_()  # fixed weights have no state
            self.scatter_(views, skeleton, of)
        return allocated.num_guarded

    def plan(self, lists: Sequence[Views], shapes: Shapes, count: int) -> PlanT:
        """Plan a pass over views of given types, shapes and strides, or look up the plan that was made before.

        Args:
            lists: of the blocks, in each tensor of the pass.
            shapes: of the places.
            count: how many sums are found for each place; 0 in passes that change tensors.
        """
        # Sizes of all: a state that does not fit its weight must not be addressed.
        kinds = [
            # Without a call of `is_lazy`, as this is what takes longest in a step of a small network.
            (view.dtype, view.device, view.shape, view.stride(), view.is_neg() or view._is_zerotensor())
            for views in lists
            for view in views
        ]
        last = self._last.get((count, len(lists), len(shapes)))
        if last is not None and last[0] is shapes and last[1] == kinds:  # which takes less time than to hash them
            return last[2]
        key = (count, tuple(shapes), *kinds)
        if key not in self._plans:
            if len(self._plans) == MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(lists, shapes, count)
        if isinstance(shapes, tuple):
            self._last[count, len(lists), len(shapes)] = shapes, kinds, self._plans[key]
        return self._plans[key]
