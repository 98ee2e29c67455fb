"""The authors' experiment, on images that a few epochs tell apart."""

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

import authors  # noqa: E402
import authors_page  # noqa: E402

Data = tuple[authors.Split, authors.Split]
RUNS = [(contender, start) for contender in authors.CONTENDERS for start in authors.STARTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 8 x 8 images."""
    generator = np.random.default_rng(0)
    centres = generator.uniform(0, 255, (10, 8, 8))
    arrays = {}
    for split, count in (("train", 1000), ("test", 100)):
        labels = generator.integers(0, 10, count)
        arrays[f"x_{split}"] = np.clip(centres[labels] + generator.normal(0, 60, (count, 8, 8)), 0, 255).astype("uint8")
        arrays[f"y_{split}"] = labels.astype("uint8")
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "mnist.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return authors.load(str(folder))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *options: str) -> None:
    argv = ["authors.py", "--data", str(folder), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", argv)
    authors.main()


class Clock:
    """Time that goes on by a second each time that somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@full
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_run_is_made_once_and_stands_in_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    out = tmp_path / "authors.jsonl"
    options = ("--seeds", "1", "--epochs", "3", "--jobs", jobs)
    run(monkeypatch, folder, out, *options)
    results = authors.read_results(out)
    assert sorted((one.contender, one.start) for one in results) == sorted(RUNS)
    for result in results.values():
        assert len(result.test) == len(result.loss) == len(result.norm) == len(result.moved) == 3
        assert result.test[-1] > 30
        assert result.seconds > 0
    assert not (tmp_path / "authors.runs").exists()
    page = (tmp_path / "AUTHORS.md").read_text()
    assert all(page.count(f"| {title} |") >= 2 for title in authors_page.TITLES.values())
    assert "All runs are there" in capsys.readouterr().out
    run(monkeypatch, folder, out, *options)
    lines = out.read_text().splitlines()
    assert sum("run" in json.loads(line) for line in lines) == len(RUNS)


@full
@pytest.mark.parametrize(("contender", "start"), RUNS)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contender: str, start: str
) -> None:
    wanted = authors.Run(contender, start, 1, epochs=5)
    whole = authors.train(wanted, data, tmp_path, math.inf)
    assert whole is not None
    found, sittings = None, 0
    while found is None:
        monkeypatch.setattr(authors.time, "time", Clock())
        found = authors.train(wanted, data, tmp_path, deadline=4.0 + sittings)
        sittings += 1
        assert found is not None or (tmp_path / f"{wanted.name}.pt").exists()
    assert sittings > 2
    assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)


@full
def test_a_sitting_ends_after_its_minutes_and_the_next_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "authors.jsonl"
    options = ("--seeds", "1", "--epochs", "4", "--contenders", "SGD", "units", "--starts", "torch")
    monkeypatch.setattr(authors.time, "time", Clock())
    run(monkeypatch, folder, out, *options, "--minutes", "0.1")
    assert "2 of 2 runs are left: the same command goes on." in capsys.readouterr().out
    assert len(list((tmp_path / "authors.runs").iterdir())) == 1
    run(monkeypatch, folder, out, *options)
    assert len(authors.read_results(out)) == 2
    assert not (tmp_path / "authors.runs").exists()


def test_the_start_is_torchs_or_has_ones_at_the_skeleton(data: Data) -> None:
    def weights(start: str) -> list[torch.Tensor]:
        return [p.detach() for p in authors.Training(authors.Run("SGD", start, 3), *data)._net.parameters()]

    torch.manual_seed(3)
    expected = [nn.Linear(64, outputs, bias=False).weight.detach() for outputs in authors.SIZES[1:]]
    assert all(torch.equal(found, layer) for found, layer in zip(weights("torch"), expected, strict=True))
    for found, layer in zip(weights("skeleton"), expected, strict=True):
        unit = torch.arange(64)
        assert bool((found[unit % len(layer), unit] == 1).all())
        assert int((found != layer).sum()) == 64


def test_the_rate_falls_from_the_first_epoch_on(data: Data) -> None:
    training = authors.Training(authors.Run("units", "torch", 0, rate=0.2, decay=0.5), *data)
    for epoch in (1, 2):
        training.epoch()
        assert training._optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * math.exp(-0.5 * epoch))


def results(contender: str, start: str, ends: list[float]) -> list[authors.Result]:
    return [
        authors.Result(authors.Run(contender, start, seed), *[[end] * 300 for _ in range(5)], seconds=60.0)
        for seed, end in enumerate(ends)
    ]


def test_differences_are_taken_seed_by_seed() -> None:
    made = [*results("SGD", "torch", [97.0, 98.0]), *results("paper", "torch", [97.5, 98.5])]
    made += results("paper", "skeleton", [97.0, 98.5, 99.0])
    found = authors_page.groups({one.run: one for one in made})
    first, second = authors_page.difference_rows(found)
    paper = "EC-SGD (the paper's setting)"
    assert first == [f"{paper}, torch's", "SGD, torch's", "2", "0.50 ± 0.00"]
    assert second[:3] == [f"{paper}, skeleton of ones", f"{paper}, torch's", "2"]
    assert second[3].startswith("-0.25 ")


def written(made: list[authors.Result], path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, [{"torch": "2"}, *map(dataclasses.asdict, made)])))
    return path


def test_the_page_has_the_sections_for_which_there_are_runs(tmp_path: Path) -> None:
    def headings(made: list[authors.Result]) -> list[str]:
        page = authors_page.page(written(made, tmp_path / "authors.jsonl"))
        return [line for line in page.splitlines() if line.startswith("## ") or line.startswith("Differences")]

    late = [authors.Result(one, *[[90.0] * 30 for _ in range(5)], 60.0) for one in authors_page.LATE_RUNS]
    assert headings([]) == []
    assert headings(results("SGD", "torch", [97.0])) == ["## The authors' schedule"]
    both = [*results("SGD", "torch", [97.0]), *results("units", "torch", [98.0])]
    assert headings(both) == ["## The authors' schedule", "Differences, seed by seed:"]
    assert headings(late) == ["## Why the unit rule loses late what it gained"]
    assert headings(late[1:]) == ["## Other schedules"]
    assert len(headings([*both, *late])) == 3


@pytest.mark.parametrize(("contender", "start"), RUNS)
def test_an_epoch_without_steps_moves_nothing(data: Data, contender: str, start: str) -> None:
    """Neither do the balance and the rescaled skeleton at its beginning."""
    training = authors.Training(authors.Run(contender, start, 0, rate=1e-20), *data)
    training.epoch()
    assert training.result.moved[0] < 1e-5


def test_wrong_lines_and_missing_data_are_named(tmp_path: Path) -> None:
    path = tmp_path / "authors.jsonl"
    path.write_text('{"torch": "2"}\n{"run": {"contender": "SGD"}}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .* is no result of this benchmark"):
        authors.read_results(path)
    with pytest.raises(FileNotFoundError, match=r"There is no .*mnist\.npz\. Give --data"):
        authors.load(str(tmp_path))
