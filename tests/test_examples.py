"""The main job: what a new user runs first."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.selection import full

pytestmark = full

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_the_digits_are_compared_in_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = example("digits.py")
    monkeypatch.setitem(digits["compare"].__globals__, "EPOCHS", 3)
    monkeypatch.setenv("COLUMNS", "160")
    runs = digits["compare"](path=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for text in ("MLP", "CNN", "EC-SGD, rescaled start", "26,122", "25,866", "ratio", "curves.png"):
        assert text in output
    assert len(runs) == 8
    assert all(run.accuracy > 0.8 for run in runs if run.equivalent_class)
    for model in (digits["MLP"], digits["CNN"]):
        (sgd, rescaled), (ec, ec_rescaled) = (
            [torch.tensor(run.losses) for run in runs if run.model is model and run.equivalent_class is own]
            for own in (False, True)
        )
        # From two members of one class EC-SGD does the same, until float32 rounding has grown; SGD never does.
        torch.testing.assert_close(ec[:20], ec_rescaled[:20], rtol=1e-3, atol=1e-4)
        assert float((sgd[:20] - rescaled[:20]).abs().max()) > 0.1


def test_the_means_have_their_standard_deviations() -> None:
    digits = example("digits.py")
    assert digits["_mean"]([1.0], "{:.1f}") == "1.0"
    assert digits["_mean"]([1.0, 3.0], "{:.1f}") == "2.0 +- 1.4"


def test_the_digits_program_runs_from_its_configuration(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits.py"), "fit", "--config", str(EXAMPLES / "digits.yaml")]
    options = [
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command + options, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "H = 256 freedoms" in done.stdout


def test_the_program_distinguishes_its_two_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = example("digits.py")
    seen: list[Any] = []
    names = digits["main"].__globals__
    monkeypatch.setitem(names, "compare", lambda seeds: seen.append(seeds))
    monkeypatch.setitem(names, "LightningCLI", lambda *args, **kwargs: seen.append(SimpleNamespace(**kwargs)))
    for arguments in ([], ["--seeds", "3"], ["fit"]):
        monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
        digits["main"]()
    assert seen[:2] == [1, 3]
    assert seen[2].subclass_mode_model
