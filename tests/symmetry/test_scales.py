"""Equations between labels, in factors or not, against the same equations written out element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.symmetry.labels import FIXED, ZERO, Label, Product, factors_of
from lightning_ecopt.symmetry.scales import Scales
from lightning_ecopt.symmetry.trace import trace
from tests.selection import examples
from tests.symmetry.helpers import assert_complete, normal

SCALES = 6
SHAPE = (2, 3, 2)
PLACES = list(product(*map(range, SHAPE)))


@st.composite
def arrays(draw: Any, *, least: int = FIXED) -> np.ndarray:
    """A label as an array, that may be zero if ``least`` is."""
    own = tuple(size if draw(st.booleans()) else 1 for size in SHAPE)
    count = int(np.prod(own))
    numbers = draw(st.lists(st.integers(least, SCALES), min_size=count, max_size=count))
    return np.array(numbers, dtype=np.int64).reshape(own)


labels = arrays() | arrays(least=ZERO) | st.lists(arrays(), min_size=2, max_size=3).map(lambda f: Product(tuple(f)))
axes = st.sets(st.integers(0, len(SHAPE) - 1), min_size=1)


def is_zero(label: Label, place: tuple[int, ...]) -> bool:
    return any(np.broadcast_to(ids, SHAPE)[place] == ZERO for ids in factors_of(label))


def logarithm(label: Label, place: tuple[int, ...], count: int) -> np.ndarray:
    """How often each scale multiplies one element."""
    found = np.zeros(count)
    for ids in factors_of(label):
        found[np.broadcast_to(ids, SHAPE)[place]] += 1
    found[FIXED] = 0
    return found


def rows_of(scales: Scales) -> np.ndarray:
    """All equations as the rows of a matrix."""
    rows = [np.eye(scales.num_scales)[FIXED]]
    for pairs in scales.equalities:
        rows += [np.eye(scales.num_scales)[a] - np.eye(scales.num_scales)[b] for a, b in pairs]
    rows += [np.eye(scales.num_scales)[number] for _, ids in scales.fixings for number in ids]
    for relation in scales.relations:
        rows += [np.array(relation.coefficients) @ np.eye(scales.num_scales)[numbers] for numbers in relation.scales]
    return np.array(rows)


def null_space(matrix: np.ndarray) -> np.ndarray:
    _, values, vectors = np.linalg.svd(matrix, full_matrices=True)
    return vectors[int((values > 1e-9).sum()) :].T


def assert_equations(scales: Scales, expected: Iterable[np.ndarray]) -> None:
    """The equations say of the first scales just what is expected."""
    found = null_space(rows_of(scales))[: SCALES + 1]
    matrix = np.array([np.eye(SCALES + 1)[FIXED], *(row[: SCALES + 1] for row in expected)])
    assert np.abs(matrix @ found).max(initial=0) < 1e-9
    assert np.linalg.matrix_rank(found) == SCALES + 1 - np.linalg.matrix_rank(matrix)


def assert_label(scales: Scales, label: Label, expected: Callable[[tuple[int, ...]], np.ndarray | None]) -> None:
    """Under the equations, a label has the expected logarithm at each place; ``None`` if it must be zero there."""
    solutions = null_space(rows_of(scales))
    for place in PLACES:
        wanted = expected(place)
        assert is_zero(label, place) == (wanted is None)
        if wanted is not None:
            assert np.abs((logarithm(label, place, scales.num_scales) - wanted) @ solutions).max(initial=0) < 1e-9


def started() -> Scales:
    scales = Scales()
    scales.fresh((SCALES,))
    return scales


@examples(300)
@given(first=labels, second=labels)
def test_labels_that_match_are_equal_everywhere(first: Label, second: Label) -> None:
    scales = started()
    common = scales.match(first, second)
    zero = [[is_zero(label, place) for label in (first, second)] for place in PLACES]
    differences = [logarithm(first, place, SCALES + 1) - logarithm(second, place, SCALES + 1) for place in PLACES]
    assert_equations(scales, (row for row, zeros in zip(differences, zero, strict=True) if not any(zeros)))

    def either(place: tuple[int, ...]) -> np.ndarray | None:
        known = [label for label in (first, second) if not is_zero(label, place)]
        return logarithm(known[0], place, scales.num_scales) if known else None

    assert_label(scales, common, either)


@examples(200)
@given(first=labels, second=labels)
def test_products_demand_nothing_and_have_the_label_of_a_product(first: Label, second: Label) -> None:
    scales = started()
    product = scales.product(first, second)
    whole = scales.whole(product)
    assert_equations(scales, [])

    def both(place: tuple[int, ...]) -> np.ndarray | None:
        pair = [logarithm(label, place, scales.num_scales) for label in (first, second)]
        return None if is_zero(first, place) or is_zero(second, place) else pair[0] + pair[1]

    for label in (product, whole):
        assert_label(scales, label, both)


@examples(200)
@given(label=arrays() | labels.filter(lambda label: isinstance(label, Product)), along=axes)
def test_labels_that_match_along_axes_do_not_change_there(label: Label, along: set[int]) -> None:
    scales = started()
    result = scales.match_along(label, along)

    def first(place: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(0 if axis in along else k for axis, k in enumerate(place))

    assert not any(ids.shape[axis] > 1 for ids in factors_of(result) for axis in along)
    assert_equations(scales, (logarithm(label, p, SCALES + 1) - logarithm(label, first(p), SCALES + 1) for p in PLACES))
    assert_label(scales, result, lambda place: logarithm(label, place, scales.num_scales))


@examples(200)
@given(first=arrays(), second=arrays(), along=axes)
def test_a_difference_changes_along_its_axes_only(first: np.ndarray, second: np.ndarray, along: set[int]) -> None:
    assume(all(np.broadcast_shapes(first.shape, second.shape)[axis] > 1 for axis in along))
    scales = started()
    ratio = scales.difference(first, second, along)

    def change(place: tuple[int, ...]) -> np.ndarray:
        at = tuple(k if axis in along else 0 for axis, k in enumerate(place))
        ratios = [logarithm(first, where, SCALES + 1) - logarithm(second, where, SCALES + 1) for where in (place, at)]
        return ratios[0] - ratios[1]

    assert_equations(scales, map(change, PLACES))
    count = scales.num_scales
    assert_label(scales, ratio, lambda place: logarithm(first, place, count) - logarithm(second, place, count))


@examples(200)
@given(terms=st.lists(st.tuples(st.sampled_from([1, -1]), arrays()), min_size=1, max_size=4))
def test_terms_that_cancel_have_the_product_one_everywhere(terms: list[tuple[int, np.ndarray]]) -> None:
    scales = started()
    scales.cancel(*terms)
    assert_equations(scales, (sum(e * logarithm(ids, p, SCALES + 1) for e, ids in terms) for p in PLACES))  # type: ignore[misc]


# Networks whose labels have two factors -------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Features ``[N, tokens, 4]`` of a first layer, a function of them and of further layers, and a last layer."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], tokens: int = 3, **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)
        for name, part in parts.items():
            setattr(self, name, part(tokens) if callable(part) and not isinstance(part, nn.Module) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


def square(tokens: int) -> nn.Linear:
    return nn.Linear(tokens, tokens)


def plain(tokens: int) -> nn.Linear:
    return nn.Linear(tokens, tokens, bias=False)


def point(tokens: int) -> nn.Conv1d:
    return nn.Conv1d(tokens, tokens, 1, bias=False)


def mixed(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.transpose(1, 2)).transpose(1, 2)


def windows(h: Tensor) -> Tensor:
    """Windows of two tokens that overlap, ``[N, tokens - 1, 2, 4]``, read from memory."""
    n, tokens, width = h.shape
    return h.contiguous().as_strided((n, tokens - 1, 2, width), (tokens * width, width, width, 1))


def written(h: Tensor) -> Tensor:
    """Half of the first token gets the values of the second one, in memory."""
    h = h.clone(memory_format=torch.contiguous_format)
    h[:, 0, :2] = h[:, 1, :2]
    return h.relu_()


def table(tokens: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 2))


def relative(m: Any, h: Tensor) -> Tensor:
    logits = (h.reshape(-1, 2) @ m.table.T).view(len(h), -1, 5)
    return (logits / 9).sigmoid().mean(-1).view(len(h), -1, 2).repeat(1, 1, 2) * h


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mixing": lambda n: Tokens(lambda m, h: h + mixed(m.mix, h.relu()), n, mix=square),
    "mixing without biases": lambda n: Tokens(lambda m, h: mixed(m.mix, h.relu()).relu(), n, mix=plain),
    "mixing twice": lambda n: Tokens(lambda m, h: mixed(m.b, mixed(m.a, h).relu()), n, a=plain, b=plain),
    "mixing, then soft": lambda n: Tokens(lambda m, h: mixed(m.mix, h).sigmoid(), n, mix=plain),
    "mixing by convolutions": lambda n: Tokens(lambda m, h: m.b(m.a(h).relu()), n, a=point, b=point),
    "by one with gates of positions": lambda n: Tokens(
        lambda m, h: m.b(m.a(h) * m.gain), n, a=point, b=point, gain=nn.Parameter(torch.ones(4))
    ),
    "by one of halves": lambda n: Tokens(
        lambda m, h: m.b(torch.cat([h, m.a(h)], 1)), n, a=point, b=lambda n: nn.Conv1d(2 * n, 2 * n, 1, groups=2)
    ),
    "in place": lambda n: Tokens(lambda m, h: mixed(m.mix, h).mul_(2).relu_(), n, mix=plain),
    "halves": lambda n: Tokens(lambda m, h: torch.cat(mixed(m.mix, h).chunk(2, -1), -1), n, mix=plain),
    "flattened": lambda n: Tokens(lambda m, h: mixed(m.mix, h).flatten(1).relu().view(len(h), -1, 4), n, mix=plain),
    "padded": lambda n: Tokens(lambda m, h: F.pad(mixed(m.mix, h), (0, 0, 1, 1))[:, 1:-1], n, mix=plain),
    "windows": lambda n: Tokens(lambda m, h: windows(mixed(m.mix, h).relu())[:, :, 0], n, mix=plain),
    "sums of windows": lambda n: Tokens(lambda m, h: windows(mixed(m.mix, h)).sum(2).relu(), n, mix=plain),
    "windows, mixed": lambda n: Tokens(
        lambda m, h: m.b(windows(mixed(m.a, h).relu()).flatten(1, 2)),
        n,
        a=plain,
        b=lambda n: nn.Conv1d(2 * n - 2, 3, 1),
    ),
    "written in part": lambda n: Tokens(lambda m, h: mixed(m.b, written(mixed(m.a, h))), n, a=plain, b=plain),
    "scaled": lambda n: Tokens(
        lambda m, h: mixed(m.mix, h) / 3 * m.gain, n, mix=plain, gain=nn.Parameter(torch.ones(4))
    ),
    "gated by a product": lambda n: Tokens(lambda m, h: h.sigmoid() * mixed(m.mix, h), n, mix=plain),
    "spatial gate": lambda n: Tokens(lambda m, h: h.relu() * mixed(m.mix, h), n, mix=square),
    "of the sum of both": lambda n: Tokens(lambda m, h: mixed(m.a, h) + mixed(m.b, h), n, a=plain, b=plain),
    "maximum of both": lambda n: Tokens(lambda m, h: torch.maximum(mixed(m.a, h), mixed(m.b, h)), n, a=plain, b=plain),
    "masked": lambda n: Tokens(lambda m, h: torch.where(h > 0, mixed(m.mix, h), 0.0), n, mix=plain),
    "mean of tokens": lambda n: Tokens(lambda m, h: mixed(m.mix, h).mean(1), n, mix=plain),
    "rows that share a table": lambda n: Tokens(relative, n, table=table),
    "scores of tokens": lambda n: Tokens(lambda m, h: torch.bmm(mixed(m.a, h).mT, h).softmax(-1)[:, :1], n, a=plain),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_of_two_factors_keep_all_their_freedoms(name: str) -> None:
    torch.manual_seed(0)
    assert_complete(NETWORKS[name](3).double(), normal((2, 3, 2)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("padded", "flattened", "written in part")])
def test_the_number_of_scales_grows_with_the_axes_and_not_with_the_elements(name: str) -> None:
    counts = []
    for tokens in (32, 64):
        module = NETWORKS[name](tokens)
        equations = trace(module, dict(module.named_parameters()), torch.randn(2, tokens, 2))
        counts.append(equations.num_scales)
        written = [*equations.equalities, *(relation.scales for relation in equations.relations)]
        counts.append(sum(len(rows) for rows in written))
    assert counts[2] < 2.2 * counts[0] + 50
    assert counts[3] < 2.2 * counts[1] + 50
