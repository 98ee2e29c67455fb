"""The helpers for tensors that the other packages share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ecopt.common.runs import Runs
from lightning_ecopt.common.tensors import (
    PIECE_SIZES,
    PieceSize,
    alike,
    padded,
    piece_length,
    pieces,
    region_of,
    stacked,
    sums_of_pieces,
)


def test_a_region_is_a_view_and_a_scalar_counts_as_a_vector() -> None:
    weight, scalar = torch.zeros(4, 3), torch.zeros(())
    region_of(weight, (slice(1, 4, 2), slice(0, 2, 1))).fill_(1.0)
    assert weight.sum(1).tolist() == [0.0, 2.0, 0.0, 2.0]
    region_of(scalar, (slice(0, 1, 1),)).fill_(2.0)
    assert scalar.item() == 2.0
    assert region_of(weight, None) is weight


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64])
def test_index_minus_one_picks_what_a_vector_is_padded_with(dtype: torch.dtype) -> None:
    values = padded(torch.zeros(3, dtype=dtype), 1)
    assert values.dtype == dtype
    assert values[torch.tensor([0, -1, 2])].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((7, 5), 0, [(0, 2), (2, 4), (4, 6), (6, 7)]),  # two rows of five
        ((3, 6, 2), 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
        ((3, 100), 0, [(0, 1), (1, 2), (2, 3)]),  # at least one
        ((4,), 0, [(0, 4)]),
        ((0, 5), 0, []),
        ((2, 0), 0, [(0, 2)]),
    ],
)
def test_pieces_cover_an_axis(
    shape: tuple[int, ...], axis: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECE_SIZES, "step", PieceSize(10, 1))
    tensor = torch.zeros(shape)
    found = [(part.start, part.stop) for part in pieces(tensor, "step", axis)]
    assert found == expected
    assert piece_length(tensor, "step", axis) >= 1


@pytest.mark.parametrize("length", [0, 1, 3, 7])
def test_sums_of_pieces_are_those_of_the_whole(length: int) -> None:
    weight = torch.randn(length, 4, 2, dtype=torch.float64)
    shapes = [(length, 1, 1), (1, 4, 1), (1, 1, 1), (length, 4, 2)]
    rows = [slice(start, min(start + 2, length)) for start in range(0, length, 2)]
    found = sums_of_pieces(lambda piece: torch.stack([weight[piece], 3 * weight[piece]]), shapes, rows)
    for sums, shape in zip(found, shapes, strict=True):
        expected = weight.sum_to_size(shape)
        torch.testing.assert_close(sums, torch.stack([expected, 3 * expected]))


def test_what_is_alike_is_stacked_and_one_tensor_is_not_copied() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert alike({"a": one.shape, "b": (4,), "c": other.shape}) == [["a", "c"], ["b"]]
    assert torch.equal(stacked([one, other]), torch.stack([one, other]))
    assert stacked([one]).data_ptr() == one.data_ptr()


@given(entries=st.lists(st.tuples(st.sampled_from([1.0, 2.0, torch.inf]), st.booleans()), max_size=12))
def test_runs_are_the_vectors_that_they_were_made_of(entries: list[tuple[float, bool]]) -> None:
    vectors = torch.tensor([[size, float(other)] for size, other in entries]).reshape(-1, 2).t()
    runs = Runs.of(*vectors)
    assert torch.equal(runs.vectors(), vectors)
    assert int(runs.lengths.sum()) == runs.size == len(entries)
    assert not bool((runs.values[:, 1:] == runs.values[:, :-1]).all(0).any())  # neighbours differ
