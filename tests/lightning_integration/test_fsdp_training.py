"""Networks that fully_shard (FSDP2) has spread over several processes train as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lightning_integration import fsdp_training_script as script
from tests.lightning_integration.fsdp_script import NO_CALLS, WHY
from tests.lightning_integration.runs import launch, saved_by_rows
from tests.selection import full

pytestmark = [full, pytest.mark.skipif(NO_CALLS, reason=WHY)]

SIZES = (2, 4)
RUNS = [(*run, size) for size in SIZES for run in (script.RUNS if size == 2 else script.FEW)]
every_run = pytest.mark.parametrize(("name", "base", "size"), RUNS)
every_fit = pytest.mark.parametrize("name", script.FITS)
every_saved = pytest.mark.parametrize(("name", "whole_file"), script.SAVED)

Result = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """For each number of processes the results of all ranks."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch("fsdp_training_script", folder)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Result]:
    """What one process that holds everything finds."""
    return {run: script.trained(*run) for run in script.RUNS}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def equal(one: Any, two: Any) -> bool:
    """Whether two states agree bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[name]) for name, value in one.items())
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


# The optimizer --------------------------------------------------------------------------------------------------------


@every_run
def test_the_weights_are_those_of_one_process(found: Any, alone: Any, name: str, base: str, size: int) -> None:
    for rank in found[size]:
        result = rank["trained"][name, base]
        assert distance(result["weights"], alone[name, base]["weights"]) <= 1e-12


@every_run
def test_all_ranks_have_the_same_vectors_over_rows_bit_for_bit(found: Any, name: str, base: str, size: int) -> None:
    first, *others = (rank["trained"][name, base]["rows"] for rank in found[size])
    assert {"active"} | saved_by_rows(base) <= first.keys()
    assert all(equal(other, first) for other in others)


@every_run
def test_vectors_over_rows_are_those_of_one_process(found: Any, alone: Any, name: str, base: str, size: int) -> None:
    ours, theirs = found[size][0]["trained"][name, base]["rows"], alone[name, base]["rows"]
    vectors = {name: value for name, value in theirs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    assert distance({name: ours[name] for name in vectors}, vectors) <= 1e-12
    assert torch.equal(ours["active"], theirs["active"])
    assert ours["steps_since_refresh"] == theirs["steps_since_refresh"]


@every_run
def test_statistics_are_those_of_one_process(found: Any, alone: Any, name: str, base: str, size: int) -> None:
    expected = alone[name, base]["statistics"]
    for rank in found[size]:  # gradients that are rounding, as before a norm, may be clipped or not
        assert rank["trained"][name, base]["statistics"] == pytest.approx(expected, abs=0.01)
    assert 0 < expected["clipped_share"] < 1
    assert expected["dormant_units"] == (1 if name == "perceptron" else 0)


def test_some_ranks_hold_nothing_of_some_parameters(found: Any) -> None:
    """So that what the tests above see includes it."""
    assert all(found[4][-1]["trained"][run]["empty"] > 0 for run in script.FEW)


@pytest.mark.parametrize(("name", "base", "size"), [run for run in RUNS if run[:2] in script.TAKEN_UP])
def test_a_run_that_is_taken_up_from_the_state_of_the_optimizer_has_the_same_bits(
    found: Any, name: str, base: str, size: int
) -> None:
    for rank in found[size]:
        result = rank["trained"][name, base]
        assert equal(result["resumed"], result["weights"])


@pytest.mark.parametrize("size", SIZES)
def test_ranks_of_a_plain_loop_settle_on_what_all_of_them_leave_free(found: Any, size: int) -> None:
    first, *others = (rank["in a loop"] for rank in found[size])
    assert first["units"] == 6
    for other in others:
        assert other["units"] == 6
        assert equal(other["weights"], first["weights"])


@pytest.mark.parametrize("size", SIZES)
def test_paths_are_refused_and_the_way_out_is_named(found: Any, size: int) -> None:
    for rank in found[size]:
        assert "needs parameters that are not sharded: use rule='unit'" in rank["refusal"]


# Lightning ------------------------------------------------------------------------------------------------------------


@every_fit
def test_a_trainer_with_two_processes_ends_as_with_one(found: Any, name: str) -> None:
    """With clipped gradients, with accumulated ones, with a parameter not sharded, and with nothing but the call."""
    ours, theirs = found[2][0]["saved"][name, False]["expected"], script.fitted(name)
    assert distance(ours["weights"], theirs["weights"]) <= 1e-11
    assert ours["units"] == theirs["units"] == 16
    assert ours["steps"] == theirs["steps"] == (4 if name == "AdamW" else 8)


@every_saved
def test_a_resumed_run_has_the_same_bits(found: Any, name: str, whole_file: bool) -> None:
    for rank in found[2]:
        result = rank["saved"][name, whole_file]
        assert equal(result["resumed"]["weights"], result["expected"]["weights"])
        assert equal(result["resumed"]["rows"], result["expected"]["rows"])
        assert result["resumed"]["steps"] == result["expected"]["steps"]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_how_a_checkpoint_is_written_changes_nothing(found: Any, name: str) -> None:
    folder, file = (found[2][0]["saved"][name, whole_file]["expected"] for whole_file in (False, True))
    assert equal(folder["weights"], file["weights"])


def test_without_the_callback_momentum_and_the_rule_are_taken_up(found: Any) -> None:
    for rank in found[2]:
        before, after = rank["without callback"]
        assert equal(after["weights"], before["weights"])
        assert equal(after["moments"], before["moments"])
        assert saved_by_rows("sgd") <= before["rows"].keys()
        assert equal(after["rows"], before["rows"])


def test_the_rule_of_paths_is_refused_by_the_callback(found: Any) -> None:
    for rank in found[2]:
        assert rank["refused"]["path"].startswith("MisconfigurationException: The rule 'path' needs parameters")
        assert rank["refused"]["path, ec_sgd"].startswith("ValueError: The rule 'path' needs parameters")
        assert all("use rule='unit'" in rank["refused"][name] for name in ("path", "path, ec_sgd"))
