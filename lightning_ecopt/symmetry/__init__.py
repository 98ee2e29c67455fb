"""Which rescalings leave a network unchanged: trace, labels, rules, solution, group, balance."""

from __future__ import annotations

from lightning_ecopt.symmetry.coupling import Coupling
from lightning_ecopt.symmetry.describe import UnitSet
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.pending import DeferredGroup, GroupFromModuleCalls, GroupFromNextCall, KnownGroup
from lightning_ecopt.symmetry.trace import scaling_group

__all__ = [
    "Coupling",
    "DeferredGroup",
    "GroupFromModuleCalls",
    "GroupFromNextCall",
    "KnownGroup",
    "Monomials",
    "ScalingGroup",
    "UnitSet",
    "scaling_group",
]
