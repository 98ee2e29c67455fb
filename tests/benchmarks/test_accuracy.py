from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.selection import full

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import report  # noqa: E402
import tasks  # noqa: E402

pytestmark = full

GRID = """
rates: [0.001, 0.01, 0.1, 1.0]
seeds: 2
search_seeds: 1
warmup: 0.05
contenders:
  SGD-M: {base: sgd, options: {momentum: 0.9}, rescaled: true}
  EC-SGD-M, unit: {base: sgd, options: {momentum: 0.9}, ec: {rule: unit}, rescaled: true}
tasks:
  small:
    network: {name: mlp, inputs: 16, hidden: 1, width: 8, bias: true, init: default}
    data: {dataset: mnist, size: 4, num_train: 200, num_validation: 100}
    batch_size: 10
    epochs: 6
    target: 50
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 8 x 8 images that a small network can tell apart."""
    generator = np.random.default_rng(0)
    centres = generator.uniform(0, 255, (10, 4, 4)).repeat(2, 1).repeat(2, 2)
    arrays = {}
    for split, count in (("train", 400), ("test", 100)):
        labels = generator.integers(0, 10, count)
        arrays[f"x_{split}"] = np.clip(centres[labels] + generator.normal(0, 20, (count, 8, 8)), 0, 255).astype("uint8")
        arrays[f"y_{split}"] = labels.astype("uint8")
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "mnist.npz", **arrays)
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> accuracy.Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return accuracy.Grid.read(path)


def result(
    run: accuracy.Run, validation: float, test: float = 0.0, curve: list[float] | None = None
) -> accuracy.Result:
    return accuracy.Result(run, validation, test, 0.1, curve or [50.0, 80.0], 1.0)


def test_the_grid_is_run_once_and_resumed_where_it_stopped(
    grid: accuracy.Grid, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    accuracy.run_grid(grid, str(folder), out, jobs=1, device="cpu")
    results = accuracy.read_results(out)
    lines = out.read_text().splitlines()
    assert "torch" in json.loads(lines[0])
    assert len(lines) == 1 + len(results)
    for contender in grid.contenders:
        scores, following = accuracy.search(grid, "small", contender, results)
        assert not following
        best = accuracy.best_rate(scores)
        for seed in range(2):
            assert results[accuracy.Run("small", contender, best, seed)].test > 50
            assert accuracy.Run("small", contender, best, seed, 1.0) in results
    kept = lines[: len(lines) // 2]
    out.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    accuracy.run_grid(grid, str(folder), out, jobs=1, device="cpu")
    assert capsys.readouterr().out.count(" %") == len(lines) - len(kept)
    again = accuracy.read_results(out)
    assert again.keys() == results.keys()
    for run, found in again.items():
        assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(results[run], seconds=0.0)
    report.write_report(grid, out, tmp_path / "report", "FOUND")
    text = (tmp_path / "report" / "FOUND.md").read_text()
    assert "EC-SGD-M, unit against SGD-M" in text
    assert (tmp_path / "report" / "FOUND.png").stat().st_size > 1000


def test_a_rescaled_start_is_the_same_function(grid: accuracy.Grid, folder: Path) -> None:
    """Where the rule depends on the class alone, so does the result: here over a whole run, in float32."""
    task, contender = grid.tasks["small"], grid.contenders["EC-SGD-M, unit"]
    curves = [
        accuracy.train(
            accuracy.Run("small", "", 0.1, 0, scale), task, contender, 0.05, str(folder), torch.device("cpu")
        ).curve
        for scale in (0.0, 1.0)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def searched(grid: accuracy.Grid, accuracies: dict[float, float]) -> tuple[list[set[float]], float]:
    """The rounds of a search in which rates reach these accuracies, and the rate that was chosen."""
    results: dict[accuracy.Run, accuracy.Result] = {}
    rounds = []
    while following := accuracy.search(grid, "small", "SGD-M", results)[1]:
        rounds.append(following)
        for rate in following:
            run = accuracy.Run("small", "SGD-M", rate, 0)
            results[run] = result(run, accuracies[rate])
    return rounds, accuracy.best_rate(accuracy.search(grid, "small", "SGD-M", results)[0])


def test_rates_are_tried_outwards_until_they_are_hopeless_and_refined_around_the_best(grid: accuracy.Grid) -> None:
    accuracies = {0.001: 20.0, 0.01: 64.0, 0.1: 65.0, 1.0: 10.0, 0.032: 66.0, 0.32: 50.0}
    assert searched(grid, accuracies) == ([{0.1}, {1.0, 0.01}, {0.001}, {0.032, 0.32}], 0.032)
    del accuracies[0.001]  # never asked for below a hopeless rate
    assert searched(grid, accuracies | {0.01: 59.0}) == ([{0.1}, {1.0, 0.01}, {0.032, 0.32}], 0.032)
    rising = {0.001: 20.0, 0.01: 30.0, 0.1: 50.0, 1.0: 80.0, 0.32: 70.0}
    assert searched(grid, rising) == ([{0.1}, {1.0, 0.01}, {0.32}], 1.0)
    hopeless_in_the_middle = {1.0: 10.0, 0.1: 10.0, 0.01: 60.0, 0.001: 65.0, 0.0032: 66.0}
    assert searched(grid, hopeless_in_the_middle) == ([{0.1}, {1.0, 0.01}, {0.001}, {0.0032}], 0.0032)
    coarse = dataclasses.replace(grid, refine=False)
    assert searched(coarse, hopeless_in_the_middle) == ([{0.1}, {1.0, 0.01}, {0.001}], 0.001)


def test_the_rate_is_chosen_by_validation_and_never_by_test_images(grid: accuracy.Grid) -> None:
    results = {}
    found = ((0.01, 60.0, 99.0), (0.032, 60.0, 99.0), (0.1, 70.0, 1.0), (0.32, 60.0, 99.0), (1.0, 60.0, 99.0))
    for rate, validation, test in found:
        for seed in range(2):
            run = accuracy.Run("small", "SGD-M", rate, seed)
            results[run] = result(run, validation, test)
    outcome = report.Outcome(grid, results, "small", "SGD-M")
    assert outcome.complete
    assert outcome.rate == 0.1
    assert outcome.tests == [1.0, 1.0]
    assert {run.rate for run in accuracy.finals(grid, "small", results | _searched(grid))} == {0.1}


def _searched(grid: accuracy.Grid) -> dict[accuracy.Run, accuracy.Result]:
    runs = [accuracy.Run("small", "EC-SGD-M, unit", rate, 0) for rate in (0.01, 0.032, 0.1, 0.32, 1.0)]
    return {run: result(run, 90.0 if run.rate == 0.1 else 50.0) for run in runs}


def test_widths_are_interpolated_between_logarithms(grid: accuracy.Grid) -> None:
    results = {}
    for rate, validation in ((0.001, 68.0), (0.0032, 68.5), (0.01, 70.0), (0.032, 69.5), (0.1, 69.5), (1.0, 59.5)):
        for seed in range(2):
            run = accuracy.Run("small", "SGD-M", rate, seed)
            results[run] = result(run, validation, curve=[10.0, 30.0, 60.0, 70.0])
    outcome = report.Outcome(grid, results, "small", "SGD-M")
    # Down two thirds of the way from 0.01 to 0.0032, up a twentieth of a decade from 0.1.
    assert outcome.width() == pytest.approx(0.1 * 10**0.05 / (0.01 * 0.32 ** (2 / 3)))
    assert outcome.steps_to(50.0) == 75.0
    assert math.isinf(outcome.steps_to(99.0))


def test_intervals_and_verdicts_are_those_of_student_and_welch() -> None:
    interval = report.Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5))
    assert report.compare([5.0, 5.1, 5.2], [4.0, 4.1, 4.2]).startswith("ahead (+1.00")
    assert report.compare([4.0, 4.1, 4.2], [5.0, 5.1, 5.2]).startswith("behind (-1.00")
    assert report.compare([4.0, 5.0, 6.0], [4.1, 5.1, 6.1]).startswith("level")


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [accuracy.schedule(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 1e-3


@pytest.mark.parametrize("scale", ["default", "full", "settings"])
def test_every_contender_of_the_committed_grids_can_take_a_step(scale: str) -> None:
    grid = accuracy.Grid.read(BENCHMARKS / f"{scale}.yaml")
    seen = set()
    for name, task in grid.tasks.items():
        network = {**task.network, "width": 4}
        channels = 1 if task.data["dataset"] == "mnist" else 3
        size = 28 if channels == 1 else 16
        for contender in grid.of(name):
            if (network["name"], contender) in seen:
                continue
            seen.add((network["name"], contender))
            torch.manual_seed(0)
            net = dataclasses.replace(task, network=network).net()
            images = torch.randn(8, channels, size, size)
            method = accuracy.Method(grid.contenders[contender], net, images[:2], 0.01)
            method.start_epoch()
            before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
            nn.functional.cross_entropy(net(images), torch.arange(8)).backward()
            method.step()
            after = nn.utils.parameters_to_vector(net.parameters()).detach()
            assert after.isfinite().all()
            assert not torch.equal(before, after)


def test_centralized_gradients_have_rows_of_zero_mean() -> None:
    net = nn.Linear(4, 3)
    method = accuracy.Method(accuracy.Contender("sgd", centralize=True), net, torch.randn(2, 4), 1.0)
    net(torch.randn(5, 4)).square().sum().backward()
    assert net.bias.grad is not None
    assert net.weight.grad is not None
    bias = net.bias.grad.clone()
    method.step()
    assert net.weight.grad.mean(1) == pytest.approx(torch.zeros(3), abs=1e-6)
    assert torch.equal(net.bias.grad, bias)


def test_a_run_that_diverges_ends_early_and_counts_as_chance(grid: accuracy.Grid, folder: Path) -> None:
    run = accuracy.Run("small", "SGD-M", 1e8, 0)
    found = accuracy.train(run, grid.tasks["small"], grid.contenders["SGD-M"], 0.05, str(folder), torch.device("cpu"))
    assert (found.validation, found.test) == (10.0, 10.0)


def test_data_that_are_not_there_or_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    tasks.load.cache_clear()
    if "torchvision" not in sys.modules:
        with pytest.raises(FileNotFoundError, match=r"mnist\.npz"):
            tasks.load("mnist", str(tmp_path), 4, 10, 10)
    with pytest.raises(ValueError, match="400 training images"):
        tasks.load("mnist", str(folder), 4, 400, 10)
    with pytest.raises(ValueError, match="no multiple of 3"):
        tasks.load("mnist", str(folder), 3, 10, 10)


def test_training_validation_and_test_images_are_apart_and_standardised(folder: Path) -> None:
    split = tasks.load("mnist", str(folder), 4, 200, 100)
    assert split.train[0].shape == (200, 1, 4, 4)
    assert len(split.validation[1]) == 100
    assert len(split.test[1]) == 100
    assert abs(float(split.train[0].mean())) < 1e-5
    both = torch.cat([split.train[0], split.validation[0]]).flatten(1)
    assert len(both.unique(dim=0)) == 300


def test_bad_grids_and_results_are_refused_by_name(tmp_path: Path, grid: accuracy.Grid) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(GRID.replace("batch_size", "size_of_batch"))
    with pytest.raises(ValueError, match="size_of_batch"):
        accuracy.Grid.read(path)
    path.write_text(GRID + "    contenders: [Lion]\n")
    with pytest.raises(ValueError, match="Lion"):
        accuracy.Grid.read(path)
    path.write_text('{"torch": "2"}\nnonsense\n')
    with pytest.raises(ValueError, match="Line 2"):
        accuracy.read_results(path)
    path.write_text('{"torch": "2"}\n')
    with pytest.raises(ValueError, match="no complete contender"):
        report.write_report(grid, path, tmp_path, "FOUND")


@pytest.mark.parametrize("name", list(tasks.NETWORKS))
def test_networks_have_ten_outputs_and_know_their_initialisations(name: str) -> None:
    arguments = {"inputs": 256, "hidden": 2, "width": 4, "bias": True} if name == "mlp" else {"channels": 1, "width": 4}
    net = tasks.NETWORKS[name](**arguments, init="he")
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match="xavier"):
        tasks.NETWORKS[name](**arguments, init="xavier")
