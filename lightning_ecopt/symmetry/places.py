"""Where in the user's code an operation comes from, for reports."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

_SKIPPED = ("torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "contextlib", "functools")
_OURS = __name__.partition(".")[0]
_ON_THE_WAY = tuple(f"{__package__}.{name}" for name in ("places", "trace_mode", "isolation", "threads", "left_out"))


def line_of_user(home: type) -> str:
    """Name the function and the line that run now: ``"training_step, line 23"``; nothing if no user's code runs.

    Args:
        home: the class of the module that is watched. A line of the file that defines it is preferred to others, for
            which the name of the file is told, too: ``"dice, line 5 of losses.py"``.
    """
    own = getattr(sys.modules.get(home.__module__), "__file__", None)
    found = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.partition(".")[0] == _OURS:
            if name not in _ON_THE_WAY:
                return found  # who began the trace
        elif name.partition(".")[0] not in _SKIPPED:
            file = frame.f_code.co_filename
            if file == own:
                return f"{_function(frame)}, line {frame.f_lineno}"
            found = found or f"{_function(frame)}, line {frame.f_lineno} of {Path(file).name}"
        frame = frame.f_back
    return found


def _function(frame: FrameType) -> str:
    """The name of the function of a frame, or of the one around it if it has none, as a comprehension."""
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name
