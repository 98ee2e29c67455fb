"""Which refreshes are followed by steps at which gradients and weights are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The first refreshes are, and others if so many steps have been taken since the last one that was: what is looked at
#: behind a refresh costs as much as some tens of steps of a small network, and epochs may be short.
FIRST, EVERY = 3, 500


class Watching:
    """Counts refreshes and steps.

    Attributes:
        is_on: whether the steps behind the last refresh are looked at.
    """

    def __init__(self) -> None:
        self.is_on, self._count, self._steps = True, 0, 0

    def note_step(self) -> None:
        """Take note of a step."""
        self._steps += 1

    def note_refresh(self) -> None:
        """Decide for the steps behind a refresh, just before it."""
        self.is_on = self._count < FIRST or self._steps >= EVERY
        if self.is_on:
            self._count, self._steps = self._count + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to look at the same steps."""
        return {"is_on": self.is_on, "count": self._count, "steps": self._steps}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what :meth:`state_dict` has returned; from ``None``, begin anew."""
        state = state or {}
        self.is_on, self._count, self._steps = state.get("is_on", True), state.get("count", 0), state.get("steps", 0)
