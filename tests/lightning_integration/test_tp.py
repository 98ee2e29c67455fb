"""Decoders that parallelize_module has split over processes, alone or with fully_shard, train as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_integration import tp_script as script
from tests.lightning_integration.fsdp_script import NO_CALLS, WHY
from tests.lightning_integration.runs import differences, launch, saved_by_rows
from tests.lightning_integration.test_fsdp_training import distance
from tests.selection import full

pytestmark = pytest.mark.skipif(NO_CALLS, reason=WHY)

SIZES = (2, 4)
every_case = pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in script.CASES), *((name, 4) for name in script.IN_FOUR)]
)

Result = dict[str, Any]


def results(folder: Path, size: int) -> list[Result]:
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """For each number of processes the results of all ranks, in plain loops."""
    folder = tmp_path_factory.mktemp("loops")
    launch("tp_script", folder, "loops")
    return {size: results(folder, size) for size in SIZES}


@pytest.fixture(scope="module", params=script.RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a run of a Trainer, and where its processes have left results and checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    launch("tp_script", folder, request.param)
    return request.param, folder


def test_a_small_decoder_on_two_ranks_trains_as_in_one_process(tmp_path: Path) -> None:
    launch("tp_script", tmp_path, "few")
    alone = script.trained("EC-SGD")
    for rank in results(tmp_path, 2):
        own = rank["EC-SGD"]
        assert distance(own["weights"], alone["weights"]) <= 1e-12
        assert own["units"] == alone["units"] == 176
        assert own["held"] < 0.6 * alone["held"]


# The optimizer --------------------------------------------------------------------------------------------------------


@full
@every_case
def test_the_weights_are_those_of_one_process(loops: Any, name: str, size: int) -> None:
    alone = script.trained(name)
    for rank in loops[size]:
        own = rank[name]
        assert distance(own["weights"], alone["weights"]) <= 1e-12
        assert own["units"] == alone["units"] == (176 if script.CASES[name].rotary else 144)


@full
@every_case
def test_all_ranks_have_the_same_bits(loops: Any, name: str, size: int) -> None:
    first, *others = (rank[name]["weights"] for rank in loops[size])
    assert not any(differences(other, first) for other in others)


@full
def test_a_step_places_what_the_base_places_and_takes_three_sums_more(loops: Any) -> None:
    for rank in loops[2]:
        steps = rank["after plain steps"]["collectives"]
        plain, ours = steps[1], steps[3]  # no refresh
        assert all("reduce" in name for name in {*plain, *ours})
        assert sum(ours.values()) == sum(plain.values()) + 3


@full
@pytest.mark.parametrize("how", ["before", "after"])
def test_heads_that_are_counted_need_a_group_from_before_the_split(loops: Any, how: str) -> None:
    for rank in loops[2]:
        own = rank["heads"][how]
        if how == "before":
            assert own["said"] == []
            assert distance(own["weights"], script.counted_heads("before")["weights"]) <= 1e-12
        else:  # nothing is known of the whole network: plain training, and a warning that names the way out
            assert any("trace the module before it is sharded" in text for text in own["said"])
            assert distance(own["weights"], rank["heads"]["plain"]["weights"]) <= 1e-12


@full
def test_clipping_says_what_torch_says_where_only_some_parameters_are_split(loops: Any) -> None:
    for rank in loops[2]:
        plain, ours = rank["clipped"]
        assert plain == ours
        assert "mixed torch.Tensor and DTensor" in plain


# Lightning ------------------------------------------------------------------------------------------------------------


@full
def test_a_trainer_with_two_processes_ends_as_with_one(run: tuple[str, Path]) -> None:
    name, folder = run
    alone = script.fit(name, None, 2)
    for rank in results(folder, 2):
        assert distance(rank["expected"]["weights"], alone["weights"]) <= 1e-12
        assert rank["expected"]["units"] == alone["units"]


@full
@pytest.mark.parametrize("how", ["resumed", "from a file"])
def test_a_resumed_run_has_the_same_bits(run: tuple[str, Path], how: str) -> None:
    for rank in results(run[1], 2):
        assert saved_by_rows(run[0]) <= rank[how]["rows"].keys()
        assert differences(rank[how]["weights"], rank["expected"]["weights"]) == []
        assert differences(rank[how]["rows"], rank["expected"]["rows"]) == []


@full
def test_a_run_that_moves_from_mesh_to_mesh_ends_as_one_that_stays(run: tuple[str, Path]) -> None:
    """Two data parallel processes, then two tensor parallel ones, then two by two, then one alone."""
    name, folder = run
    stays = script.fit(name, None, 3)
    for rank in results(folder, 4):
        assert distance(rank["weights"], stays["weights"]) <= 1e-12
    moved = script.fit(name, None, 4, folder / "moving" / "epoch=2.ckpt", seed=9)
    assert distance(moved["weights"], script.fit(name, None, 4)["weights"]) <= 1e-12
