"""Ctrl-C at the wrong moment."""

from __future__ import annotations

import threading
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]  # the functions of `signal` without its enumerations, which cost more
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of the block, so that weights are not left halfway; a second one does not.

    Python raises ``KeyboardInterrupt`` between any two operations, in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = getsignal(SIGINT)
    if not callable(before) or getattr(before, "__module__", "") == __name__:  # a block around this one waits already
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            before(number, frame)

    signal(SIGINT, wait)
    try:
        yield
    finally:
        if getsignal(SIGINT) is wait:
            signal(SIGINT, before)
        if len(came) == 1:
            before(*came[0])
