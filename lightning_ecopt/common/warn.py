"""Warnings that point at the line of the user that they are about."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

#: What is called on the way from the user's line to a warning; none of it is the user's own.
_BETWEEN = {"lightning_ecopt", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warn at the innermost line that is neither in this package nor in torch or Lightning."""
    frame = _users_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _users_frame(frame: FrameType) -> FrameType:
    """The innermost frame of the user; the outermost one if there is none, as in threads that torch starts."""
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame
