"""A run is resumed in more or in fewer processes than it was begun in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lightning_integration.reshard_script import CHOSEN, FIRST, NEXT
from tests.lightning_integration.runs import launch
from tests.selection import full

pytestmark = full

RESUMED = [(name, size) for name, run in CHOSEN.items() for size in run.sizes]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """For each number of processes the results of all runs."""
    folder = tmp_path_factory.mktemp("resharding")
    launch("reshard_script", folder)
    return {size: torch.load(folder / f"{size}.pt") for size in (FIRST, *NEXT)}


@pytest.mark.parametrize(("name", "size"), RESUMED)
def test_another_number_of_processes_goes_on_to_the_same_end(found: dict[int, Any], name: str, size: int) -> None:
    theirs, ours = found[FIRST][name], found[size][name]
    assert ours["steps"] == theirs["steps"] == 8
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=1e-12)
