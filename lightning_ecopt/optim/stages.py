"""The life of an optimizer, stage by stage.

    Waiting --the group is found--> Ready --refresh--> Running --refresh--> Running ...
                                      |                  or Idle, if the rule can use no unit
                                      +--a saved state--> Running --the fit ends--> Resting --the next step--> Running

Loading a state leads back to Ready, and so does another group. While another group is looked for, the present one is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ecopt.optim.binding import Network
from lightning_ecopt.optim.stepper import Stepper
from lightning_ecopt.steps.rule import Rule


@dataclass(frozen=True, eq=False)
class Waiting:
    """The group has not been found.

    Args:
        saved: the rule's part of a checkpoint that was loaded; empty if there is none.
    """

    saved: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Ready:
    """The group is known, and the next step refreshes, or goes on from a saved state.

    Args:
        network: the group and the optimizer's part in it.
        saved: the rule's part of a checkpoint that was loaded; empty if there is none.
    """

    network: Network
    saved: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Resting(Ready):
    """The base's state has left the coordinates of a rule, in which the next step goes on.

    Args:
        running: what was left.
    """

    running: Running | None = None


@dataclass(frozen=True, eq=False)
class Idle:
    """There has been a refresh, and the rule could use no unit: the base steps in weight space.

    Args:
        network: the group and the optimizer's part in it.
        active: units that were alive and exclusive at the refresh, ``bool[H]``.
    """

    network: Network
    active: Tensor


@dataclass(frozen=True, eq=False)
class Running:
    """There has been a refresh, and the base steps in the coordinates of a rule.

    Args:
        network: the group and the optimizer's part in it.
        active: units that were alive and exclusive at the refresh, ``bool[H]``.
        rule: says where the base takes its steps.
        stepper: takes them.
    """

    network: Network
    active: Tensor
    rule: Rule
    stepper: Stepper


Stage = Waiting | Ready | Idle | Running
