"""Changes of the process that several threads may need at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Shared:
    """A change of the process that several threads may need at once.

    The first one in makes it, the last one out undoes it. The lock protects the number of users, and is not held while
    they are inside. It is reentrant: a garbage collection while it is held may call :meth:`leave`.

    Args:
        change: returns a context manager that makes the change and undoes it.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._lock = threading.RLock()
        self._users = 0
        self._made: AbstractContextManager[Any] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Need the change in a ``with`` block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Need the change from now on."""
        with self._lock:
            self._users += 1  # before anything else, so that no garbage collection takes the change back meanwhile
            try:
                if self._made is None:
                    change = self._change()
                    change.__enter__()
                    self._made = change
            except BaseException:
                self._users -= 1
                raise

    def leave(self) -> None:
        """Need it no more."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._made is not None:
                change, self._made = self._made, None
                change.__exit__(None, None, None)
