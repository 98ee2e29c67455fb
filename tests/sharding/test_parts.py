"""The boxes of what a rank holds are what it holds, whichever way a tensor is cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ecopt.common.parts import Cut, FlatPiece, Grid, Layout, Part, Run, lengths
from tests.selection import examples

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: Sequence[int]) -> tuple[slice, ...]:
    """A region of a tensor, all of it half of the time."""
    if draw(st.booleans()):
        return tuple(slice(0, length, 1) for length in shape)
    starts = [draw(st.integers(0, length - 1)) for length in shape]
    ends = [draw(st.integers(start + 1, length)) for start, length in zip(starts, shape, strict=True)]
    return tuple(slice(start, end, draw(st.integers(1, 3))) for start, end in zip(starts, ends, strict=True))


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[tuple[Layout, Tensor]]:
    """The layout of every rank of a mesh, and what it holds, by torch.chunk."""
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    axes = [draw(st.integers(0, len(shape) - 1)) for _ in sizes]
    strides = [draw(st.integers(1, 3)) for _ in sizes]
    found: list[tuple[Layout, Tensor]] = []
    for numbers in product(*map(range, sizes)):
        cuts = [Cut(*cut) for cut in zip(axes, sizes, numbers, strides, strict=True)]
        here = _numbered(shape)
        for cut in cuts:
            pieces = here.tensor_split(_ends(here.shape[cut.axis], cut.stride), cut.axis)
            chunks = [piece.tensor_split(_ends(piece.shape[cut.axis], cut.count), cut.axis) for piece in pieces]
            here = torch.cat([of[cut.number] for of in chunks], cut.axis)
        found.append((Grid.of(shape, cuts), here))
    return found


@st.composite
def flat_pieces(draw: st.DrawFn, shape: Sequence[int]) -> list[tuple[Layout, Tensor]]:
    """A flattened tensor in several pieces, and what they hold."""
    count = prod(shape)
    ends = [0, *sorted(draw(st.lists(st.integers(0, count), max_size=3))), count]
    flat = _numbered(shape).view(-1)
    return [(FlatPiece(tuple(shape), start, stop), flat[start:stop].clone()) for start, stop in pairwise(ends)]


def _numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(prod(shape)).view(*shape)


def _ends(length: int, count: int) -> list[int]:
    """Where torch.chunk cuts, but for empty chunks, which it leaves out."""
    ends = torch.zeros(length).chunk(count)
    lengths_ = [len(chunk) for chunk in ends] if length else []
    lengths_ += [0] * (count - len(lengths_))
    return torch.tensor(lengths_).cumsum(0)[:-1].tolist()


@examples(400)
@given(st.data())
def test_the_boxes_of_all_ranks_are_the_region_once(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    region = data.draw(regions(shape))
    ranks = data.draw(st.one_of(grids(shape), flat_pieces(shape)))
    wanted = _numbered(shape)[region]
    times = torch.zeros_like(wanted)
    shares = {side: torch.zeros(side, dtype=torch.float64) for side in _sides(wanted.shape)}
    for layout, here in ranks:
        assert layout.shape == shape
        assert layout.local_shape == here.shape
        for part in layout.parts(region):
            assert torch.equal(part.view(here), wanted[part.places])
            assert torch.equal(part.cut(wanted), wanted[part.places])
            times[part.places] += 1
            for total in shares.values():
                part.cut(total).add_(part.share(total, region))  # a view
    assert (times == 1).all()
    for total in shares.values():
        torch.testing.assert_close(total, torch.ones_like(total))


def _sides(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes that broadcast to a region."""
    return list(product(*({1, size} for size in shape)))


@examples(200)
@given(st.data())
def test_a_flat_piece_has_few_boxes(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    whole = tuple(slice(0, length, 1) for length in shape)
    for layout, here in data.draw(flat_pieces(shape)):
        parts = layout.parts(whole)
        assert len(parts) <= 2 * len(shape) - 1
        assert sum(prod(lengths(part.region)) for part in parts) == here.numel()
        for part in parts:
            part.view(here).zero_()
        assert not here.any()


def test_a_range_of_a_matrix_is_the_end_of_a_row_whole_rows_and_the_beginning_of_a_row() -> None:
    parts = FlatPiece((4, 3), 2, 11).parts((slice(0, 4, 1), slice(0, 3, 1)))
    assert [part.places for part in parts] == [
        (slice(0, 1, 1), slice(2, 3, 1)),
        (slice(1, 3, 1), slice(0, 3, 1)),
        (slice(3, 4, 1), slice(0, 2, 1)),
    ]
    assert parts[1].view(torch.arange(2, 11)).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_a_scalar_is_a_vector_of_one_element() -> None:
    (part,) = FlatPiece((), 0, 1).parts((slice(0, 1, 1),))
    assert part.view(torch.ones(1)).shape == (1,)
    assert FlatPiece((), 1, 1).parts((slice(0, 1, 1),)) == []
    whole = Part.whole((slice(0, 1, 1),))
    assert whole.view(torch.ones(())).shape == (1,)


def test_rows_that_lie_apart_are_several_runs() -> None:
    grid = Grid.of((8, 2), [Cut(0, 2, 1, stride=2), Cut(0, 2, 0)])
    assert grid.runs[0] == (Run(0, 2, 2),)  # the second half of each half; of that the first half
    assert Grid.of((8,), [Cut(0, 2, 1, stride=2)]).runs == ((Run(0, 2, 2), Run(2, 6, 2)),)


def test_a_piece_that_is_none_of_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\] has no elements 4 to 7"):
        FlatPiece((2, 3), 4, 7)


def test_values_with_fewer_axes_are_cut_along_their_own() -> None:
    (part,) = Grid.of((4, 6), [Cut(1, 3, 1)]).parts((slice(0, 4, 1), slice(0, 6, 1)))
    assert part.cut(torch.arange(6)).tolist() == [2, 3]
    assert part.cut(torch.tensor(7)) == 7
