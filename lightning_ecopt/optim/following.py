"""What happens when a module is given another type, or is moved, between two steps."""

from __future__ import annotations

from lightning_ecopt.optim.binding import Network
from lightning_ecopt.optim.session import Session
from lightning_ecopt.optim.stages import Running
from lightning_ecopt.steps import RULES


def follow(session: Session) -> None:
    """Make the rule anew from its own state if parameters have another type or device by now, as if it were resumed.

    The state of the base optimizer stays as it is: what torch does with it is the same without the rule.
    """
    stage, options = session.stage, session.options
    if not isinstance(stage, Running) or stage.rule.rows.fit(stage.network.group.parameters):
        return
    network = Network.of(session.base, stage.network.group, options)
    entries = session.entries(network)
    state = stage.rule.state_dict(entries)
    rule = RULES[options.rule].resume(session.setting(network, stage.active), state, entries)
    session.stage = session.running(network, stage.active, rule)
