"""Tables and a figure from the results of ``accuracy.py``::

    python examples/benchmarks/report.py results.jsonl --out examples/benchmarks --readme README.md

writes ``RESULTS.md`` and ``RESULTS.png`` of whatever has been run so far, and the table between the two markers
``<!-- accuracy -->`` and ``<!-- /accuracy -->`` of the README.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from accuracy import Results, read_results
from figure import plot
from grid import ACCURACY, LOSS, Grid, Metric, add_grid_options, chosen_grid
from outcomes import MARKS, SIGNIFICANT, Difference, Factor, Interval, Outcome, holm, one_rate, outcomes_of
from pages import between_markers, in_words, read_conditions, table

REFERENCE = "AdamW"  # whose state and final training loss others are compared with
OTHERS = (  # beside each form and its plain form
    ("EC-SGD (units)", "AdamW"),
    ("EC-SGD (units)", "Adam-mini"),
    ("EC-SGD (units)", "EC-SGD (paths)"),
    ("EC-SGD (units)", "SGD-M + GC"),
    ("EC-AdamW (units)", "AdamW + GC"),
    ("EC-SGD (units) + clip", "SGD-M + clip"),
    ("EC-SGD (units)", "SGD-M + clip"),
    ("EC-SGD (units) + clip", "AdamW + clip"),
    ("EC-AdamW (units)", "AdamW + clip"),
)
PLAIN = ("SGD-M", "AdamW")
CLASS_OR_STEP = (
    ("EC-SGD (units)", "EC-SGD (units, current)"),
    ("EC-AdamW (units)", "EC-AdamW (units, current)"),
    ("EC-SGD (units)", "LARS"),
    ("EC-SGD (units)", "Nero"),
    ("EC-AdamW (units)", "LAMB"),
)
README_FORMS = ("EC-SGD (units)", "EC-AdamW (units)")
WITHIN = f"within {ACCURACY.close:g} {ACCURACY.unit} or {LOSS.close:g} {LOSS.unit}"  # what counts as equally good
COMPARISONS = f"""\
Differences of test scores, in per cent or nats, positive if the first is better; **significantly ahead** and \
*significantly behind* by Welch's test (p < {SIGNIFICANT:g}), *by Holm* with all tasks of a row taken together; \
*worst* is the least of a row ({ACCURACY.close:g} {ACCURACY.unit} counts as much as {LOSS.close:g} {LOSS.unit}); \
empty: not run. All SGD has momentum 0.9; GC is gradient centralization, *clip* clips the gradient's norm to 1, \
*current* is the rule without balancing."""

Found = Mapping[str, Mapping[str, Outcome]]  # by task and contender
Tests = Callable[[Outcome], list[float]]


# One task ------------------------------------------------------------------------------------------------------------


def task_table(outcomes: Mapping[str, Outcome], metric: Metric) -> list[str]:
    """The contenders of one task whose best rate is known."""
    header = [
        "contender",
        "best rate",
        f"test {metric.name}, {metric.unit}",
        "at the plain form's best rate",
        "at one rate for all",
        "from a rescaled start",
        f"rates within {metric.close:g} {metric.unit} of its own best",
        "rates as good as the plain form's best",
        "seconds",
        f"state / {REFERENCE}'s",
        f"steps to {REFERENCE}'s training loss",
    ]
    reference = outcomes.get(REFERENCE)
    return table(header, [_task_row(name, o, reference) for name, o in outcomes.items() if o.runs()])


def _task_row(name: str, outcome: Outcome, reference: Outcome | None) -> list[str]:
    digits = outcome.metric.digits

    def cell(kind: str, rescaled: bool = False, with_rate: bool = True) -> str:
        tests = outcome.tests(kind, rescaled)
        rate = f" (rate {outcome.rates[kind]:g})" if tests and with_rate else ""
        return Interval.of(tests).text(digits) + rate if tests else ""

    state = steps = ""
    if reference is not None and reference.runs():
        state = f"{outcome.mean('state_bytes') / reference.mean('state_bytes'):.2f}"
        share = outcome.steps_to(reference.mean("loss"))
        steps = "not reached" if math.isinf(share) else f"{share:.0f} %"
    return [
        name,
        f"{outcome.rates['best']:g}",
        cell("best", with_rate=False),
        cell("plain"),
        cell("default"),
        cell("best", rescaled=True, with_rate=False),
        f"factor {outcome.width().text(1)}",
        _width_as_plain(outcome),
        f"{outcome.mean('seconds'):.1f}",
        state,
        steps,
    ]


def _width_as_plain(outcome: Outcome) -> str:
    width = outcome.width_as_plain()
    if width is None:
        return ""
    return "none" if width.mark == "<" else f"factor {width.text(1)}"


def rate_table(outcomes: Mapping[str, Outcome], metric: Metric) -> list[str]:
    """Mean validation score at every rate."""
    shown = {name: outcome for name, outcome in outcomes.items() if outcome.by_rate}
    rates = sorted({rate for outcome in shown.values() for rate in outcome.by_rate})
    rows = []
    for name, outcome in shown.items():
        best = outcome.rates.get("best")
        cells = [metric.text(outcome.by_rate[rate]) if rate in outcome.by_rate else "" for rate in rates]
        rows.append([name, *(f"**{text}**" if rate == best else text for rate, text in zip(rates, cells, strict=True))])
    return table(["contender", *(f"{rate:g}" for rate in rates)], rows)


# Comparisons ---------------------------------------------------------------------------------------------------------


def difference(
    outcomes: Mapping[str, Outcome], first: str, second: str, of: Tests, of_second: Tests
) -> Difference | None:
    """``None`` if one of the two was not run."""
    if first not in outcomes or second not in outcomes:
        return None
    tests = of(outcomes[first]), of_second(outcomes[second])
    return Difference.of(*tests, outcomes[first].metric) if all(tests) else None


def comparison_rows(found: Found, pairs: Iterable[tuple[str, str]], of: Tests, of_second: Tests) -> list[list[str]]:
    """A row for each pair that has been run on some task: the differences, on how many it is ahead, and the worst."""
    rows = []
    for first, second in pairs:
        differences = {task: difference(outcomes, first, second, of, of_second) for task, outcomes in found.items()}
        known = {task: one for task, one in differences.items() if one is not None}
        if known:
            verdicts = [one.verdict for one in known.values()]
            judged = len(verdicts) - verdicts.count("unknown")
            task, worst = min(known.items(), key=lambda item: item[1].gain / item[1].metric.close)
            name = first if first == second else f"{first} against {second}"
            cells = ["" if one is None else one.text() for one in differences.values()]
            summary = f"{verdicts.count('ahead')} ahead, {verdicts.count('behind')} behind of {judged}"
            sure = [one.verdict for one in holm(list(known.values()))]
            if judged > 1:
                summary += f" (by Holm {sure.count('ahead')} and {sure.count('behind')})"
            rows.append([name, *cells, summary, f"{worst.gain:+.{worst.metric.digits}f} {worst.metric.unit} ({task})"])
    return rows


def best(outcome: Outcome) -> list[float]:
    """Test scores at its own best rate."""
    return outcome.tests()


def rescaled(outcome: Outcome) -> list[float]:
    """Test scores from the rescaled start."""
    return outcome.tests(rescaled=True)


def forms(grid: Grid) -> list[tuple[str, str]]:
    """Contenders and what they are forms of."""
    return [(name, contender.plain) for name, contender in grid.contenders.items() if contender.plain is not None]


def comparisons(grid: Grid, found: Found) -> list[str]:
    """All comparisons, each a table under its heading."""
    others = [*forms(grid), *OTHERS]
    parts = [
        ("At the plain form's best rate", forms(grid), lambda outcome: outcome.tests("plain"), best),
        ("Each at its own best rate", others, best, best),
        ("One rate for all tasks against the tuned plain form", forms(grid), lambda o: o.tests("default"), best),
        ("Is it the class or the step? From the ordinary start", CLASS_OR_STEP, best, best),
        ("Is it the class or the step? From the rescaled start", CLASS_OR_STEP, rescaled, rescaled),
        ("What the rescaled start changes", [(n, n) for n, c in grid.contenders.items() if c.rescaled], rescaled, best),
    ]
    lines = []
    for title, pairs, of, of_second in parts:
        rows = comparison_rows(found, pairs, of, of_second)
        if rows:
            lines += [f"### {title}", "", *table(["", *found, "significant", "worst"], rows)]
    return lines + width_lines(grid, found) + one_rate_lines(grid, found)


def width_ratios(found: Found, first: str, second: str, as_plain: bool) -> dict[str, Factor]:
    """Ratio of the range of good rates of a form to that of its plain form, by task.

    Args:
        found: all outcomes.
        first: the form.
        second: its plain form.
        as_plain: whether the form's good rates are those at which it does as well as the plain form's best, and not
            those at which it does as well as its own.
    """
    ratios = {}
    for task, outcomes in found.items():
        if all(name in outcomes and "best" in outcomes[name].rates for name in (first, second)):
            width = outcomes[first].width_as_plain() if as_plain else outcomes[first].width()
            assert width is not None
            ratios[task] = width / outcomes[second].width()
    return ratios


def width_lines(grid: Grid, found: Found) -> list[str]:
    """How much wider the range of good rates is than the plain form's, for both meanings of good."""
    lines = []
    for whose, as_plain in (("the plain form's best", True), ("each one's own best", False)):
        rows = []
        for first, second in forms(grid):
            ratios = width_ratios(found, first, second, as_plain)
            if ratios:
                cells = [ratios[task].text(2) if task in ratios else "" for task in found]
                rows.append([f"{first} / {second}", *cells, Factor.mean(list(ratios.values())).text(2)])
        if rows:
            title = f"### Ratio of the ranges of rates that do as well as {whose} ({WITHIN})"
            lines += [title, "", *table(["", *found, "geometric mean"], rows)]
    return lines


def one_rate_lines(grid: Grid, found: Found) -> list[str]:
    """What each contender loses by one rate for all tasks, chosen afterwards."""
    rows = []
    for name in grid.contenders:
        mine = [outcomes[name] for outcomes in found.values() if name in outcomes]
        if len(mine) == len(found) and all("best" in outcome.rates for outcome in mine):
            rate, lost = one_rate(grid, found, name)
            if lost:
                cells = [f"{lost[task]:.{outcomes[name].metric.digits}f}" for task, outcomes in found.items()]
                rows.append([name, f"{rate:g}", *cells])
    title = "### What the best single rate for all tasks loses against the best of each, on validation data"
    return [title, "", *table(["", "rate", *found], rows)] if rows else []


# The README ----------------------------------------------------------------------------------------------------------


def readme_lines(grid: Grid, results: Results) -> list[str]:
    """What stands between the markers of the README: a table of one line a task, and how often who is ahead."""
    found = outcomes_of(grid, results)
    shown = [(form, plain) for form, plain in forms(grid) if form in README_FORMS]
    header = ["task"]
    for form, plain in shown:
        rate = grid.contenders[form].default_rate
        header += [plain, f"{form}, same rate", "own best rate"] + ([f"always {rate:g}"] if rate is not None else [])
    rows = []
    for task, outcomes in found.items():
        cells = [cell for form, plain in shown for cell in _readme_cells(grid, outcomes, form, plain)]
        if any(cells):
            rows.append([f"{task}, {grid.tasks[task].metric.unit}", *cells])
    legend = (
        f"Test scores, means of {grid.seeds} seeds. *Same rate*: at the plain form's best. **Bold**: significantly "
        f"ahead of the plain form at its best rate, *italic*: behind (Welch's test, p < {SIGNIFICANT:g})."
    )
    sentences = [line for form, plain in shown for line in _readme_sentence(found, form, plain)]
    return [*table(header, rows), legend, "", *sentences]


def _readme_cells(grid: Grid, outcomes: Mapping[str, Outcome], form: str, plain: str) -> list[str]:
    kinds = ["plain", "best"] + (["default"] if grid.contenders[form].default_rate is not None else [])
    tuned = outcomes[plain].tests() if plain in outcomes else []
    if len(tuned) < grid.seeds:  # what runs are missing, RESULTS.md says
        return [""] * (1 + len(kinds))
    metric = next(iter(outcomes.values())).metric
    digits = metric.digits - (metric is not LOSS)
    cells = [f"{Interval.of(tuned).mean:.{digits}f}"]
    for kind in kinds:
        tests = outcomes[form].tests(kind) if form in outcomes else []
        if len(tests) < grid.seeds:
            cells.append("")
            continue
        mark = MARKS[Difference.of(tests, tuned, metric).verdict]
        cells.append(f"{mark}{Interval.of(tests).mean:.{digits}f}{mark}")
    return cells


def _readme_sentence(found: Found, form: str, plain: str) -> list[str]:
    parts = []
    kinds: dict[str, Tests] = {f"at the rate of {plain}": lambda o: o.tests("plain"), "at its own best rate": best}
    for title, of in kinds.items():
        rows = comparison_rows(found, [(form, plain)], of, best)
        parts += [f"{title} {count}" for *_, count, _ in rows if " of 0" not in count]
    ratios = [list(width_ratios(found, form, plain, as_plain).values()) for as_plain in (False, True)]
    if not parts or not all(ratios):
        return []
    own, as_plain = (Factor.mean(each).text(1) for each in ratios)
    width = (
        f"the range of rates that do as well as its own best ({WITHIN}) is {own} times as wide as {plain}'s, that of "
        f"rates that do as well as {plain}'s best {as_plain} times (geometric means)"
    )
    return [f"{form} against {plain}, on how many tasks: {', '.join(parts)}; {width}.", ""]


# The whole -----------------------------------------------------------------------------------------------------------


def introduction(grid: Grid, results: Results, conditions: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was run, and how to read the tables."""
    hours = sum(result.seconds for result in results.values()) / 3600
    return [
        "Written by `report.py` from the lines of JSON that `accuracy.py` wrote; their docstrings say how.",
        "",
        f"{len(results)} runs, {grid.seeds} seeds ({grid.search_seeds} of them to choose the rate), {hours:.1f} hours "
        f"of one process; {'; '.join(map(in_words, conditions))}.",
        "",
        "± is half of a 95 % interval (Student's t over the seeds). *Rates within* is the largest over the smallest "
        "rate whose validation score is so close to the contender's own best, *rates as good* that of rates so close "
        "to the plain form's best, or better. `>` says that the true factor or ratio is larger, as an edge of a range "
        "lies beyond the rates that were tried, `<` that it is smaller, `~` that it may be either; a form that is "
        "nowhere as good has a factor below 1. *State* is the memory of the optimizer's state, *steps to* the share of "
        f"the steps after which the running training loss is down where {REFERENCE}'s ends (median). The rescaled "
        "start has every hidden unit multiplied by exp(N(0, 1)).",
        "",
    ]


def page(name: str, grid: Grid, results: Results, found: Found, conditions: Sequence[Mapping[str, Any]]) -> str:
    """``name.md``: what was found under these conditions, and what is missing."""
    lines = [f"# {name.capitalize()} of the accuracy benchmark", "", *introduction(grid, results, conditions)]
    compared = comparisons(grid, found)
    if compared:
        lines += ["## Comparisons", "", COMPARISONS, "", *compared]
    for task, outcomes in found.items():
        metric = grid.tasks[task].metric
        missing = [f"{contender} ({gap})" for contender, o in outcomes.items() if (gap := o.missing())]
        lines += [f"## {task}", "", *task_table(outcomes, metric)]
        lines += [f"Missing: {'; '.join(missing)}.", ""] if missing else []
        lines += [f"Validation {metric.name} by learning rate, {metric.unit}:", "", *rate_table(outcomes, metric)]
    return "\n".join(lines)


def write_report(grid: Grid, results_path: Path, folder: Path, name: str, with_figure: bool = True) -> None:
    """Write ``name.md`` and, if it is asked for, ``name.png`` of what has been run, and say what is missing.

    Raises:
        ValueError: if nothing has, or the file is not one of this benchmark's.
    """
    results = read_results(results_path)
    found = outcomes_of(grid, results)
    if not any(outcome.runs() for outcomes in found.values() for outcome in outcomes.values()):
        raise ValueError(f"{results_path} holds no complete search of this grid: run the missing ones first.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page(name, grid, results, found, read_conditions(results_path)))
    if with_figure:
        plot(found, folder / f"{name}.png")
    print(f"Wrote {folder / name}.md" + (f" and {name}.png" if with_figure else ""))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    parser.add_argument("--name", default="RESULTS", help="name of the two files")
    parser.add_argument("--readme", type=Path, help="file with the two markers, to fill in the table")
    parser.add_argument("--no-figure", action="store_true", help="write the tables alone, which needs no matplotlib")
    add_grid_options(parser)
    arguments = parser.parse_args()
    try:
        grid = chosen_grid(arguments)
        write_report(grid, arguments.results, arguments.out, arguments.name, not arguments.no_figure)
        if arguments.readme is not None:
            lines = readme_lines(grid, read_results(arguments.results))
            arguments.readme.write_text(between_markers(arguments.readme, "accuracy", lines))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
