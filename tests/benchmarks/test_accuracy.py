"""The accuracy benchmark: what is run, in which order, and what of a run is recorded."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks.small import GRID, ImagesAndText, written
from tests.selection import full

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import accuracy
import report
import tasks
import training
from grid import Contender, Grid
from training import Result, Run

BENCHMARKS = Path(accuracy.__file__).parent
UNITS = "EC-SGD (units)"

pytestmark = full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ImagesAndText(tmp_path_factory.mktemp("data")).folder)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return written(tmp_path / "grid.yaml", GRID)


def result(run: Run, validation: float, test: float = 0.0) -> Result:
    return Result(run, validation, test, 0.1, [1.0, 0.5], 1.0, 8)


def trained(grid: Grid, run: Run, folder: str) -> Result:
    return training.train(run, grid.tasks[run.task], grid.contenders[run.contender], grid.warmup, folder, "cpu")


# The whole


@pytest.mark.parametrize("task", ["images", "text"])
def test_the_grid_is_run_once_and_resumed_where_it_stopped(
    task: str, grid: Grid, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    accuracy.run_grid(grid, folder, out, only_tasks=[task])
    results = accuracy.read_results(out)
    lines = out.read_text().splitlines()
    assert "torch" in json.loads(lines[0])
    assert len(lines) == 1 + len(results)
    assert {run.task for run in results} == {task}
    assert all(run in results for run in accuracy.wanted(grid, results) if run.task == task)
    for contender in grid.contenders:
        best = accuracy.chosen_rate(grid, task, contender, results)
        found = [results[Run(task, contender, best, seed)] for seed in range(2)]
        if task == "images":
            assert min(one.test for one in found) > 50
        else:
            assert max(one.test for one in found) < 0.8 * math.log(4)
        assert Run(task, contender, best, 1, 1.0) in results
    kept = lines[: len(lines) // 2]
    out.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    accuracy.run_grid(grid, folder, out, only_tasks=[task])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) - 1 == len(lines) - len(kept)
    assert printed[-1].startswith("0 runs")
    again = accuracy.read_results(out)
    assert again.keys() == results.keys()
    for run, found in again.items():
        assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(results[run], seconds=0.0)
    report.write_report(grid, out, tmp_path / "report", "FOUND")
    text = (tmp_path / "report" / "FOUND.md").read_text()
    assert "EC-SGD (units) against SGD-M" in text
    assert (tmp_path / "report" / "FOUND.png").stat().st_size > 1000


def test_sittings_end_in_time_and_do_some_of_the_tasks_and_contenders(
    grid: Grid, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    accuracy.run_grid(grid, folder, out, minutes=0)
    assert not accuracy.read_results(out)
    assert capsys.readouterr().out.startswith("8 runs are known to be missing")
    accuracy.run_grid(grid, folder, out, only_tasks=["images"], only_contenders=["SGD-M"])
    results = accuracy.read_results(out)
    assert {(run.task, run.contender) for run in results} == {("images", "SGD-M")}
    # The other contender knows the first one's best rate, though it is not of its sitting.
    rate = accuracy.chosen_rate(grid, "images", "SGD-M", results)
    accuracy.run_grid(grid, folder, out, only_tasks=["images"], only_contenders=[UNITS])
    assert Run("images", UNITS, rate, 1) in accuracy.read_results(out)


def test_two_processes_find_what_one_finds(grid: Grid, folder: str, tmp_path: Path) -> None:
    grid = dataclasses.replace(grid, rates=[0.01, 0.1], seeds=1, refine=False)
    found = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.jsonl"
        accuracy.run_grid(grid, folder, out, jobs, only_tasks=["images"], only_contenders=["SGD-M"])
        found.append({run: one.test for run, one in accuracy.read_results(out).items()})
    assert found[0] == found[1]


# The search


def searched(grid: Grid, scores: dict[float, float], task: str = "images") -> tuple[list[set[float]], float]:
    """The rounds of a search in which rates reach these scores, and the rate that was chosen."""
    results: dict[Run, Result] = {}
    rounds = []
    while following := accuracy.search(grid, task, "SGD-M", results)[1]:
        rounds.append(following)
        for rate in following:
            run = Run(task, "SGD-M", rate, 0)
            results[run] = result(run, scores[rate])
    return rounds, accuracy.chosen_rate(grid, task, "SGD-M", results)


def test_rates_are_tried_outwards_until_they_are_hopeless_and_refined_around_the_best(grid: Grid) -> None:
    scores = {0.001: 20.0, 0.01: 64.0, 0.1: 65.0, 1.0: 10.0, 0.032: 66.0, 0.32: 50.0}
    assert searched(grid, scores) == ([{0.1}, {1.0, 0.01}, {0.001}, {0.032, 0.32}], 0.032)
    del scores[0.001]  # never asked for below a hopeless rate
    assert searched(grid, scores | {0.01: 59.0}) == ([{0.1}, {1.0, 0.01}, {0.032, 0.32}], 0.032)
    rising = {0.001: 20.0, 0.01: 30.0, 0.1: 50.0, 1.0: 80.0, 0.32: 70.0}
    assert searched(grid, rising) == ([{0.1}, {1.0, 0.01}, {0.32}], 1.0)
    hopeless_in_the_middle = {1.0: 10.0, 0.1: 10.0, 0.01: 60.0, 0.001: 65.0, 0.0032: 66.0}
    assert searched(grid, hopeless_in_the_middle) == ([{0.1}, {1.0, 0.01}, {0.001}, {0.0032}], 0.0032)
    coarse = dataclasses.replace(grid, refine=False)
    assert searched(coarse, hopeless_in_the_middle) == ([{0.1}, {1.0, 0.01}, {0.001}], 0.001)


@pytest.mark.parametrize("best", [0, 1])
def test_the_grid_for_a_gpu_is_24_runs_whichever_rate_is_best(best: int) -> None:
    grid = Grid.read(BENCHMARKS / "gpu.yaml")
    results: dict[Run, Result] = {}
    while missing := [run for run in accuracy.wanted(grid, results) if run not in results]:
        for run in missing:
            is_best = run.rate == grid.rates_of(run.task)[best]
            results[run] = result(run, 90.0 if is_best else 10.0)
    assert len(results) == 24
    assert {run.scale for run in results} == {0.0}
    assert all(accuracy.chosen_rate(grid, *pair, results) for pair in grid.pairs(1))


def test_of_losses_the_least_is_the_best(grid: Grid) -> None:
    scores = {0.01: 2.0, 0.1: 1.9, 1.0: 4.0, 0.001: 2.2, 0.032: 1.8, 0.32: 3.0}
    assert searched(grid, scores, "text") == ([{0.1}, {1.0, 0.01}, {0.001}, {0.032, 0.32}], 0.032)
    del scores[0.001]
    assert searched(grid, scores | {0.01: 2.15}, "text")[0] == [{0.1}, {1.0, 0.01}, {0.032, 0.32}]


def found_at(contender: str, scores: dict[float, float], test: float = 0.0) -> dict[Run, Result]:
    return {(run := Run("images", contender, rate, 0)): result(run, score, test) for rate, score in scores.items()}


SEARCH = {0.01: 60.0, 0.032: 60.0, 0.1: 70.0, 0.32: 60.0, 1.0: 60.0, 0.001: 10.0}


def trained_for_the_range(grid: Grid, plain: float, scores: dict[float, float]) -> list[float]:
    """The rates of the form that are trained after its search, if the plain form's best is ``plain``."""
    results = found_at("SGD-M", {rate: score - 70.0 + plain for rate, score in SEARCH.items()})
    while not accuracy.search(grid, "images", UNITS, results)[0] or accuracy.search(grid, "images", UNITS, results)[1]:
        results |= {run: result(run, scores[run.rate]) for run in accuracy.searches(grid, "images", UNITS, results)}
    before = accuracy.search(grid, "images", UNITS, results)
    tried = set(results)
    while runs := list(accuracy.searches(grid, "images", UNITS, results)):
        results |= {run: result(run, scores[run.rate]) for run in runs}
    assert accuracy.search(grid, "images", UNITS, results) == before
    assert accuracy.search_range(grid, "images", UNITS, results)[0].keys() >= before[0].keys()
    return sorted(run.rate for run in set(results) - tried)


def test_a_form_is_tried_farther_out_until_it_is_behind_the_best_of_its_plain_form(grid: Grid) -> None:
    grid = dataclasses.replace(grid, rates=[0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0])
    middle = {0.1: 80.0, 0.032: 79.0, 0.32: 79.0}
    # Hopeless, at more than 5 below 80, are 0.01 and 1.0 for its own search.
    scores = {**middle, 0.01: 72.0, 0.001: 68.0, 0.0001: 20.0, 1.0: 74.0, 10.0: 70.0, 100.0: 10.0}
    assert trained_for_the_range(grid, 70.0, scores) == [0.001, 10.0, 100.0]
    assert trained_for_the_range(grid, 73.5, scores) == [10.0]
    assert trained_for_the_range(grid, 75.5, scores) == []
    assert trained_for_the_range(grid, 5.0, scores) == [0.0001, 0.001, 10.0, 100.0]
    # Even the best of all scores is none of the search's if it is found beyond a hopeless one.
    assert trained_for_the_range(grid, 73.5, {**scores, 10.0: 99.0}) == [10.0, 100.0]


def test_the_range_waits_for_the_best_of_the_plain_form(grid: Grid) -> None:
    form = found_at(UNITS, SEARCH)
    assert not list(accuracy.searches(grid, "images", UNITS, form))
    assert accuracy.plain_level(grid, "images", UNITS, form) is None
    assert accuracy.plain_level(grid, "images", UNITS, form | found_at("SGD-M", SEARCH)) == 69.0
    assert accuracy.plain_level(grid, "images", "SGD-M", form | found_at("SGD-M", SEARCH)) is None


def test_all_seeds_are_trained_at_three_rates(grid: Grid) -> None:
    results = found_at("SGD-M", SEARCH) | found_at(UNITS, {**SEARCH, 0.01: 65.0, 0.1: 60.0, 0.0032: 64.0})
    rates = accuracy.compared_rates(grid, "images", UNITS, results)
    assert rates == {"best": 0.01, "plain": 0.1, "default": 0.3}
    runs = set(accuracy.finals(grid, "images", UNITS, results))
    at = [(rate, 0.0) for rate in rates.values()] + [(0.01, 1.0)]
    assert runs == {Run("images", UNITS, rate, seed, scale) for rate, scale in at for seed in range(2)}
    plain = set(accuracy.finals(grid, "images", "SGD-M", results))
    assert plain == {Run("images", "SGD-M", 0.1, seed, scale) for seed in range(2) for scale in (0.0, 1.0)}


def test_the_choice_is_among_the_rates_of_the_search_and_by_validation(grid: Grid) -> None:
    """Neither test data nor rates that were tried for another reason play a part in it."""
    results = found_at("SGD-M", SEARCH, test=1.0) | found_at("SGD-M", {0.3: 99.0}, test=99.0)
    results |= {run: dataclasses.replace(one, test=80.0) for run, one in results.items() if run.rate == 0.01}
    assert accuracy.chosen_rate(grid, "images", "SGD-M", results) == 0.1


def test_what_says_most_is_run_first(grid: Grid) -> None:
    """Contenders of the first tier on all tasks, then the second; searches first, then seed by seed."""
    contenders = {**grid.contenders, "late": Contender("adamw", tier=2)}
    grid = dataclasses.replace(grid, contenders=contenders, refine=False)
    results: dict[Run, Result] = {}
    order = []
    while run := next((run for run in accuracy.wanted(grid, results) if run not in results), None):
        order.append(run)
        results[run] = result(run, 50.0 + math.log(run.rate))
    late = [run.contender == "late" for run in order]
    assert late == sorted(late)
    early = list(itertools.takewhile(lambda run: run.contender != "late", order))
    seeds = [run.seed for run in early]
    assert seeds == sorted(seeds)
    searched = [run.seed == 0 and not run.scale and run.rate in grid.rates for run in early]
    assert searched == sorted(searched, reverse=True)
    assert len({(run.task, run.contender) for run in early[: searched.count(True)]}) == 4


# A run


def test_a_rescaled_start_is_the_same_function(grid: Grid, folder: str) -> None:
    """Where the rule depends on the class alone, so does the result: here over a whole run, in float32."""
    curves = [trained(grid, Run("images", UNITS, 0.1, 0, scale), folder).curve for scale in (0.0, 1.0)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


@pytest.mark.parametrize(("task", "guess"), [("images", 10.0), ("text", math.log(4))])
def test_a_run_that_diverges_ends_early_and_counts_as_a_guess(task: str, guess: float, grid: Grid, folder: str) -> None:
    found = trained(grid, Run(task, "SGD-M", 1e8, 0), folder)
    assert (found.validation, found.test) == pytest.approx((guess, guess))
    assert len(found.curve) < training.POINTS
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_a_run_records_its_curve_and_the_memory_of_its_state(grid: Grid, folder: str) -> None:
    found = {name: trained(grid, Run("images", name, 0.01, 0), folder) for name in grid.contenders}
    count = sum(p.numel() for p in grid.tasks["images"].net(10).parameters())
    assert found["SGD-M"].state_bytes == 4 * count
    rows, units = 8 + 10 + 8 + 10, 8  # rows of two weights, and biases
    assert 4 * count < found[UNITS].state_bytes < 4 * count + 5 * 4 * rows + 100 * units
    for one in found.values():
        assert len(one.curve) == training.POINTS
        assert one.curve[0] > one.curve[-1] > 0
        assert one.loss == pytest.approx(one.curve[-1], rel=0.3)
    adamw = trained(
        dataclasses.replace(grid, contenders={"AdamW": Contender("adamw")}), Run("images", "AdamW", 0.01, 0), folder
    )
    assert adamw.state_bytes == 8 * count + 4 * 4  # and one counter for each tensor


def test_a_task_under_autocast_computes_in_16_bits_and_says_so(
    folder: str, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(
        training.EquivalentClassOptimizer, "follow_precision", lambda self, precision: told.append(precision())
    )
    seen = set()
    build = tasks.NETWORKS["mlp"]

    def watched(**arguments: object) -> nn.Module:
        net = build(**arguments)
        net.register_forward_hook(lambda module, inputs, outputs: seen.add((module.training, outputs.dtype)))
        return net

    monkeypatch.setitem(tasks.NETWORKS, "mlp", watched)
    task = dataclasses.replace(grid.tasks["images"], autocast=True)
    found = trained(dataclasses.replace(grid, tasks={"images": task}), Run("images", UNITS, 0.1, 0), folder)
    assert seen == {(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)}  # the first is the trace
    assert told == ["bf16-mixed"]
    assert found.test > 50
    seen.clear()
    trained(grid, Run("images", UNITS, 0.1, 0), folder)
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert told == ["bf16-mixed"]


def test_text_has_an_epoch_of_its_own(folder: str, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "EPOCH_OF_TEXT", 7)
    data = tasks.load(folder, "cpu", **grid.tasks["text"].data)
    starts = []
    taken = list(training.batches(data, 3, 17, 0, lambda: starts.append(0)))
    assert (len(starts), len(taken)) == (3, 17)
    other = list(training.batches(data, 3, 17, 1, lambda: None))
    again = list(training.batches(data, 3, 17, 0, lambda: None))
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(taken, again, strict=True))
    assert not any(torch.equal(x, y) for (x, _), (y, _) in zip(taken, other, strict=True))


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [training.schedule(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 1e-3


def test_gradients_are_centralized_and_clipped() -> None:
    net = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    method = training.Method(Contender("sgd", centralize=True), net, x, 1.0)
    net(torch.randn(5, 4)).square().sum().backward()
    assert net.bias.grad is not None
    assert net.weight.grad is not None
    bias = net.bias.grad.clone()
    method.step()
    assert net.weight.grad.mean(1) == pytest.approx(torch.zeros(3), abs=1e-6)
    assert torch.equal(net.bias.grad, bias)
    method = training.Method(Contender("sgd", clip_norm=0.5), net, x, 1.0)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    method.step()
    after = nn.utils.parameters_to_vector(net.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(0.5)


def test_the_first_clipped_gradient_is_that_of_the_balanced_weights(folder: str, grid: Grid) -> None:
    data = tasks.load(folder, "cpu", **grid.tasks["images"].data)
    contender = Contender("sgd", ec={"rule": "unit"}, clip_norm=1.0)
    found = [
        training.train(Run("", "", 0.1, 0, scale), grid.tasks["images"], contender, 0.05, folder, "cpu").curve[0]
        for scale in (0.0, 1.0)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert data.outputs == 10


@pytest.mark.parametrize("scale", ["default", "full", "settings", "gpu", "gpu_smoke"])
def test_every_contender_of_the_committed_grids_can_take_a_step(scale: str) -> None:
    grid = Grid.read(BENCHMARKS / f"{scale}.yaml")
    seen = set()
    for name, task in grid.tasks.items():
        smaller = {"width": 8, "hidden": 1, "heads": 2} | ({} if task.network["name"] == "plain" else {"depth": 1})
        network = task.network | {option: size for option, size in smaller.items() if option in task.network}
        x, y = example(task)
        for contender in grid.of(name):
            if (network["name"], contender) in seen:
                continue
            seen.add((network["name"], contender))
            torch.manual_seed(0)
            net = dataclasses.replace(task, network=network).net(10)
            method = training.Method(grid.contenders[contender], net, x[:2], 0.01)
            method.start_epoch()
            before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
            with task.precision(x.device):
                loss = training.cross_entropy(net, x, y)
            loss.backward()
            method.step()
            after = nn.utils.parameters_to_vector(net.parameters()).detach()
            assert after.isfinite().all()
            assert not torch.equal(before, after)


def example(task: accuracy.Task) -> tuple[torch.Tensor, torch.Tensor]:
    if "text" in task.data:
        tokens = torch.randint(10, (4, task.data["context"] + 1))
        return tokens[:, :-1], tokens[:, 1:]
    channels = 1 if task.data["dataset"] == "mnist" else 3
    size = task.data["size"] if channels == 1 else task.network.get("size", 16)
    return torch.randn(8, channels, size, size), torch.arange(8)


def test_bad_grids_and_results_are_refused_by_name(tmp_path: Path, grid: Grid) -> None:
    path = tmp_path / "bad.yaml"
    for old, new, named in (
        ("batch_size", "size_of_batch", "size_of_batch"),
        ("plain: SGD-M", "plain: Lion", "Lion"),
        ("plain: SGD-M", "tasks: [chess]", "chess"),
        ("steps: 60", "warmup: 1", "warmup"),
        ("steps: 60", "", "either epochs"),
    ):
        with pytest.raises(ValueError, match=named):
            written(path, GRID.replace(old, new))
    path.write_text('{"torch": "2"}\nnonsense\n')
    with pytest.raises(ValueError, match="Line 2"):
        accuracy.read_results(path)
    path.write_text('{"torch": "2"}\n')
    with pytest.raises(ValueError, match="no complete search"):
        report.write_report(grid, path, tmp_path, "FOUND")
