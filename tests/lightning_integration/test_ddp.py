"""Several processes train as one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.lightning_integration.ddp_script import APART, APPROXIMATE, FORKED, RESUMED, SPAWNED, Resumed, cases, normed
from tests.lightning_integration.join_script import LOOPS
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    Classifier,
    fit,
    mlp,
    quiet,
    same,
    sgd,
    weights,
)
from tests.lightning_integration.runs import differences, launch
from tests.selection import everything, few, full

NAMES = ["first step", "example"]
#: What the one launch of the default run trains.
ALWAYS = ["first step"]
TRAINED = [name for name in cases("unit") if name not in APART]

Result = dict[str, Any]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the results of two processes, each of which runs the script, and what they print."""
    folder = tmp_path_factory.mktemp("launched")
    return folder, launch("ddp_script", "launched", folder, *([] if everything() else ALWAYS))


@pytest.fixture(scope="module")
def two(launched: tuple[Path, str]) -> Path:
    return launched[0]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of processes that one script starts."""
    folder = tmp_path_factory.mktemp("started")
    launch("ddp_script", "started", folder)
    return folder


def results(folder: Path, name: str, count: int) -> list[Result]:
    """Of each rank."""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(count)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative distance of two parameters."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def agrees(ranks: list[Result], alone: Result, exact: bool) -> None:
    """All ranks end with the same bits, and where one process does."""
    assert all(same(rank["weights"], ranks[0]["weights"]) for rank in ranks)
    assert all(rank["units"] == alone["units"] for rank in ranks)
    assert all(rank["steps"] == alone["steps"] for rank in ranks)
    # The gradient is the same mean over 32 examples, summed in another order: it differs by rounding, and a dozen steps
    # with momentum add that up.
    assert distance(ranks[0]["weights"], alone["weights"]) <= (1e-12 if exact else 1e-5)


# Two processes --------------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("name", few(TRAINED, ALWAYS))
def test_ranks_that_start_apart_end_bit_identical(two: Path, name: str, rule: str) -> None:
    first, second = results(two, f"{name}, {rule}", 2)
    assert not same(first["start"], second["start"])
    assert same(first["weights"], second["weights"])
    assert first["units"] == second["units"]
    assert first["steps"] == second["steps"] == (6 if name in ("accumulation", "bucket views") else 12)


@RULES
@pytest.mark.parametrize("name", few([name for name in TRAINED if name not in APPROXIMATE], ALWAYS))
def test_two_processes_end_where_one_does(two: Path, name: str, rule: str) -> None:
    case = cases(rule)[name]
    agrees(results(two, f"{name}, {rule}", 2), case.train(2), case.exact)


@RULES
@pytest.mark.parametrize("name", few(NAMES, ALWAYS))
def test_the_freedoms_are_used_in_two_processes(two: Path, name: str, rule: str) -> None:
    ranks = results(two, f"{name}, {rule}", 2)
    assert [rank["units"] for rank in ranks] == [{32}, {32}]
    plain = Classifier(mlp(seed=0))
    fit(plain, max_epochs=3)
    assert distance(weights(plain), ranks[0]["weights"]) > 1e-3


@full
@RULES
def test_both_ways_of_finding_the_group_give_the_same_weights(two: Path, rule: str) -> None:
    first, other = (results(two, f"{name}, {rule}", 2)[0] for name in NAMES)
    assert same(first["weights"], other["weights"])


@full
def test_one_of_two_processes_prints_the_report(launched: tuple[Path, str]) -> None:
    assert launched[1].count("16 + 16 freedoms in 3 layers, all used") == 2  # once for each rule


@full
@RULES
def test_the_step_takes_the_gradients_of_a_communication_hook(two: Path, rule: str) -> None:
    ranks = results(two, f"low rank, {rule}", 2)
    gradients = ranks[0]["gradients"]
    assert all(same(*pair) for pair in zip(gradients, ranks[1]["gradients"], strict=True))
    matrices = [[g for g in step if g.ndim == 2] for step in gradients]
    assert all(int(torch.linalg.matrix_rank(g)) > 1 for g in matrices[0])
    assert all(int(torch.linalg.matrix_rank(g)) == 1 for step in matrices[2:] for g in step)

    net = mlp(seed=0)
    group = scaling_group(net, EXAMPLE)  # of which compressed gradients cannot say that it is wrong
    optimizer = EquivalentClassOptimizer(sgd(net), group, rule=rule, refresh_interval=None, check=None)
    for step, given in enumerate(gradients):
        if step % 4 == 0:
            optimizer.refresh()
        for p, gradient in zip(net.parameters(), given, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    assert same(weights(net), ranks[0]["weights"])
    assert all(rank["units"] == {32} for rank in ranks)


@full
@RULES
@pytest.mark.parametrize("name", APART)
def test_ranks_that_find_other_freedoms_settle_on_what_all_leave_free(two: Path, name: str, rule: str) -> None:
    first, second = results(two, f"{name}, {rule}", 2)  # what is shown to rank 1 has half of the freedoms
    assert same(first["weights"], second["weights"])
    assert first["units"] == second["units"] == {16}


# Synchronised batch norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_synchronised_batch_norm_has_the_freedoms_of_a_batch_norm(training: bool) -> None:
    plain = normed().train(training)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(normed()).train(training)
    groups = [scaling_group(net, torch.zeros(2, 64)) for net in (plain, synchronised)]
    assert [group.num_units for group in groups] == [10, 10]
    assert [group.describe(unit) for group in groups[:1] for unit in range(10)] == [
        group.describe(unit) for group in groups[1:] for unit in range(10)
    ]


@full
@RULES
@pytest.mark.parametrize("name", ["SyncBatchNorm", "SyncBatchNorm, example"])
def test_a_batch_norm_that_is_synchronised_across_processes_keeps_its_freedoms(two: Path, name: str, rule: str) -> None:
    for rank in results(two, f"{name}, {rule}", 2):
        assert "SyncBatchNorm" in rank["modules"]
        assert rank["units"] == {10}


# Processes started in other ways --------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize(("name", "rule"), FORKED)
def test_four_forked_processes_end_where_one_does(started: Path, name: str, rule: str) -> None:
    case = cases(rule)[name]
    agrees(results(started, f"{name}, {rule}", 4), case.train(4), case.exact)


@full
@pytest.mark.parametrize(("name", "rule"), SPAWNED)
def test_spawned_processes_end_where_one_does(started: Path, name: str, rule: str) -> None:
    case = cases(rule)[name]
    agrees(results(started, f"{name}, {rule}, spawned", 2), case.train(2), case.exact)


@RULES
@EXAMPLES
def test_a_callback_that_has_trained_can_be_sent_to_other_processes(example: Tensor | None, rule: str) -> None:
    callback = quiet(rule=rule)
    module = Classifier(mlp(), example=example)
    run = fit(module, callback)
    _, sent_callback, sent_module = pickle.loads(pickle.dumps((run, callback, module)))
    assert same(weights(sent_module), weights(module))
    fit(module, callback)
    fit(sent_module, sent_callback)
    assert same(weights(sent_module), weights(module))


# Resuming -------------------------------------------------------------------------------------------------------------


@full
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_are_resumed_bit_identical(two: Path, name: str, rank: int) -> None:
    ends = results(two, f"resumed, {name}", 2)[rank]
    assert "equivalent_class" in ends["whole"]["optimizers"][0]
    for checkpoint in Resumed.CHECKPOINTS:
        assert differences(ends[checkpoint], ends["whole"]) == [], checkpoint


@full
@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_that_are_resumed_end_with_the_same_bits(two: Path, name: str) -> None:
    first, second = results(two, f"resumed, {name}", 2)
    assert differences(first, second) == []


# Loops of plain torch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["unit", "path"])
def looped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the results of all loops, and the rule."""
    folder = tmp_path_factory.mktemp("looped")
    launch("join_script", folder, request.param)
    return folder, request.param


@full
@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if not loop.is_fickle])
def test_ranks_with_other_numbers_of_batches_train_as_one_process(looped: tuple[Path, str], name: str) -> None:
    folder, rule = looped
    first, second = results(folder, name, 2)
    for ours, others, theirs in zip(first["weights"], second["weights"], LOOPS[name].follow(rule), strict=True):
        assert same(ours, others)
        assert distance(ours, theirs) <= 1e-12
    assert [rank["units"] for rank in (first, second)] == [32 if count else 0 for count in LOOPS[name].counts]


@full
def test_ranks_that_ec_sgd_shows_other_freedoms_settle_on_what_all_leave_free(looped: tuple[Path, str]) -> None:
    first, second = results(looped[0], "other first calls", 2)
    assert same(first["weights"][0], second["weights"][0])
    assert first["units"] == second["units"] == 16
