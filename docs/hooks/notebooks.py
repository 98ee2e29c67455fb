"""Notebooks as Markdown, with what their cells have put out."""

from __future__ import annotations

import base64
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """The text of a notebook's page, and the pictures on it by their names.

    Args:
        path: of the notebook, which has been run.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            heading = (re.findall(r"^#+ (.+)$", source, flags=re.MULTILINE) or [heading])[-1]
            continue
        parts.append(f"```python\n{source}\n```")
        for output in _joined(cell["outputs"]):
            text = _text(output)
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"[![{heading}]({name})]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text:
                parts.append(f"```{{.text .output}}\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, with what was printed in a row as one."""
    found: list[dict[str, Any]] = []
    for is_printed, group in groupby(outputs, lambda output: output["output_type"] == "stream"):
        if is_printed:
            found.append({"output_type": "stream", "text": [_text(output) for output in group]})
        else:
            found += group
    return found


def _text(output: dict[str, Any]) -> str:
    return "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
