"""Sums of squared weights between scales, of which only products with vectors are ever needed.

The squares are taken from the weights piece by piece, so that no memory of the size of the weights is used.

Letters: G, A, B are the axes of one :class:`SquaredWeights`, S is the number of scales (monomials in the units).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_ecopt.common.tensors import Work, alike, are_few, piece_length, pieces, sums_of_pieces
from lightning_ecopt.symmetry.coupling import NO_UNIT, LocalCoupling


@dataclass(frozen=True, eq=False)
class SquaredWeights:
    """Sums of squares of one region, for each pair of an incoming and an outgoing scale, as a batch of matrices.

    Sums over elements of the weight are then products of these matrices with vectors. Elements with the same pair of
    scales, such as those of one convolution kernel, are added up beforehand.

    Args:
        roots: ``[G, A, B]``, square roots of the sums; the weights themselves where no two of them share both scales. A
            counts incoming scales and B outgoing ones; G counts the axes along which both change, as over the groups of
            a convolution.
        incoming: ``[G, A]``, the scales that the elements are multiplied by, ``NO_UNIT`` for none.
        outgoing: ``[G, B]``, the scales that they are divided by, ``NO_UNIT`` for none.
        dtype: the type in which squares are taken and added up.
        rows: how many rows of the weight belong to each entry of ``incoming``; fractions of rows count as such.
        is_kept: whether all squares stay in memory once they have been taken.
        is_full: whether all of the sums are known to be above zero.

    Example: a weight ``[64, 32, 3, 3]`` of a convolution between units has ``roots [1, 64, 32]``; with 8 groups, a
    weight ``[64, 4, 3, 3]`` has ``roots [64, 1, 4]``, since its output and its inputs change along one axis.
    """

    roots: Tensor
    incoming: Tensor
    outgoing: Tensor
    dtype: torch.dtype
    rows: float = 0.0
    is_kept: bool = False
    is_full: bool = False

    @classmethod
    def of(cls, coupling: LocalCoupling, tensor: Tensor, dtype: torch.dtype) -> SquaredWeights:
        """Take the squares of a box of a local tensor.

        Args:
            coupling: where the box is, and how it scales.
            tensor: what this rank holds of the parameter.
            dtype: the type in which squares are taken.
        """
        weight, (incoming, outgoing) = coupling.view(tensor), coupling.sides
        shapes = incoming.shape, outgoing.shape
        roots = _norms(weight, np.broadcast_shapes(*shapes), dtype)
        varies = [[size > 1 for size in shape] for shape in shapes]
        both = [k for k in range(roots.ndim) if varies[0][k] and varies[1][k]]
        first, second = ([k for k in range(roots.ndim) if side[k] and k not in both] for side in varies)
        rest = [k for k in range(roots.ndim) if not varies[0][k] and not varies[1][k]]
        order = (*both, *first, *second, *rest)
        count, rows, columns = (prod(roots.shape[k] for k in axes) for axes in (both, first, second))
        return cls(
            roots.permute(order).reshape(count, rows, columns),
            incoming.permute(order).reshape(count, -1),
            outgoing.permute(order).reshape(count, -1),
            dtype,
            weight.numel() / (incoming.numel() * max(coupling.width, 1)),
        )

    @classmethod
    def nothing(cls, dtype: torch.dtype, device: torch.device) -> SquaredWeights:
        """Return the empty squares, for a rank that holds no part of any weight."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return cls(torch.zeros(1, 0, 0, dtype=dtype, device=device), none, none, dtype)

    def into(self, values: Tensor) -> Tensor:
        """Sum squares times ``values [G, B]`` over the outgoing side: ``[G, A]``."""
        if self._kept is not None:
            return _times(self._kept, values)
        sums = torch.empty_like(self.incoming, dtype=self.dtype)
        for rows, squares in self._squares():
            sums[:, rows] = _times(squares, values)
        return sums

    def out_of(self, values: Tensor) -> Tensor:
        """Sum squares times ``values [G, A]`` over the incoming side: ``[G, B]``."""
        if self._kept is not None:
            return _times(self._kept.mT, values)
        sums = torch.zeros_like(self.outgoing, dtype=self.dtype)
        for rows, squares in self._squares():
            sums += _times(squares.mT, values[:, rows])
        return sums

    def both_ways(self, outgoing: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``into(outgoing)`` and ``out_of(incoming)``; the weights are squared once for both."""
        if self._kept is not None:
            return _times(self._kept, outgoing), _times(self._kept.mT, incoming)
        into = torch.empty_like(self.incoming, dtype=self.dtype)
        out = torch.zeros_like(self.outgoing, dtype=self.dtype)
        for rows, squares in self._squares():
            into[:, rows] = _times(squares, outgoing)
            out += _times(squares.mT, incoming[:, rows])
        return into, out

    def total(self) -> Tensor:
        """Sum the squares for each incoming scale: ``[G, A]``."""
        return self.into(torch.ones_like(self.outgoing, dtype=self.dtype))

    def joins_into(self, marked: Tensor) -> Tensor:
        """Find the incoming scales that a square above zero joins to a marked outgoing one: ``bool[G, A]``.

        Args:
            marked: ``bool[G, B]``.
        """
        if self.is_full:
            return marked.any(1, keepdim=True).expand_as(self.incoming)
        return self.into(marked.to(self.dtype)) > 0

    def joins_out_of(self, marked: Tensor) -> Tensor:
        """Find the outgoing scales that a square above zero joins to a marked incoming one: ``bool[G, B]``.

        Args:
            marked: ``bool[G, A]``.
        """
        if self.is_full:
            return marked.any(1, keepdim=True).expand_as(self.outgoing)
        return self.out_of(marked.to(self.dtype)) > 0

    def range(self) -> Tensor:
        """The smallest of the squares and the sum of all, ``[2]``; zeros if there are none."""
        if self.roots.numel() == 0:
            return torch.zeros(2, dtype=self.dtype, device=self.roots.device)
        found = [torch.stack([squares.amin(), squares.sum()]) for _, squares in self._squares()]
        smallest, sums = torch.stack(found).unbind(1)
        return torch.stack([smallest.amin(), sums.sum()])

    @cached_property
    def _kept(self) -> Tensor | None:
        return self.roots.to(self.dtype).square() if self.is_kept else None

    def _squares(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield pieces along A with their squares; each overwrites the memory of the one before."""
        count, size, width = self.roots.shape
        work: Work = "refresh" if self.dtype == torch.float64 else "step"
        length = min(piece_length(self.roots, work, axis=1), size)
        memory = self.roots.new_empty(count, length, width, dtype=self.dtype)
        for rows in pieces(self.roots, work, axis=1):
            part, squares = self.roots[:, rows], memory[:, : rows.stop - rows.start]
            yield rows, torch.square(part, out=squares) if part.dtype == self.dtype else squares.copy_(part).square_()

    def undefined(self) -> Tensor:
        """Find the squares that are not finite, ``bool[G, A, B]``."""
        return ~self.roots.to(self.dtype).square().isfinite()

    def without(self, elements: Tensor) -> SquaredWeights:
        """Return the same squares with zeros for the marked ``elements``, ``bool[G, A, B]``."""
        return replace(self, roots=self.roots.masked_fill(elements, 0.0), is_full=False)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply ``[G, A, B]`` by ``[G, B]``: ``[G, A]``."""
    if matrices.shape[2] == 1:
        return matrices[:, :, 0] * vectors
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def _norms(weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Take the roots of sums of squares over the axes where ``shape`` has size 1; without any, the weight itself."""
    if weight.shape == torch.Size(shape):
        return weight
    (sums,) = sums_of_pieces(lambda rows: weight[rows].to(dtype).square(), [shape], pieces(weight, "refresh"))
    return sums.sqrt()


def multiply_(tensor: Tensor, first: Tensor, second: Tensor) -> None:
    """Multiply a tensor in place by two others that broadcast to it, in their type, in memory for one piece.

    The result is rounded once. Only it must fit the type of the tensor: the factors need not.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # a gradient may have been made in that mode
        for rows in pieces(tensor, "refresh"):
            factor, other = (each[rows] if len(each) > 1 else each for each in (first, second))
            tensor[rows].copy_(tensor[rows] * (factor * other))


def joined(squares: Sequence[SquaredWeights], fixed: int) -> list[SquaredWeights]:
    """Join all squares that lead from or to a single scale, such as those of biases, to one batch of 1 x 1 matrices.

    Those of a small network stay in memory: calls of operations are what products with them cost.

    Args:
        squares: of all regions, with ``NO_UNIT``.
        fixed: the number that takes the place of ``NO_UNIT``, one past the last scale.
    """
    matrices, roots, sides = [], [], []
    few = are_few(each.roots for each in squares)
    for each in squares:
        incoming, outgoing = (side.where(side != NO_UNIT, fixed) for side in (each.incoming, each.outgoing))
        if min(each.roots.shape[1:]) > 1:
            matrices.append(replace(each, incoming=incoming, outgoing=outgoing, is_kept=few))
        else:
            roots.append(each.roots.reshape(-1).to(each.dtype))
            sides.append(torch.stack(torch.broadcast_tensors(incoming[:, :, None], outgoing[:, None])).reshape(2, -1))
    if not roots:
        return matrices
    elements, (incoming, outgoing) = torch.cat(roots), torch.cat(sides, 1)
    single = SquaredWeights(elements[:, None, None], incoming[:, None], outgoing[:, None], elements.dtype, is_kept=few)
    return [single, *matrices]


def in_batches(squares: Sequence[SquaredWeights]) -> list[SquaredWeights]:
    """Join those of one shape to one batch, if they stay in memory."""
    if not all(each.is_kept for each in squares):
        return list(squares)
    kinds = {number: (each.roots.shape[1:], each.roots.dtype) for number, each in enumerate(squares)}
    return [
        replace(
            squares[numbers[0]],
            roots=torch.cat([squares[k].roots for k in numbers]),
            incoming=torch.cat([squares[k].incoming for k in numbers]),
            outgoing=torch.cat([squares[k].outgoing for k in numbers]),
        )
        for numbers in alike(kinds)
    ]


def in_one_matrix(squares: Sequence[SquaredWeights], fixed: int) -> Tensor:
    """Add up all squares for each pair of scales, but for those with one scale on both sides, which never change.

    Squares that are not finite count as zero.

    Args:
        squares: of all regions, with ``NO_UNIT``.
        fixed: the number that takes the place of ``NO_UNIT``, one past the last scale: S.

    Returns:
        ``[S + 1, S + 1]``, by the incoming and by the outgoing scale.
    """
    size = fixed + 1
    values = torch.cat([each.roots.reshape(-1).to(each.dtype) for each in squares]).square()
    incoming = torch.cat([each.incoming[:, :, None].expand(each.roots.shape).reshape(-1) for each in squares]).long()
    outgoing = torch.cat([each.outgoing[:, None].expand(each.roots.shape).reshape(-1) for each in squares]).long()
    sums = values.new_zeros(size, size)
    sums.index_put_((incoming, outgoing), values.where(values.isfinite(), 0.0), accumulate=True)  # -1 is the last
    sums.diagonal().zero_()
    return sums


def ranges(squares: Sequence[SquaredWeights]) -> list[tuple[float, float]]:
    """Return for each region the smallest of its squares and the sum of all; waits for the device once."""
    found = [each.range() for each in squares]
    return [(smallest, total) for smallest, total in torch.stack(found).tolist()] if found else []
