"""The solver against plain linear algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ecopt.symmetry import elimination
from lightning_ecopt.symmetry.equations import Equations, Use
from lightning_ecopt.symmetry.labels import FIXED
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.solve import NO_UNIT, solve
from tests.selection import examples

SCALES = 12


@st.composite
def systems(draw: Any) -> tuple[Equations, np.ndarray]:
    """Random equations between a few scales, as a trace has them and as the rows of a matrix."""
    equations = Equations({"w": (SCALES,)})
    equations.fresh((SCALES,))
    numbers = st.integers(1, SCALES)
    rows = []

    def row(scales: list[int], coefficients: list[int]) -> None:
        rows.append(np.zeros(SCALES + 1))
        for scale, coefficient in zip(scales, coefficients, strict=True):
            rows[-1][scale] += coefficient

    for first, second in draw(st.lists(st.tuples(numbers, numbers), max_size=4)):
        equations.equalities.append(np.array([[first, second]]))
        row([first, second], [1, -1])
    for number in draw(st.lists(numbers, max_size=2)):
        equations.fixings.append((Operation("fixed", ""), np.array([number])))
        row([number], [1])
    for width in draw(st.lists(st.integers(2, 4), max_size=8)):
        coefficients = draw(st.lists(st.sampled_from([1, -1, 1, -1, 2, -3]), min_size=width, max_size=width))
        count = draw(st.integers(1, 3))
        scales = draw(
            st.lists(st.lists(st.integers(0, SCALES), min_size=width, max_size=width), min_size=count, max_size=count)
        )
        equations.relate(np.array(scales), tuple(coefficients))
        for numbered in scales:
            row(numbered, coefficients)
    used = np.array(sorted(draw(st.sets(numbers, min_size=1))))
    region = (slice(0, len(used), 1),)
    equations.uses["w"] = [Use(region, used, np.zeros(1, np.int64), additive=False)]
    matrix = np.array(rows or [np.zeros(SCALES + 1)])
    matrix[:, FIXED] = 0
    return equations, matrix[:, 1:]


def null_space(matrix: np.ndarray) -> np.ndarray:
    _, values, vectors = np.linalg.svd(matrix, full_matrices=True)
    rank = int((values > 1e-9).sum())
    return vectors[rank:].T


@pytest.mark.parametrize("worth_it", [1, 2, elimination.WORTH_IT])
@examples(250)
@given(system=systems())
def test_units_span_the_solutions_as_far_as_parameters_show_them(
    worth_it: int, system: tuple[Equations, np.ndarray]
) -> None:
    equations, matrix = system
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "WORTH_IT", worth_it)
        solution = solve(equations)
    (use,) = equations.uses["w"]
    (coupling,), monomials = solution.couplings, solution.monomials
    scales = np.zeros((monomials.num_scales + 1, monomials.num_units))  # the last is for NO_UNIT
    scales[: monomials.num_units] = np.eye(monomials.num_units)
    np.add.at(scales, (monomials.products.numpy(), monomials.units.numpy()), monomials.exponents.numpy())
    found = scales[np.broadcast_to(coupling.incoming.numpy(), use.incoming.shape)]
    expected = null_space(matrix)[use.incoming - 1]
    rank = int(np.linalg.matrix_rank(expected, tol=1e-9))
    assert monomials.num_units == rank
    assert np.linalg.matrix_rank(found, tol=1e-9) == rank
    assert np.linalg.matrix_rank(np.hstack([expected, found]), tol=1e-9) == rank


def test_units_come_in_the_order_and_direction_in_which_parameters_meet_them() -> None:
    equations = Equations({"a": (2,), "b": (2,)})
    first, second = equations.fresh((2,)), equations.fresh((2,))
    equations.relate(np.stack([first, second], 1), (1, 1))
    fixed = np.zeros(1, np.int64)
    equations.uses["a"] = [Use((slice(0, 2, 1),), second[::-1], fixed, additive=False)]
    equations.uses["b"] = [Use((slice(0, 2, 1),), first, fixed, additive=False)]
    solution = solve(equations)
    couplings, monomials = solution.couplings, solution.monomials
    assert monomials.num_units == 2
    assert couplings[0].incoming.tolist() == [0, 1]
    assert couplings[1].incoming.tolist() == [2, 3]
    assert (monomials.products.tolist(), monomials.units.tolist()) == ([2, 3], [1, 0])
    assert monomials.exponents.tolist() == [-1, -1]


def test_a_scale_that_is_its_own_inverse_is_fixed() -> None:
    equations = Equations({"w": (1,)})
    scale = equations.fresh((1,))
    other = equations.fresh((1,))
    equations.relate(np.array([[scale[0], other[0]]]), (1, 1))
    equations.equate(scale, other)
    equations.uses["w"] = [Use((slice(0, 1, 1),), scale, np.zeros(1, np.int64), additive=False)]
    solution = solve(equations)
    assert solution.monomials.num_units == 0
    assert solution.couplings[0].incoming.tolist() == [NO_UNIT]
