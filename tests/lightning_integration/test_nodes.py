"""Two nodes of two processes each train as one, and a run goes on if one of the nodes dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_integration.fsdp_script import NO_CALLS
from tests.lightning_integration.node_script import EPOCHS, KILLED_AT, NODES, RUNS, SAVED_EVERY, WORKERS
from tests.lightning_integration.runs import TakenUp, differences, launch
from tests.selection import few

LAST = KILLED_AT - KILLED_AT % SAVED_EVERY
#: What the default run trains.
ALWAYS = ["DDP, SGD, unit"]
NAMES = [name for name in RUNS if not (NO_CALLS and name.startswith("FSDP2"))]


def ends(folder: Path) -> list[Any]:
    """Of each rank."""
    return [torch.load(folder / f"end-{rank}.pt") for rank in range(NODES * WORKERS)]


@pytest.mark.parametrize("name", few(NAMES, ALWAYS))
def test_a_run_of_which_a_node_was_killed_goes_on_to_the_same_end(tmp_path: Path, name: str) -> None:
    launch("node_script", tmp_path, name)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "killed").exists()
    assert (killed / "begins").read_text() == str(LAST)
    assert (whole / "begins").read_text() == "0"
    ours, theirs = ends(killed), ends(whole)
    assert ours[0]["steps"] == theirs[0]["steps"] == EPOCHS * TakenUp.STEPS_PER_EPOCH
    assert all(differences(one, ranks[0]) == [] for ranks in (ours, theirs) for one in ranks)
    if name.startswith("loop"):  # the plain optimizer's differ as much
        torch.testing.assert_close(ours[0]["weights"], theirs[0]["weights"], rtol=0, atol=1e-12)
    else:
        assert differences(ours[0], theirs[0]) == []
