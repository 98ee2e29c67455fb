"""Optimisation in the equivalent-class space of a network, as a PyTorch Lightning callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ecopt.common.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_ecopt.callback import EquivalentClassOptimization
    from lightning_ecopt.configure import ec_adamw, ec_muon, ec_sgd
    from lightning_ecopt.metrics import EquivalentClassDistance, InvarianceViolation, PathNorm, UnitImbalance
    from lightning_ecopt.optim import (
        ECSGD,
        ECAdamW,
        ECMuon,
        EquivalentClassOptimizer,
        MuonAdamW,
        set_skeleton_to_one_,
    )
    from lightning_ecopt.symmetry import ScalingGroup, check_invariance, scaling_group

__version__ = "0.1.0"

__all__ = [
    "ECSGD",
    "ECAdamW",
    "ECMuon",
    "EquivalentClassDistance",
    "EquivalentClassOptimization",
    "EquivalentClassOptimizer",
    "InvarianceViolation",
    "MuonAdamW",
    "PathNorm",
    "ScalingGroup",
    "UnitImbalance",
    "check_invariance",
    "ec_adamw",
    "ec_muon",
    "ec_sgd",
    "scaling_group",
    "set_skeleton_to_one_",
]

# Whoever trains with plain PyTorch need not import Lightning.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ECAdamW": "optim",
        "ECMuon": "optim",
        "ECSGD": "optim",
        "EquivalentClassDistance": "metrics",
        "EquivalentClassOptimization": "callback",
        "EquivalentClassOptimizer": "optim",
        "InvarianceViolation": "metrics",
        "MuonAdamW": "optim",
        "PathNorm": "metrics",
        "ScalingGroup": "symmetry",
        "UnitImbalance": "metrics",
        "check_invariance": "symmetry",
        "ec_adamw": "configure",
        "ec_muon": "configure",
        "ec_sgd": "configure",
        "scaling_group": "symmetry",
        "set_skeleton_to_one_": "optim",
    },
)
