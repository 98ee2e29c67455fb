"""Squares of weights between scales, of which only products with vectors are ever needed.

They are taken from the weights piece by piece, so that no memory of the size of the weights is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lightning_ecopt.common.tensors import rows_at_a_time


@dataclass(frozen=True, eq=False)
class SquaredWeights:
    """Squares between scales, as a batch of matrices, so that sums over them are products of matrices and vectors.

    Args:
        roots: their square roots, ``[G, A, B]``: the weights themselves where no two of them have both scales in
            common. G counts what changes with both sides, as the groups of a convolution.
        incoming: scales ``[G, A]``, -1 for ground.
        outgoing: scales ``[G, B]``, likewise.
        dtype: in which squares are taken and added up.
        rows: how many rows of the weights belong to each entry of ``incoming``.
    """

    roots: Tensor
    incoming: Tensor
    outgoing: Tensor
    dtype: torch.dtype
    rows: float = 0.0

    @classmethod
    def of(cls, weight: Tensor, incoming: Tensor, outgoing: Tensor, dtype: torch.dtype) -> SquaredWeights:
        """The squares of a weight that leads from ``outgoing`` to ``incoming``, scales that broadcast to it."""
        shapes = incoming.shape, outgoing.shape
        roots = _norms(weight, torch.broadcast_shapes(*shapes), dtype)
        varies = [[size > 1 for size in shape] for shape in shapes]
        both = [k for k in range(roots.ndim) if varies[0][k] and varies[1][k]]
        first, second = ([k for k in range(roots.ndim) if own[k] and k not in both] for own in varies)
        rest = [k for k in range(roots.ndim) if not varies[0][k] and not varies[1][k]]
        count = prod(roots.shape[k] for k in both)
        sizes = (count, prod(roots.shape[k] for k in first), prod(roots.shape[k] for k in second))
        return cls(
            roots.permute(*both, *first, *second, *rest).reshape(sizes),
            incoming.permute(*both, *first, *second, *rest).reshape(count, -1),
            outgoing.permute(*both, *first, *second, *rest).reshape(count, -1),
            dtype,
            len(weight) / incoming.numel(),
        )

    @classmethod
    def nothing(cls, dtype: torch.dtype, device: torch.device) -> SquaredWeights:
        """Of a weight that other ranks hold."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return cls(torch.zeros(1, 0, 0, dtype=dtype, device=device), none, none, dtype)

    def into(self, values: Tensor) -> Tensor:
        """Sums ``[G, A]`` of squares times values of the outgoing side, ``[G, B]``."""
        sums = torch.empty_like(self.incoming, dtype=self.dtype)
        for rows, squares in self._squares():
            sums[:, rows] = _times(squares, values)
        return sums

    def out_of(self, values: Tensor) -> Tensor:
        """Sums ``[G, B]`` of squares times values of the incoming side, ``[G, A]``."""
        sums = torch.zeros_like(self.outgoing, dtype=self.dtype)
        for rows, squares in self._squares():
            sums += _times(squares.mT, values[:, rows])
        return sums

    def both_ways(self, outgoing: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        """``into(outgoing)`` and ``out_of(incoming)``, with weights squared once."""
        into = torch.empty_like(self.incoming, dtype=self.dtype)
        out = torch.zeros_like(self.outgoing, dtype=self.dtype)
        for rows, squares in self._squares():
            into[:, rows] = _times(squares, outgoing)
            out += _times(squares.mT, incoming[:, rows])
        return into, out

    def _squares(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces along A; each is overwritten by the next."""
        count, size, width = self.roots.shape
        step = rows_at_a_time(self.roots, count * width)
        memory = self.roots.new_empty(count, min(step, size), width, dtype=self.dtype)
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            yield rows, memory[:, : rows.stop - start].copy_(self.roots[:, rows]).square_()

    def undefined(self) -> Tensor:
        """Which squares are not finite, ``bool[G, A, B]``."""
        return ~self.roots.to(self.dtype).square().isfinite()

    def without(self, elements: Tensor) -> SquaredWeights:
        """The same with zeros for ``elements``, ``bool[G, A, B]``."""
        return replace(self, roots=self.roots.masked_fill(elements, 0.0))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products ``[G, A]`` of ``[G, A, B]`` and ``[G, B]``."""
    if matrices.shape[2] == 1:
        return matrices[:, :, 0] * vectors
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def _norms(weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Roots of the sums of squares over the axes that ``shape`` lacks; the weight itself if it lacks none."""
    if weight.shape == torch.Size(shape):
        return weight
    pieces = weight.split(rows_at_a_time(weight, prod(weight.shape[1:])))
    sums = [piece.to(dtype).square().sum_to_size(min(len(piece), shape[0]), *shape[1:]) for piece in pieces]
    return (torch.cat(sums) if shape[0] > 1 else torch.stack(sums).sum(0)).sqrt()


def multiply_(tensor: Tensor, first: Tensor, second: Tensor) -> None:
    """Multiply in place by two tensors that broadcast to it, rounding once; no more memory than for a piece."""
    step = rows_at_a_time(tensor, prod(tensor.shape[1:]))
    for start in range(0, len(tensor), step):
        rows = slice(start, start + step)
        factor, other = (each[rows] if len(each) > 1 else each for each in (first, second))
        tensor[rows].mul_((factor * other).to(tensor))


def joined(flows: Sequence[SquaredWeights], ground: int) -> list[SquaredWeights]:
    """The same from fewer flows: all that lead from or to a single scale become one, of 1 x 1 matrices.

    Args:
        flows: with -1 for ground.
        ground: the scale that takes its place.
    """
    matrices, roots, sides = [], [], []
    for flow in flows:
        incoming, outgoing = flow.incoming % (ground + 1), flow.outgoing % (ground + 1)
        if min(flow.roots.shape[1:]) > 1:
            matrices.append(replace(flow, incoming=incoming, outgoing=outgoing))
        else:
            roots.append(flow.roots.reshape(-1).to(flow.dtype))
            sides.append(torch.stack(torch.broadcast_tensors(incoming[:, :, None], outgoing[:, None])).reshape(2, -1))
    if not roots:
        return matrices
    elements, (incoming, outgoing) = torch.cat(roots), torch.cat(sides, 1)
    return [SquaredWeights(elements[:, None, None], incoming[:, None], outgoing[:, None], elements.dtype), *matrices]


def are_finite(flows: Sequence[SquaredWeights]) -> list[bool]:
    """Of each flow, whether all its squares are finite, and their sum; with one look at the device."""
    sums = [flow.into(torch.ones_like(flow.outgoing, dtype=flow.dtype)).sum() for flow in flows]
    return torch.stack(sums).isfinite().tolist() if sums else []
