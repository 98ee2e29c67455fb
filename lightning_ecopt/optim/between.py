"""Between two steps: whether somebody else has written to the weights."""

from __future__ import annotations

from lightning_ecopt.optim.session import Idle, Running, Session
from lightning_ecopt.optim.writers import WRITTEN


def hold_written(session: Session) -> None:
    """Hold units fixed to whose weights somebody else writes after each step. Call it just before a step."""
    units = session.writers.written(session.stage)
    if units is not None:
        session.hold(units, WRITTEN)


def note_weights(session: Session) -> None:
    """Note the weights just after a step."""
    if isinstance(session.stage, Idle | Running) and session.options.representative == "balanced":
        session.writers.note(session.stage, session.steps_since_refresh)
