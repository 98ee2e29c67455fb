"""The script for a GPU: a smoke run on the CPU, and what becomes of stages that fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.selection import full

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.sh"
STAGES = ["tests", "steps", "training", "table of steps", "table of training"]

pytestmark = full


def call(folder: Path, *options: str, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Called from the folder of the data; writes to ``found`` in it."""
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), "--data", ".", "--out", "found", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def codes(folder: Path) -> dict[str, int]:
    """The last exit code of each stage."""
    lines = map(json.loads, (folder / "found" / "stages.jsonl").read_text().splitlines())
    return {line["stage"]: line["code"] for line in lines}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``cifar10.npz``: classes of other colours."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    colours = generator.uniform(0, 255, (10, 1, 1, 3))
    arrays = {}
    for part, count in (("train", 1100), ("test", 100)):
        labels = generator.integers(0, 10, (count, 1))
        images = colours[labels[:, 0]] + generator.normal(0, 20, (count, 32, 32, 3))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = np.clip(images, 0, 255).astype("uint8"), labels.astype("uint8")
    np.savez(folder / "cifar10.npz", **arrays)
    return folder


def test_a_smoke_run_on_a_cpu_passes_all_stages(folder: Path) -> None:
    ended = call(folder, "--device", "cpu", "--smoke")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert codes(folder) == dict.fromkeys(STAGES, 0)
    assert "the figures mean nothing" in ended.stdout
    assert re.search(r"\n\d+ passed, ", ended.stdout)
    steps, training = ((folder / "found" / f"{name}.jsonl").read_text() for name in ("step_overhead", "training"))
    cases = [json.loads(line)["case"] for line in steps.splitlines()[1:]]
    assert {case["part"] for case in cases} == {"step", "host", "training"}
    runs = [json.loads(line) for line in training.splitlines()[1:]]
    assert len(runs) == 8
    assert max(run["test"] for run in runs) > 50
    for name, word in (("STEP_OVERHEAD", "Host time"), ("TRAINING", "EC-SGD (units) against SGD-M")):
        assert word in (folder / "found" / f"{name}.md").read_text()


def fake(folder: Path, ends: str) -> Path:
    """An interpreter that only ends, as lines of ``case`` say by its arguments."""
    path = folder / "python"
    path.write_text(f'#!/usr/bin/env bash\necho "$@"\ncase "$*" in\n{ends}\nesac\n')
    path.chmod(0o755)
    return path


def test_stages_that_fail_or_run_out_of_time_leave_the_others(tmp_path: Path) -> None:
    python = fake(tmp_path, '*accuracy.py*) exit 3 ;;\n"-m pytest"*) exit 124 ;;')
    ended = call(tmp_path, "--device", "cpu", "--smoke", python=python)
    assert ended.returncode == 1
    assert codes(tmp_path) == {**dict.fromkeys(STAGES, 0), "training": 3, "tests": 124}
    assert ended.stderr.splitlines() == [
        "FAILED: tests ran out of time, call again to go on",
        "FAILED: training failed with code 3",
    ]
    assert "FAILED: training" in (tmp_path / "found" / "gpu.log").read_text()


def test_a_gpu_gets_networks_of_real_size_and_every_test_that_needs_it(tmp_path: Path) -> None:
    ended = call(tmp_path, python=fake(tmp_path, ""))
    assert ended.returncode == 0, ended.stderr
    told = next(line for line in ended.stdout.splitlines() if "step_overhead.py" in line and "--networks" in line)
    for option in ("resnet50", "vit-b16", "gpt2", "vgg13", "--autocast", "--device cuda", "--parts step host training"):
        assert option in told
    pytest_line = next(line for line in ended.stdout.splitlines() if "-m pytest" in line)
    assert "-k cuda]" in pytest_line
    needing = [path for path in SCRIPT.parents[2].glob("tests/**/test_*.py") if "is_available()" in path.read_text()]
    assert {path.name for path in needing} == {"test_on_devices.py", "test_triton_kernels.py", Path(__file__).name}
    assert all(path.name in pytest_line for path in needing if path != Path(__file__))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "usage: "),
        (["--epochs", "3"], "usage: "),
        (["--device"], "usage: "),
        (["--device", "cpu"], "give --smoke"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    ended = call(tmp_path, *options, python=fake(tmp_path, ""))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "found" / "stages.jsonl").exists()


def test_without_a_gpu_nothing_begins(tmp_path: Path) -> None:
    ended = call(tmp_path, python=fake(tmp_path, "*import*torch*) exit 1 ;;"))
    assert ended.returncode == 2
    assert "There is no GPU" in ended.stderr
    assert not (tmp_path / "found" / "stages.jsonl").exists()


def test_the_limits_are_those_of_the_header_and_less_than_eight_minutes() -> None:
    text = SCRIPT.read_text()
    limits = {name.strip('"'): int(limit) for name, limit in re.findall(r'^stage ("[^"]*"|\w+) (\d+) ', text, re.M)}
    header = re.findall(r"^#   (\w[\w ]*?) +(\d+) +(\d+)\b", text, re.M)
    assert {name: int(limit) for name, _, limit in header} == limits
    assert list(limits) == STAGES
    assert all(int(estimate) < int(limit) for _, estimate, limit in header)
    assert sum(limits.values()) < 480


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    ended = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
