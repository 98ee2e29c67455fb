"""What of the tests a plain ``pytest`` runs: a few cases of each kind; ``pytest -m ""`` runs them all.

The marker ``full`` stands at what a plain run leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import combinations, product
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

full = pytest.mark.full

_chosen = {"everything": False}


def choose(markers: str) -> None:
    """Take note of the option ``-m`` of a run, before any test is imported."""
    _chosen["everything"] = markers != "not full"


def everything() -> bool:
    """Whether more than the default run has been asked for."""
    return _chosen["everything"]


def few(cases: Iterable[Any], keep: Collection[Any] | int) -> list[Any]:
    """Parameters of a test, of which the default run has only some.

    For example, a plain run takes one of three numbers, ``pytest -m ""`` all of them::

        @pytest.mark.parametrize("number", few([1, 2, 3], [2]))

    Args:
        cases: values for ``pytest.mark.parametrize``; a tuple holds those of several parameters.
        keep: which cases the default run has: values, ids of a ``pytest.param``, or names of objects that have a
            ``name``; or a number, for that many from the start.

    Raises:
        ValueError: if something is to be kept that is no case, so that nothing drops out of the default run unseen.
    """
    cases = list(cases)
    kept = range(keep) if isinstance(keep, int) else [_find(one, cases) for one in keep]
    if isinstance(keep, int) and not 0 < keep <= len(cases):
        raise ValueError(f"there are {len(cases)} cases, fewer than {keep}")
    return [case if number in kept else _left_out(case) for number, case in enumerate(cases)]


def _find(wanted: Any, cases: list[Any]) -> int:
    for number, case in enumerate(cases):
        if isinstance(case, ParameterSet):
            same = case.id == wanted
        else:
            same = case is wanted or (type(case) is type(wanted) and case == wanted)
        if same or (isinstance(wanted, str) and getattr(case, "name", None) == wanted):
            return number
    raise ValueError(f"{wanted!r} is no case of this test")


def _left_out(case: Any) -> ParameterSet:
    if isinstance(case, ParameterSet):
        return pytest.param(*case.values, marks=[*case.marks, full], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=full)


def pairwise(*factors: Collection[Any]) -> list[tuple[Any, ...]]:
    """Rows such that each value of a factor stands in one of them with each value of any other factor.

    The first rows have the most pairs.
    """
    rows = list(product(*(range(len(factor)) for factor in factors)))
    pairs = {row: {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)} for row in rows}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    values = [list(factor) for factor in factors]
    return [tuple(values[i][k] for i, k in enumerate(row)) for row in chosen]


def examples(number: int, **options: Any) -> Callable[[Any], Any]:
    """Settings of a test of hypothesis with so many examples, of which the default run has a tenth.

    It has three at least, as the first is the simplest that there is. A run of more than the default has the test
    among those marked ``full``, for it has more to try there.
    """
    from hypothesis import settings  # here, so that the tests that need a GPU need pytest alone

    most = number if everything() else max(number // 10, 3)
    chosen = settings(max_examples=most, deadline=None, derandomize=True, **options)
    return lambda test: full(chosen(test)) if everything() else chosen(test)
