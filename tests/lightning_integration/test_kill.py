"""A run that is killed between two steps ends, when it is started again, as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from tests.lightning_integration.kill_script import EPOCHS, KILLED_AT, RUNS, SAVED_EVERY
from tests.lightning_integration.runs import TakenUp, differences, launch
from tests.selection import full

pytestmark = full

LAST = KILLED_AT - KILLED_AT % SAVED_EVERY
END = f"step={EPOCHS * TakenUp.STEPS_PER_EPOCH}.ckpt"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, set[str]]]]:
    """A folder with the checkpoints of all runs, and how each was killed and what it had left by then."""
    folder = tmp_path_factory.mktemp("kill")
    launch("kill_script", "started", folder)
    killed = {}
    for name in RUNS:
        own = folder / "killed" / name
        killed[name] = int((own / "code").read_text()), {path.name for path in own.glob("*.ckpt")}
    launch("kill_script", "again", folder)
    return folder, killed


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(left: Any, name: str) -> None:
    folder, killed = left
    code, saved = killed[name]
    assert code == -SIGKILL
    assert saved == {"last.ckpt", *(f"step={step}.ckpt" for step in range(SAVED_EVERY, KILLED_AT, SAVED_EVERY))}
    again, whole = folder / "killed" / name, folder / "whole" / name
    assert (again / "begins").read_text() == str(LAST)
    assert (whole / "begins").read_text() == "0"

    ends = [torch.load(path / END, weights_only=True) for path in (again, whole)]
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert differences(ends[0][part], ends[1][part]) == [], part
    ours = [end["callbacks"].get("EquivalentClassOptimization") for end in ends]
    assert ours[0] == ours[1]
    assert "equivalent_class" in ends[0]["optimizer_states"][0]
    assert differences(ends[0]["optimizer_states"], torch.load(again / f"step={LAST}.ckpt")["optimizer_states"]) != []
