"""Networks that FullyShardedDataParallel (FSDP1) has flattened and spread over processes train as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lightning_integration import fsdp1_script as script
from tests.lightning_integration.runs import launch, saved_by_rows
from tests.selection import full

RUNS = [(*run, size) for run in script.RUNS for size in script.LAYOUTS[run[0]].sizes]
Result = dict[Any, Any]


def load(folder: Any, size: int) -> list[Result]:
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """For each number of processes the results of all ranks."""
    folder = tmp_path_factory.mktemp("fsdp1")
    launch("fsdp1_script", folder, "all")
    return {size: load(folder, size) for size in (2, 4)}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Result]:
    """What one process that holds everything finds, by maker and base."""
    return {run[1:]: script.trained(*run) for run in script.RUNS if run[0] == "whole"}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def assert_same(ranks: list[Result], expected: Result, base: str) -> None:
    first = ranks[0]["rows"]
    for own in ranks:
        assert distance(own["weights"], expected["weights"]) <= 1e-12
        vectors = {name: value for name, value in own["rows"].items() if isinstance(value, Tensor)}
        assert {"active"} | saved_by_rows(base) <= vectors.keys()
        assert all(torch.equal(value, first[name]) for name, value in vectors.items())  # the same bits on all ranks
        told = "units", "names", "dimension"
        assert [own[name] for name in told] == [expected[name] for name in told]
    assert expected["units"] == 25


def test_training_from_the_first_call_is_that_of_one_process(tmp_path: Any) -> None:
    launch("fsdp1_script", tmp_path, "small")
    ranks = [rank[script.SMALL] for rank in load(tmp_path, 2)]
    assert_same(ranks, script.trained(*script.SMALL), script.SMALL[-1])
    assert all(rank["empty"] > 0 for rank in ranks)  # each holds nothing of some parameters
    start = dict(script.start()[0].named_parameters())
    assert all(float((weight - start[name]).abs().max()) > 1e-3 for name, weight in ranks[0]["weights"].items())


@full
@pytest.mark.parametrize(("layout", "maker", "base", "size"), RUNS)
def test_training_is_that_of_one_process(found: Any, alone: Any, layout: str, maker: str, base: str, size: int) -> None:
    """With clipped and accumulated gradients, several refreshes, and every sharding strategy."""
    assert_same([rank[layout, maker, base] for rank in found[size]], alone[maker, base], base)


@full
def test_a_trace_leaves_all_as_it_was_and_does_not_communicate(found: Any) -> None:
    net, x, _ = script.start()
    for rank in found[2]:
        assert rank["trace"]["same"]
        assert rank["trace"]["traced"] == 0
        assert rank["trace"]["unit"] == script.scaling_group(net, x).describe(0)


@full
def test_a_step_takes_four_sums_and_gathers_nothing(found: Any) -> None:
    """One more than elsewhere: a rank with nothing of a parameter asks the others whether it has a gradient."""
    for rank in found[2]:
        first, *others = rank["trace"]["steps"]
        assert all(sums.keys() == {"c10d::allreduce_"} for sums in (first, *others))
        assert all(sums["c10d::allreduce_"] == 4 for sums in others[1:])


@full
def test_rescaling_forgets_whole_weights_that_a_call_has_left(found: Any) -> None:
    for rank in found[2]:
        assert len(rank["acted"]) == 6
        assert max(rank["acted"].values()) <= 1e-12


@full
def test_tied_frozen_and_unused_parameters_train_as_in_one_process(found: Any) -> None:
    expected = script.tied(1)
    for rank in found[2]:
        assert distance(rank["tied"]["weights"], expected["weights"]) <= 1e-12
        assert rank["tied"]["units"] == expected["units"] == 7


@full
@pytest.mark.parametrize("how", ["found", "told"])
def test_a_target_follows(found: Any, how: str) -> None:
    expected = script.followed(how, 1)
    assert expected["lines"] == ["target follows net"]
    for rank in found[2]:
        assert rank["followed"][how]["lines"] == expected["lines"]
        assert distance(rank["followed"][how]["weights"], expected["weights"]) <= 1e-12


@full
def test_a_target_that_no_rank_can_compare_is_named(found: Any) -> None:
    for rank in found[2]:
        assert [text.partition(",")[0] for text in rank["hidden"]] == ["target has the form of net"]


@full
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strided", "0.weight is flattened in the order of its strides: make it contiguous() before it is wrapped"),
        ("unknown", "a FullyShardedDataParallel module that has not been seen: call the module before"),
        ("flat", "pass use_orig_params=True"),
        ("distance", "compare the modules that full state dicts are loaded into"),
        ("muon", "Muon takes whole matrices, and FullyShardedDataParallel leaves pieces of them"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_way_out(found: Any, name: str, message: str) -> None:
    for rank in found[2]:
        assert message in rank["refusals"][name]
