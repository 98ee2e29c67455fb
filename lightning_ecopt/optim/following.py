"""What happens when a module is given another type, or is moved, between two steps."""

from __future__ import annotations

from lightning_ecopt.optim.binding import Network
from lightning_ecopt.optim.session import Session
from lightning_ecopt.optim.stages import Running
from lightning_ecopt.steps import RULES


def followed(session: Session, stage: Running) -> Running:
    """The stage, with a rule that is made anew from its own state if parameters have another type or device by now.

    So it would be if it were resumed. The state of the base optimizer stays as it is: what torch does with it is the
    same without the rule.
    """
    if stage.rule.rows.fit(stage.network.group.parameters):
        return stage
    network = Network.of(session.base, stage.network.group, session.options)
    entries = session.entries(network)
    state = stage.rule.state_dict(entries)
    rule = RULES[session.options.rule].resume(session.setting(network, stage.active), state, entries)
    session.stage = running = session.running(network, stage.active, rule)
    return running
