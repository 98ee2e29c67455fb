"""The report of the accuracy benchmark: its numbers, worked out by hand, and what it says of what is missing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks.small import GRID, written
from tests.selection import full

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import accuracy
import outcomes
import report
from grid import ACCURACY, LOSS, Contender, Grid
from outcomes import Difference, Factor, Interval, Outcome
from pages import between_markers
from training import Result, Run

UNITS = "EC-SGD (units)"

pytestmark = full


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return written(tmp_path / "grid.yaml", GRID.replace("  EC-SGD", "  AdamW: {base: adamw}\n  EC-SGD"))


def result(run: Run, score: float, curve: tuple[float, ...] = (1.0, 0.5), state: int = 8, test: float = 0.0) -> Result:
    return Result(run, score, test or score, 0.4, list(curve), 2.0, state)


def completed(grid: Grid, stop: int | None = None) -> dict[Run, Result]:
    """All runs of a grid, whose scores are best at a rate of 0.1 (of the plain forms: 0.032)."""
    found: dict[Run, Result] = {}
    while len(found) != stop and (run := next((run for run in accuracy.wanted(grid, found) if run not in found), None)):
        best = 0.1 if run.contender == UNITS else 0.032
        lost = math.log10(run.rate / best) ** 2 + 0.01 * run.seed + run.scale * (run.contender != UNITS)
        metric = grid.tasks[run.task].metric
        score = 90 - 10 * lost if metric is ACCURACY else 2 + 0.3 * lost
        found[run] = result(run, score, state=16 if run.contender == "AdamW" else 8)
    return found


def saved(found: dict[Run, Result], path: Path) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in [{"torch": "2"}, *map(dataclasses.asdict, found.values())]))
    return path


# Numbers


def test_intervals_and_verdicts_are_those_of_student_and_welch() -> None:
    interval = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half == pytest.approx(2.7764451 * math.sqrt(2.5) / math.sqrt(5))
    assert Interval.of([1.0]).text(2) == "1.00"
    ahead = Difference.of([5.0, 5.1, 5.2], [4.0, 4.1, 4.2], ACCURACY)
    assert ahead.verdict == "ahead"
    assert ahead.text().startswith("**+1.00** (p = ")
    assert Difference.of([4.0, 4.1, 4.2], [5.0, 5.1, 5.2], ACCURACY).text().startswith("*-1.00* (p = ")
    assert Difference.of([4.0, 5.0, 6.0], [4.1, 5.1, 6.1], ACCURACY).verdict == "level"
    assert Difference.of([4.0], [5.0], ACCURACY).text() == "-1.00 (one seed)"
    # A smaller loss is ahead.
    assert Difference.of([1.0, 1.01, 1.02], [1.5, 1.51, 1.52], LOSS).text().startswith("**+0.500**")


@pytest.mark.parametrize(("task", "of"), [("images", lambda x: x), ("text", lambda x: 4 - x / 50)])
def test_widths_are_interpolated_between_logarithms(task: str, of: object, grid: Grid) -> None:
    """One per cent of accuracy is as wide as 0.02 nats."""
    assert callable(of)
    scores = {0.001: 68.0, 0.01: 70.0, 0.1: 69.5, 1.0: 59.5, 0.0032: 68.5, 0.032: 69.5}
    results = {(run := Run(task, "SGD-M", rate, 0)): result(run, of(score)) for rate, score in scores.items()}
    outcome = Outcome(grid, results, task, "SGD-M")
    assert outcome.rates["best"] == 0.01
    # Down two thirds of the way from 0.01 to 0.0032, up a twentieth of a decade from 0.1.
    assert outcome.width().value == pytest.approx(0.1 * 10**0.05 / (0.01 * 0.32 ** (2 / 3)))
    assert outcome.width().mark == ""
    assert outcome.width_as_plain() is None


def scored(contender: str, scores: dict[float, float]) -> dict[Run, Result]:
    return {(run := Run("images", contender, rate, 0)): result(run, score) for rate, score in scores.items()}


def test_a_form_has_two_ranges(grid: Grid) -> None:
    """Rates at which it does as well as its own best, and rates at which it does as well as the plain form's."""
    grid = dataclasses.replace(grid, refine=False)
    plain = scored("SGD-M", {0.001: 42.0, 0.01: 48.0, 0.1: 47.5, 1.0: 10.0})
    form = scored(UNITS, {0.001: 51.0, 0.01: 55.0, 0.1: 57.0, 1.0: 27.0})
    outcome = Outcome(grid, plain | form, "images", UNITS)
    assert outcome.width().value == pytest.approx(10 ** (1 / 2 + 1 / 30))
    # Above 47: to a third of a decade from 0.1, and below to the end of the rates.
    assert outcome.width_as_plain() == (pytest.approx(100 * 10 ** (1 / 3)), ">")
    found = {"images": {"SGD-M": Outcome(grid, plain, "images", "SGD-M"), UNITS: outcome}}
    plain_width = 10 ** (1 + 1 / 6 + 0.5 / 37.5)
    expected = pytest.approx(100 * 10 ** (1 / 3) / plain_width)
    assert report.width_ratios(found, UNITS, "SGD-M", as_plain=True) == {"images": (expected, ">")}
    expected = pytest.approx(10 ** (1 / 2 + 1 / 30) / plain_width)
    assert report.width_ratios(found, UNITS, "SGD-M", as_plain=False) == {"images": (expected, "")}
    worse = Outcome(grid, plain | scored(UNITS, {0.001: 30.0, 0.01: 40.0, 0.1: 46.0, 1.0: 27.0}), "images", UNITS)
    assert worse.width_as_plain() == (1.0, "<")
    assert worse.width().mark == ""


def test_edges_beyond_the_rates_are_marked(grid: Grid) -> None:
    grid = dataclasses.replace(grid, refine=False)
    rising = scored("SGD-M", {0.001: 10.0, 0.01: 42.0, 0.1: 57.5, 1.0: 58.0})
    assert Outcome(grid, rising, "images", "SGD-M").width().mark == ">"
    flat = scored("SGD-M", {0.001: 58.0, 0.01: 57.8, 0.1: 57.5, 1.0: 10.0})
    assert Outcome(grid, flat, "images", "SGD-M").width().mark == ">"


def test_what_is_known_of_factors_is_known_of_their_ratio_and_mean() -> None:
    two, above, below, any_ = Factor(2.0), Factor(4.0, ">"), Factor(1.0, "<"), Factor(3.0, "~")
    assert two / two == (1.0, "")
    assert above / two == (2.0, ">")
    assert two / above == (0.5, "<")
    assert above / above == (1.0, "~")
    assert below / above == (0.25, "<")
    assert any_ / two == (1.5, "~")
    assert Factor.mean([two, Factor(8.0)]) == (pytest.approx(4.0), "")
    assert Factor.mean([two, Factor(8.0, ">"), above]) == (pytest.approx(4.0), ">")
    assert Factor.mean([above, below]) == (pytest.approx(2.0), "~")
    assert (two.text(1), above.text(2)) == ("2.0", "> 4.00")


def test_steps_are_counted_to_the_loss_that_another_has_at_its_end(grid: Grid) -> None:
    results = completed(grid)
    curves = [(1.0, 0.7, 0.5, 0.3), (1.0, 0.4, 0.3, 0.2)]
    for seed, curve in enumerate(curves):
        run = Run("images", "SGD-M", 0.032, seed)
        results[run] = dataclasses.replace(results[run], curve=list(curve))
    outcome = Outcome(grid, results, "images", "SGD-M")
    assert outcome.steps_to(0.4) == (100 + 50) / 2
    assert math.isinf(outcome.steps_to(0.01))
    # A run that was given up half-way had half of the steps.
    results[run] = dataclasses.replace(results[run], curve=[1.0, 0.4])
    assert Outcome(grid, results, "images", "SGD-M").steps_to(0.4) == (100 + 50) / 2


def test_the_single_rate_for_all_tasks_loses_least_where_it_loses_most(grid: Grid) -> None:
    results = {}
    for task, scores in (("images", {0.01: 80.0, 0.1: 90.0, 1.0: 85.0}), ("text", {0.01: 2.0, 0.1: 2.3, 1.0: 2.1})):
        for rate, score in scores.items():
            run = Run(task, "SGD-M", rate, 0)
            results[run] = result(run, score)
    found = {task: {"SGD-M": Outcome(grid, results, task, "SGD-M")} for task in grid.tasks}
    # In units of what counts as close 0.01 loses 10 and 0, 0.1 loses 0 and 15, 1.0 loses 5 and 5.
    rate, lost = outcomes.one_rate(grid, found, "SGD-M")
    assert rate == 1.0
    assert lost == pytest.approx({"images": -5.0, "text": -0.1})


# What is written


def test_a_complete_report_has_all_comparisons(grid: Grid, tmp_path: Path) -> None:
    report.write_report(grid, saved(completed(grid), tmp_path / "results.jsonl"), tmp_path, "FOUND")
    text = (tmp_path / "FOUND.md").read_text()
    assert "Missing" not in text
    headings = (
        "plain form's best rate",
        "own best rate",
        "One rate",
        "plain form's best \\(",
        "own best \\(",
        "start changes",
    )
    for heading in headings:
        assert re.search(rf"^### .*{heading}", text, re.MULTILINE), heading
    # At 0.032 EC loses a quarter of 10 points, and 0.075 nats; at its own best rate it is level.
    row = next(line for line in text.splitlines() if line.startswith(f"| {UNITS} against SGD-M"))
    lost = math.log10(0.32) ** 2
    cells = [re.sub(r"p = [^)]*", "p", cell.strip()) for cell in row.split("|")]
    assert cells[2:4] == [f"*{-10 * lost:.2f}* (p)", f"*{-0.3 * lost:.3f}* (p)"]
    assert cells[4] == "0 ahead, 2 behind of 2 (by Holm 0 and 2)"
    assert cells[5] == f"{-0.3 * lost:.3f} nats (text)"  # which is as much as 1.5 times what the images lose
    line = next(line for line in text.splitlines() if line.startswith(f"| {UNITS} | 0.1 | 89.95"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4].endswith("(rate 0.032)")
    assert cells[5].endswith("(rate 0.3)")
    assert cells[6].startswith("89.95")
    assert cells[7:11] == ["factor 2.5", "factor 2.5", "2.0", "0.50"]


def test_tables_need_no_figure(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(completed(grid), tmp_path / "results.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = [str(path), "--out", str(tmp_path), "--grid", str(tmp_path / "grid.yaml"), "--no-figure"]
    monkeypatch.setattr(sys, "argv", ["report.py", *options])
    report.main()
    assert "SGD-M" in (tmp_path / "RESULTS.md").read_text()
    assert not (tmp_path / "RESULTS.png").exists()


@pytest.mark.parametrize("stop", [3, 9, 14, 25])
def test_a_part_of_the_runs_is_reported_with_what_is_missing(stop: int, grid: Grid, tmp_path: Path) -> None:
    path = saved(completed(grid, stop), tmp_path / "results.jsonl")
    if stop == 3:
        with pytest.raises(ValueError, match="no complete search"):
            report.write_report(grid, path, tmp_path, "FOUND")
        return
    report.write_report(grid, path, tmp_path, "FOUND")
    text = (tmp_path / "FOUND.md").read_text()
    assert "Missing: " in text
    assert any(word in text for word in ("not run", "search is not over", "seeds: "))
    assert (tmp_path / "FOUND.png").exists()
    report.readme_lines(grid, accuracy.read_results(path))


def test_seeds_that_are_missing_are_counted(grid: Grid) -> None:
    results = completed(grid)
    assert Outcome(grid, results, "images", UNITS).missing() == ""
    del results[Run("images", UNITS, 0.1, 1, 1.0)]
    del results[Run("images", UNITS, 0.3, 0)], results[Run("images", UNITS, 0.3, 1)]
    assert Outcome(grid, results, "images", UNITS).missing() == "seeds: default 0 of 2, rescaled 1 of 2"
    late = dataclasses.replace(grid, contenders={**grid.contenders, "late": Contender("adamw")})
    assert Outcome(late, results, "images", "late").missing() == "not run"


def test_the_readme_gets_its_table_between_two_markers(grid: Grid, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Before\n\n<!-- accuracy -->\nstale\n<!-- /accuracy -->\n\nBehind\n")
    lines = report.readme_lines(grid, completed(grid))
    text = between_markers(readme, "accuracy", lines)
    assert text.startswith("Before\n\n<!-- accuracy -->\n\n| task | SGD-M | EC-SGD (units), same rate |")
    assert text.endswith("<!-- /accuracy -->\n\nBehind\n")
    assert "stale" not in text
    assert "| images, % | 90.0 | *87.5* | 90.0 | *87.7* |" in text
    assert "on how many tasks: at the rate of SGD-M 0 ahead, 2 behind of 2 (by Holm 0 and 2), at" in text
    assert re.search(r"as well as its own best \(within 1 % or 0.02 nats\) is [\d.]+ times", text)


@pytest.mark.parametrize(
    ("values", "passed"), [((0.04, 0.01, 0.02), 3), ((0.04, 0.01, 0.03), 1), ((0.02, 0.03), 2), ((), 0)]
)
def test_many_comparisons_need_a_smaller_p(values: tuple[float, ...], passed: int) -> None:
    found = outcomes.holm([Difference(1.0, p, ACCURACY) for p in (math.nan, *values)])
    assert [one.p for one in found] == sorted(values)[:passed]
