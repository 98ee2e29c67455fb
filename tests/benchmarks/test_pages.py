"""What the benchmarks share, and that the committed pages say what the committed lines of JSON give."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import authors_page  # noqa: E402
import outcomes  # noqa: E402
import pages  # noqa: E402
import report  # noqa: E402
import step_tables  # noqa: E402
from grid import Grid  # noqa: E402

# What is committed


@pytest.mark.parametrize(("name", "grid"), [("RESULTS", "default"), ("SETTINGS", "settings")])
def test_the_pages_of_the_accuracy_benchmark_are_those_of_its_results(name: str, grid: str) -> None:
    path, read = BENCHMARKS / f"{name.lower()}.jsonl", Grid.read(BENCHMARKS / f"{grid}.yaml")
    results = accuracy.read_results(path)
    text = report.page(name, read, results, outcomes.outcomes_of(read, results), pages.read_conditions(path))
    assert (BENCHMARKS / f"{name}.md").read_text() == text


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    results = accuracy.read_results(BENCHMARKS / "results.jsonl")
    lines = report.readme_lines(Grid.read(BENCHMARKS / "default.yaml"), results)
    assert pages.between_markers(ROOT / "README.md", "accuracy", lines) == (ROOT / "README.md").read_text()


def test_the_page_of_the_authors_experiment_is_that_of_its_results() -> None:
    assert (BENCHMARKS / "AUTHORS.md").read_text() == authors_page.page(BENCHMARKS / "authors.jsonl")


def test_the_pages_that_tell_of_steps_are_those_of_the_measurements(tmp_path: Path) -> None:
    pages_of = {name: tmp_path / Path(name).name for name in ("README.md", "docs/speed.md")}
    for name, copied in pages_of.items():
        copied.write_text((ROOT / name).read_text())
    step_tables.write_report(BENCHMARKS / "step_overhead.jsonl", tmp_path, *pages_of.values())
    for name, copied in pages_of.items():
        assert copied.read_text() == (ROOT / name).read_text()
    assert (tmp_path / "STEP_OVERHEAD.md").read_text() == (BENCHMARKS / "STEP_OVERHEAD.md").read_text()
    step_tables.write_report(BENCHMARKS / "epyc" / "step_overhead.jsonl", tmp_path)
    assert (tmp_path / "STEP_OVERHEAD.md").read_text() == (BENCHMARKS / "epyc" / "STEP_OVERHEAD.md").read_text()


def test_the_figures_that_the_page_about_speed_names_are_measured() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    table, reading = page.split("<!-- /step overhead -->")
    reading = re.sub(r"target: [\d.]+", "", reading.partition("## How to read it")[2].partition("\n## ")[0])
    named = set(re.findall(r"\d+\.\d+", reading))
    texts = [
        table,
        *(path.read_text() for path in (BENCHMARKS / "STEP_OVERHEAD.md", BENCHMARKS / "epyc/STEP_OVERHEAD.md")),
    ]
    measured = set(re.findall(r"\d+\.\d+", "".join(texts)))
    assert len(named) > 20
    assert named <= measured


# What is shared


@dataclass(frozen=True)
class Result:
    run: str
    score: float


def test_of_two_lines_of_a_run_the_later_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert pages.read_results(path, "run", Result) == {}
    found = [
        {"torch": "2"},
        {"run": "a", "score": 1},
        {"run": "b", "score": 2},
        {"torch": "2"},
        {"run": "a", "score": 3},
    ]
    path.write_text("\n".join(map(json.dumps, [*found, {"torch": "3"}])) + "\n")
    assert pages.read_results(path, "run", Result) == {"a": Result("a", 3), "b": Result("b", 2)}
    assert pages.read_conditions(path) == [{"torch": "2"}, {"torch": "3"}]


@pytest.mark.parametrize("line", ["nonsense", '{"run": "a"}', '{"run": "a", "score": 1, "rate": 2}', "3"])
def test_a_line_of_something_else_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"torch": "2"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*results\.jsonl is no result of this benchmark"):
        pages.read_results(path, "run", Result)


def test_a_table_is_one_of_markdown() -> None:
    assert pages.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |", ""]


def test_lines_between_markers_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Before\n\n<!-- x -->\nold\n<!-- /x -->\n\n<!-- y -->\nkept\n<!-- /y -->\n")
    for _ in range(2):
        readme.write_text(pages.between_markers(readme, "x", ["new", ""]))
    assert readme.read_text() == "Before\n\n<!-- x -->\n\nnew\n\n<!-- /x -->\n\n<!-- y -->\nkept\n<!-- /y -->\n"


@pytest.mark.parametrize("text", ["", "<!-- x -->", "<!-- /x --> <!-- x -->", "<!-- x --> <!-- x --> <!-- /x -->"])
def test_a_file_without_a_place_is_refused(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs the lines <!-- x --> and <!-- /x -->, each once"):
        pages.between_markers(readme, "x", [])


def test_the_edge_of_a_range_is_where_the_curve_first_falls_below_the_level() -> None:
    curve = [(0.0, 5.0), (1.0, 6.0), (3.0, 2.0), (4.0, 9.0)]
    assert pages.edge(curve, 4.0) == (2.0, True)
    assert pages.edge(curve, 2.0) == (4.0, False)
    assert pages.edge(curve[:1], 2.0) == (0.0, False)
