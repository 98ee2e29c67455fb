"""Tables and a figure from the results of ``accuracy.py``::

    python examples/benchmarks/report.py results.jsonl --out FOLDER --name RESULTS

writes ``RESULTS.md`` and ``RESULTS.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))

from accuracy import (
    Grid,
    Result,
    Run,
    add_grid_options,
    best_rate,
    chosen_grid,
    read_results,
    search,
)

CLOSE = 1.0  # per cent of accuracy that count as level with the best rate
SIGNIFICANT = 0.05
COMPARISONS = (
    ("EC-SGD, path", "SGD"),
    ("EC-SGD-M, path", "SGD-M"),
    ("EC-AdamW, path", "AdamW"),
    ("EC-SGD, unit", "SGD"),
    ("EC-SGD-M, unit", "SGD-M"),
    ("EC-SGD-M, unit", "SGD-M + GC"),
    ("EC-AdamW, unit", "AdamW"),
    ("EC-AdamW, unit", "AdamW + GC"),
)
SHOWN = ("SGD-M", "AdamW", "EC-SGD-M, path", "EC-SGD-M, unit", "EC-AdamW, unit")


class Interval(NamedTuple):
    """A mean and half of its 95 % interval, by Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0], math.nan)
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), float(half))

    def text(self, digits: int = 2) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{half}"


class Outcome:
    """What one contender reached on one task, or nothing yet."""

    def __init__(self, grid: Grid, results: Mapping[Run, Result], task: str, contender: str) -> None:
        runs = [r for r in results.values() if (r.run.task, r.run.contender) == (task, contender)]
        plain = [r for r in runs if not r.run.scale]
        self.by_rate, missing = search(grid, task, contender, results)
        self.complete = not missing
        if self.complete:
            self.rate = best_rate(self.by_rate)
            self.final = sorted((r for r in plain if r.run.rate == self.rate), key=lambda r: r.run.seed)
            self.rescaled = [r for r in runs if r.run.scale and r.run.rate == self.rate]
            self.complete = len(self.final) == grid.seeds

    @property
    def tests(self) -> list[float]:
        return [result.test for result in self.final]

    def width(self) -> float:
        """Largest over smallest rate within ``CLOSE`` of the best, by interpolation between the logarithms of rates."""
        points = [(math.log(rate), accuracy) for rate, accuracy in sorted(self.by_rate.items())]
        level = max(accuracy for _, accuracy in points) - CLOSE
        top = max(range(len(points)), key=lambda k: points[k][1])

        def edge(direction: int) -> float:
            k = top
            while 0 <= k + direction < len(points) and points[k + direction][1] >= level:
                k += direction
            if not 0 <= k + direction < len(points):
                return points[k][0]
            (inside, high), (outside, low) = points[k], points[k + direction]
            return inside + (outside - inside) * (high - level) / (high - low)

        return math.exp(edge(1) - edge(-1))

    def steps_to(self, target: float) -> float:
        """Share of the steps, in per cent, after which the running training accuracy reached the target."""
        shares = []
        for result in self.final:
            first = next((k + 1 for k, value in enumerate(result.curve) if value >= target), math.inf)
            shares.append(100 * first / len(result.curve))
        return statistics.median(shares)


def compare(first: Sequence[float], second: Sequence[float]) -> str:
    """Whether the first is ahead, behind or level, by Welch's test."""
    if len(first) < 2 or len(second) < 2:
        return "one seed"
    p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
    difference = statistics.mean(first) - statistics.mean(second)
    verdict = "level" if not p < SIGNIFICANT else ("ahead" if difference > 0 else "behind")
    return f"{verdict} ({difference:+.2f}, p = {p:.2g})"


def task_table(outcomes: Mapping[str, Outcome], target: float) -> list[str]:
    """The contenders of one task at their best rates."""
    lines = [
        "| contender | best rate | test accuracy, % | training loss | from a rescaled start, % "
        f"| rates within {CLOSE:g} % | steps to {target:g} % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        rescaled = Interval.of([r.test for r in outcome.rescaled]).text() if outcome.rescaled else ""
        steps = outcome.steps_to(target)
        lines.append(
            f"| {name} | {outcome.rate:g} | {Interval.of(outcome.tests).text()} "
            f"| {Interval.of([r.loss for r in outcome.final]).text(3)} | {rescaled} | factor {outcome.width():.1f} "
            f"| {'not reached' if math.isinf(steps) else f'{steps:.0f} %'} |"
        )
    return lines


def rate_table(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Mean validation accuracy at every rate."""
    rates = sorted({rate for outcome in outcomes.values() for rate in outcome.by_rate})
    lines = ["| contender | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for name, outcome in outcomes.items():
        best = max(outcome.by_rate.values())
        values = [outcome.by_rate.get(rate) for rate in rates]
        cells = ["" if v is None else f"**{v:.1f}**" if v == best else f"{v:.1f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def comparison_table(all_outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Every equivalent-class form against what it is the form of."""
    lines = ["| | " + " | ".join(all_outcomes) + " |", "|---|" + "---|" * len(all_outcomes)]
    for first, second in COMPARISONS:
        cells = [
            compare(outcomes[first].tests, outcomes[second].tests) if first in outcomes and second in outcomes else ""
            for outcomes in all_outcomes.values()
        ]
        if any(cells):
            lines.append(f"| {first} against {second} | " + " | ".join(cells) + " |")
    return lines


def plot(all_outcomes: Mapping[str, Mapping[str, Outcome]], path: Path) -> None:
    """Validation accuracy over the learning rate, one panel for each task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(all_outcomes))
    rows = math.ceil(len(all_outcomes) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axis, (task, outcomes) in zip(axes.flat, all_outcomes.items(), strict=False):
        names = SHOWN if set(SHOWN) & set(outcomes) else tuple(outcomes)
        for number, name in enumerate(names):
            if name in outcomes:
                rates = outcomes[name].by_rate
                style = "o--" if "EC" not in name else "o-"
                axis.semilogx(list(rates), list(rates.values()), style, color=f"C{number}", label=name, markersize=3)
        best = max(max(outcome.by_rate.values()) for outcome in outcomes.values())
        axis.set(title=task, ylim=(best - 15, best + 1))
    for axis in list(axes.flat)[len(all_outcomes) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supxlabel("learning rate")
    figure.supylabel("validation accuracy, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(grid: Grid, results_path: Path, folder: Path, name: str) -> None:
    """Write ``name.md`` and ``name.png`` of what is complete.

    Raises:
        ValueError: if nothing is, or the file is not one of this benchmark's.
    """
    results = read_results(results_path)
    found = {task: {name: Outcome(grid, results, task, name) for name in grid.of(task)} for task in grid.tasks}
    complete = {
        task: {name: outcome for name, outcome in outcomes.items() if outcome.complete}
        for task, outcomes in found.items()
    }
    complete = {task: outcomes for task, outcomes in complete.items() if outcomes}
    if not complete:
        raise ValueError(f"{results_path} holds no complete contender of this grid: run the missing ones first.")
    conditions = {
        line for line in results_path.read_text().splitlines() if line.strip() and "run" not in json.loads(line)
    }
    lines = [
        f"# {name.capitalize()} of the accuracy benchmark",
        "",
        "Written by `report.py` from the lines of JSON that `accuracy.py` wrote; their docstrings say how.",
        "",
        f"{len(results)} runs, {grid.seeds} seeds ({grid.search_seeds} of them to choose the rate), "
        f"{sum(result.seconds for result in results.values()) / 3600:.1f} hours of one process; "
        + "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(line).items()) for line in sorted(conditions))
        + ".",
        "",
        "± is half of a 95 % interval (Student's t over the seeds). *Rates within* is the largest over the smallest "
        f"rate within {CLOSE:g} % of the best validation accuracy, *steps to* the share of the steps after which the "
        "running training accuracy reached the number (median).",
        "",
    ]
    if any(pair[0] in outcomes and pair[1] in outcomes for pair in COMPARISONS for outcomes in complete.values()):
        lines += [
            f"Differences of test accuracy, in per cent; level means p >= {SIGNIFICANT:g} in Welch's test:",
            "",
            *comparison_table(complete),
            "",
        ]
    for task, outcomes in complete.items():
        missing = [name for name, outcome in found[task].items() if not outcome.complete]
        lines += [f"## {task}", "", *task_table(outcomes, grid.tasks[task].target), ""]
        if missing:
            lines += [f"Not run: {', '.join(missing)}.", ""]
        lines += [
            "Validation accuracy by learning rate (empty: not tried):",
            "",
            *rate_table(outcomes),
            "",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines))
    plot(complete, folder / f"{name}.png")
    print(f"Wrote {folder / name}.md and {name}.png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    parser.add_argument("--name", default="RESULTS", help="name of the two files")
    add_grid_options(parser)
    arguments = parser.parse_args()
    try:
        write_report(chosen_grid(arguments), arguments.results, arguments.out, arguments.name)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
