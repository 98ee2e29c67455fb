"""Which rescalings leave a network unchanged: trace, labels, rules, solution, group, balance."""

from __future__ import annotations

from lightning_ecopt.symmetry.calls import WatchedCalls
from lightning_ecopt.symmetry.describe import UnitSet
from lightning_ecopt.symmetry.group import Coupling, ScalingGroup
from lightning_ecopt.symmetry.rows import Rows
from lightning_ecopt.symmetry.scales import Scales
from lightning_ecopt.symmetry.segments import SegmentSum
from lightning_ecopt.symmetry.trace import Pending, PendingGroup, scaling_group

__all__ = [
    "Coupling",
    "Pending",
    "PendingGroup",
    "Rows",
    "Scales",
    "ScalingGroup",
    "SegmentSum",
    "UnitSet",
    "WatchedCalls",
    "scaling_group",
]
