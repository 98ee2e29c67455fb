"""What the programs of this folder share: lines of JSON, conditions of measurements, ranges, pages in Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
RECORDED = ("run", "case")  # entries of which a line of results has one, and a line of conditions none


# Lines of JSON -------------------------------------------------------------------------------------------------------


def read_results(path: Path, name: str, make: Callable[..., Made]) -> dict[Any, Made]:
    """The results of a file of JSON lines; of two with the same run the later one.

    Args:
        path: of the file; there are no results if it does not exist.
        name: of the entry that says which run a result is of, ``run`` or ``case``; lines without it are skipped.
        make: a result from the entries of a line; it has an attribute ``name``.

    Raises:
        ValueError: if a line is not one of the benchmark's.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            raw = json.loads(line)
            if name not in raw:
                continue
            result = make(**raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is no result of this benchmark ({error}); remove it.") from error
        found[getattr(result, name)] = result
    return found


def read_conditions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that say under which conditions results were made, each once."""
    lines = dict.fromkeys(line for line in path.read_text().splitlines() if line.strip())
    return [raw for raw in map(json.loads, lines) if not any(name in raw for name in RECORDED)]


def conditions(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": name}


def processor() -> str:
    """The name of the processor, or of its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Numbers -------------------------------------------------------------------------------------------------------------


def edge(points: Sequence[tuple[float, float]], level: float) -> tuple[float, bool]:
    """The edge of a range, on a curve that begins in it.

    Args:
        points: x and y; the first y is not below the level.
        level: of y, below which the range has ended.

    Returns:
        The x where the line through the points first falls below the level, and True; or the last x, and False.
    """
    for (inside, high), (outside, low) in pairwise(points):
        if low < level:
            return inside + (outside - inside) * (high - level) / (high - low), True
    return points[-1][0], False


# Markdown ------------------------------------------------------------------------------------------------------------


def in_words(conditions: Mapping[str, Any]) -> str:
    """For example ``torch 2.13.0, python 3.11.7``."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    header = list(header)
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]


def between_markers(path: Path, name: str, lines: Iterable[str]) -> str:
    """The text of a file with other lines between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: if the markers are not there, each once and in order.
    """
    text, start, end = path.read_text(), f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{path} needs the lines {start} and {end}, each once, to have the table between them.")
    block = "\n".join(lines).strip()
    return f"{text.partition(start)[0]}{start}\n\n{block}\n\n{end}{text.partition(end)[2]}"
