"""The main job: what a new user runs first."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.selection import full

pytestmark = full

ROOT = Path(__file__).parents[1]
START, END = "<!-- digits -->", "<!-- /digits -->"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module that processes of a pool find, too."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("digits")


def curves(digits: ModuleType, accuracy: dict[float, list[float]], rescaled: float | None = None) -> list[Any]:
    """Invented results, the same for every contender, for each rate and seed; those of rescaled starts may differ."""
    return digits.curves_of(
        [
            digits.Outcome(digits.Run(contender, start, lr, seed, 2), [], value, [9.0, seconds, seconds])
            for contender, seconds in zip(digits.CONTENDERS, (0.1, 0.3, 0.2), strict=True)
            for start in (False, True)
            for lr, values in accuracy.items()
            for seed, value in enumerate([rescaled] * len(values) if start and rescaled is not None else values)
        ]
    )


def test_the_digits_are_compared_in_a_table_and_a_figure(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(digits, "RATES", (0.003, 0.01))
    monkeypatch.setenv("COLUMNS", "80")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- digits -->\nold\n<!-- /digits -->\nafter\n")
    outcomes = digits.compare(path=tmp_path / "curves.png", readme=readme)
    assert len(outcomes) == 12
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    output, written = capsys.readouterr().out, readme.read_text()
    for text in ("m = 25,610 parameters, H = 384 freedoms, m - H = 25,226", "one thread", torch.__version__):
        assert text in output
        assert text in written
    assert "curves.png" in output
    for name in digits.CONTENDERS:
        assert len([line for line in output.splitlines() if line.strip().startswith(f"{name} ")]) == 2
        assert written.count(f"| {name} |") == 2
    assert written.startswith("before\n<!-- digits -->\n\n| optimizer | start |")
    assert written.endswith("<!-- /digits -->\nafter\n")
    assert "old" not in written
    losses = {outcome.run: torch.tensor(outcome.losses) for outcome in outcomes}
    for run, ordinary in losses.items():
        rescaled = losses[run._replace(rescaled=True)]
        if run.contender == "SGD" and not run.rescaled:
            assert float((ordinary[1:] - rescaled[1:]).abs().max()) > 0.1
        # From two members of one class EC-SGD does the same, until float32 rounding has grown; SGD never does.
        if run.contender != "SGD":
            torch.testing.assert_close(ordinary[:10], rescaled[:10], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ordinary[0], rescaled[0])  # the same function


def test_a_row_of_the_table(digits: ModuleType) -> None:
    accuracy = {0.01: [80.0, 82.0], 0.1: [94.0, 96.0], 1.0: [90.0, 92.0]}
    header, sgd, rescaled, paths, *_ = digits.rows_of(curves(digits, accuracy, rescaled=50.0))
    assert header == ["optimizer", "start", "best, %", "range", "at 0.1, %", "s/epoch", "ratio"]
    # Within 2 points of 95: of 14 below 0.1, and of 4 above it: 10 ** (1 / 7 + 1 / 2).
    assert sgd == ["SGD", "ordinary", "95.0 ± 1.4 at 0.1", "4.4", "95.0 ± 1.4", "0.100", "1.00"]
    assert rescaled == ["SGD", "rescaled", "50.0 ± 0.0 at 0.01", "> 100", "50.0 ± 0.0", "0.100", "1.00"]
    assert paths[0] == "EC-SGD (paths)"
    assert paths[-2:] == ["0.300", "3.00"]


def test_the_title_says_what_rescaling_changes(digits: ModuleType) -> None:
    title = digits.title_of(curves(digits, {0.01: [95.0], 0.1: [80.0]}, rescaled=70.0))
    assert title.endswith("SGD -25.0, EC-SGD (paths) -25.0, EC-SGD (units) -25.0")


def test_a_figure_of_several_seeds(digits: ModuleType, tmp_path: Path) -> None:
    digits.plot(curves(digits, {0.01: [95.0, 96.0], 0.1: [80.0, 70.0]}), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", f"{END} {START}", f"{START} {START} {END}"])
def test_a_file_without_a_place_is_refused_before_training(digits: ModuleType, tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md needs the lines <!-- digits --> and <!-- /digits -->, each once"):
        digits.compare(readme=readme)


def test_the_readme_has_a_place_for_the_table(digits: ModuleType) -> None:
    assert "| optimizer |" in digits.between_markers(ROOT / "README.md", "digits", ["| optimizer |"])


CALLBACK = "--trainer.callbacks+=lightning_ecopt.EquivalentClassOptimization"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "{root}/examples/digits.yaml"], "384 freedoms in 7 layers, all used; lr = 0.01 is "),
        (["--model=CNN", CALLBACK], "the line of the page"),
        (["--model=CNN", CALLBACK, "--trainer.callbacks.verbose=table"], "the table of the page"),
    ],
)
def test_the_digits_program_runs_from_the_command_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "fit"]
    options = [
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
        *(argument.format(root=ROOT) for argument in arguments),
    ]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command + options, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    if expected.endswith("of the page"):
        start = "16 + 32 freedoms" if "line" in expected else "Freedoms of the network\n"
        page = (ROOT / "docs" / "report.md").read_text()
        (expected,) = (part.split("\n```")[0] for part in page.split("```text\n") if part.startswith(start))
    assert expected in "\n".join(line.rstrip() for line in done.stdout.splitlines())


def test_the_program_distinguishes_its_two_uses(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(digits, "compare", lambda seeds, readme: seen.append((seeds, readme)))
    monkeypatch.setattr(digits, "LightningCLI", lambda *args, **kwargs: seen.append(SimpleNamespace(**kwargs)))
    for arguments in ([], ["--seeds", "3"], ["--readme", "a.md"], ["fit"], ["--config=digits.yaml", "fit"]):
        monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
        digits.main()
    assert seen[:3] == [(1, None), (3, None), (1, Path("a.md"))]
    assert seen[3].subclass_mode_model
    assert seen[4].subclass_mode_model
