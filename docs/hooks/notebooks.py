"""Notebooks as Markdown, with what their cells have put out."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any


def converted(path: Path) -> tuple[str, dict[str, bytes]]:
    """The text of a notebook's page, and the pictures on it by their names.

    Args:
        path: of the notebook, which has been run.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text = _text(output)
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![picture]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _text(output: dict[str, Any]) -> str:
    return "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
