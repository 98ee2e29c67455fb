"""What operations do to labels, which name the scales of the elements of a tensor."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ecopt.symmetry import labels
from lightning_ecopt.symmetry.labels import ParameterView

tidy = settings(max_examples=100, deadline=None, derandomize=True)
sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)


@st.composite
def factorings(draw: Any, count: int) -> tuple[int, ...]:
    """A shape with ``count`` elements, axes of size 1 among them."""
    shape: list[int] = []
    while count > 1:
        size = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        shape.append(size)
        count //= size
        if len(shape) > 4:
            shape.append(count)
            break
    return tuple(shape)


@st.composite
def labelled(draw: Any) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape, and a label that is uniform along some of its axes."""
    shape = tuple(draw(sizes))
    own = tuple(size if draw(st.booleans()) else 1 for size in shape)
    numbers = draw(st.lists(st.integers(-1, 4), min_size=prod(own), max_size=prod(own)))
    return shape, np.array(numbers, dtype=np.int64).reshape(own)


@tidy
@given(labelled(), st.data())
def test_reshape_does_to_a_label_what_it_does_to_the_written_out_tensor(
    given_label: tuple[tuple[int, ...], np.ndarray], data: Any
) -> None:
    shape, ids = given_label
    new = data.draw(factorings(prod(shape)))
    result = labels.reshape(ids, shape, new)
    assert result.ndim == len(new)
    np.testing.assert_array_equal(np.broadcast_to(result, new), np.broadcast_to(ids, shape).reshape(new))


@pytest.mark.parametrize("ids", [np.full((1, 1), 3), np.arange(3).reshape(1, 3), np.zeros((0, 3), dtype=np.int64)])
@pytest.mark.parametrize("new", [(0, 3), (3, 0), (0,), (2, 0, 1)])
def test_labels_of_empty_tensors_can_be_reshaped(ids: np.ndarray, new: tuple[int, ...]) -> None:
    result = labels.reshape(ids, (0, 3), new)
    assert result.ndim == len(new)
    assert np.broadcast_to(result, new).size == 0


@tidy
@given(labelled())
def test_compress_keeps_the_elements_and_leaves_no_axis_to_shrink(given_label: tuple[Any, np.ndarray]) -> None:
    shape, ids = given_label
    small = labels.compress(np.broadcast_to(ids, shape))
    np.testing.assert_array_equal(np.broadcast_to(small, shape), np.broadcast_to(ids, shape))
    for axis, size in enumerate(small.shape):
        assert size == 1 or (small != small.take([0], axis)).any()


@tidy
@given(labelled(), st.data())
def test_stretch_writes_out_the_named_axes_only(given_label: tuple[Any, np.ndarray], data: Any) -> None:
    shape, ids = given_label
    axes = [axis for axis in range(len(shape)) if data.draw(st.booleans())]
    result = labels.stretch(ids, shape, axes)
    assert result.shape == tuple(s if k in axes else ids.shape[k] for k, s in enumerate(shape))
    np.testing.assert_array_equal(np.broadcast_to(result, shape), np.broadcast_to(ids, shape))


def test_align_prepends_axes_as_broadcasting_does() -> None:
    ids = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(labels.align(ids, 4), ids[None, None])


def test_along_channels_places_the_label_of_a_vector_on_axis_one() -> None:
    ids = labels.along_channels(np.arange(3), 4)
    assert ids.shape == (1, 3, 1, 1)
    np.testing.assert_array_equal(ids.ravel(), np.arange(3))


@tidy
@given(st.integers(1, 3), st.data())
def test_unique_rows_are_each_there_once_and_in_their_places(width: int, data: Any) -> None:
    row = st.lists(st.integers(0, 3), min_size=width, max_size=width)
    table = np.array(data.draw(st.lists(row, max_size=8)), dtype=np.int64).reshape(-1, width)
    rows, place = labels.unique_rows(table)
    np.testing.assert_array_equal(rows[place], table)
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_view_of_a_parameter_knows_its_elements_through_reshapes() -> None:
    weight = ParameterView.whole("w", (2, 6))
    assert weight.varying() == {0, 1}
    split = weight.map(lambda axis: labels.reshape(axis, (2, 6), (2, 3, 2)))
    element = np.broadcast_arrays(*split.axes)
    np.testing.assert_array_equal(element[0] * 6 + element[1], np.arange(12).reshape(2, 3, 2))
    assert ParameterView.whole("s", ()).varying() == set()


def test_what_is_done_to_a_view_is_done_to_all_that_was_added_to_it() -> None:
    first, second = ParameterView.whole("w", (2, 3)), ParameterView.whole("v", (2, 3))
    both = replace(first, added=(second,)).map(lambda ids: ids.swapaxes(0, 1))
    assert [part.name for part in both.parts()] == ["w", "v"]
    assert all(
        part.axes[0].shape == (1, 2) and part.axes[1].shape == (3, 1) and not part.added for part in both.parts()
    )
    assert labels.map_value(np.arange(3), lambda ids: ids[::-1]).tolist() == [2, 1, 0]
