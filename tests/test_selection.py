"""What the default run leaves out is marked, and nothing drops out of it unseen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

from tests.selection import few, pairwise


@dataclass(frozen=True)
class Named:
    name: str


def kept(cases: list[Any]) -> list[bool]:
    return [not any(mark.name == "full" for mark in getattr(case, "marks", ())) for case in cases]


def values(case: Any) -> tuple[Any, ...]:
    return tuple(getattr(case, "values", case if isinstance(case, tuple) else (case,)))


@pytest.mark.parametrize(
    ("cases", "keep", "expected"),
    [
        ([1, 2, 3], [2], [False, True, False]),
        (["one", "two"], 1, [True, False]),
        ([(1, "a"), (2, "b")], [(2, "b")], [False, True]),
        ([pytest.param(1, id="one"), pytest.param(2, id="two")], ["two"], [False, True]),
        ([Named("one"), Named("two")], ["one"], [True, False]),
        ({"one": 1, "two": 2}, ["one"], [True, False]),
        ([False, 0, None], [0], [False, True, False]),
    ],
)
def test_all_but_some_cases_are_marked(cases: Any, keep: Any, expected: list[bool]) -> None:
    marked = few(cases, keep)
    assert kept(marked) == expected
    assert [values(case) for case in marked] == [values(case) for case in cases]


@pytest.mark.parametrize("keep", [["three"], [1], 3, 0])
def test_what_is_kept_must_be_there(keep: Any) -> None:
    with pytest.raises(ValueError, match="case"):
        few(["one", "two"], keep)


def test_marks_and_ids_of_a_case_stay() -> None:
    case = pytest.param(1, marks=pytest.mark.skipif(False, reason=""), id="one")
    (marked, _) = few([case, pytest.param(2, id="two")], ["two"])
    assert marked.id == "one"
    assert [mark.name for mark in marked.marks] == ["skipif", "full"]


def test_every_pair_of_values_stands_in_a_row() -> None:
    factors = [[0, 5, 13], [1, 5, None], [False, True], "abc", ["unit", "path"]]
    rows = pairwise(*factors)
    for i, j in combinations(range(len(factors)), 2):
        assert {(row[i], row[j]) for row in rows} == {(a, b) for a in factors[i] for b in factors[j]}
    assert len(rows) <= 15
