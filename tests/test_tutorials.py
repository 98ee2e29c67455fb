"""The notebooks run, and what is kept of them can be read on a page."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.selection import full

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "tutorials").glob("*.ipynb"))
#: What a notebook needs beyond the extras for tests.
NEEDS = {"3_gpt_hugging_face": ("transformers", "accelerate")}
MOST_BYTES = 200_000
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


@EACH
def test_a_notebook_is_kept_with_its_output(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@EACH
def test_the_words_of_a_notebook(path: Path) -> None:
    words = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown"]
    assert words[0].startswith("# ")
    assert "downloads nothing" in words[0]
    assert words[-1].startswith(("## Where to read on", "## What it means")) or "## Where to read on" in words[-1]
    for target in re.findall(r"\]\(((?:\.\.?/)[^)#\s]+)", "\n".join(words)):
        assert (path.parent / target).resolve().exists(), target


def test_all_notebooks_are_listed() -> None:
    names = {path.stem for path in NOTEBOOKS}
    page, navigation = ((ROOT / name).read_text() for name in ("docs/tutorials.md", "mkdocs.yml"))
    assert set(re.findall(r"examples/tutorials/(\w+)\.ipynb", page)) >= names
    assert set(re.findall(r"tutorials/(\w+)\.md", navigation)) >= names
    assert "docs/tutorials.md" in (ROOT / "README.md").read_text()


@EACH
def test_a_page_has_what_the_notebook_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    text, pictures = importlib.import_module("notebooks").converted(path)
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert len(pictures) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert re.findall(r"^\[!\[.+\]\((.+)\)\]\(\1\)$", text, flags=re.MULTILINE) == list(pictures)
    for cell in cells(path):
        assert "".join(cell["source"]) in text
    for output in outputs:
        assert "".join(output.get("text", "")).strip() in text


#: Lines of a notebook that make it long, and shorter ones.
SHORTER = {
    "1_resnet": {
        "epochs=3": "epochs=1",
        "seeds = (0.03, 0.1, 0.3), (0, 1)": "seeds = (0.03, 0.1, 0.3), (0,)",
        "(images[:1400], labels[:1400])": "(images[:400], labels[:400])",
    },
    "2_lightning_cli": {"max_epochs: 6": "max_epochs: 2"},
    "3_gpt_hugging_face": {"steps=120": "steps=30"},
    "4_freedoms_of_a_transformer": {"max_epochs=2": "max_epochs=1", "(4000, 10)": "(1000, 10)"},
    "5_the_paper": {"epochs=10": "epochs=2", "range(3)": "range(1)"},
}


@full
@EACH
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """From its first line to its last, with less training."""
    for module in NEEDS.get(path.stem, ()):
        pytest.importorskip(module)
    code = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    program = "\n\n".join(code)
    for line, shorter in SHORTER.get(path.stem, {}).items():
        assert program.count(line) == 1, line
        program = program.replace(line, shorter)
    (tmp_path / "notebook.py").write_text(program)
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
