"""Optimisation in the equivalent-class space of a network, as a PyTorch Lightning callback."""

from __future__ import annotations

from lightning_ecopt.callback import EquivalentClassOptimization
from lightning_ecopt.configure import ec_adamw, ec_sgd
from lightning_ecopt.metrics import EquivalentClassDistance, PathNorm, UnitImbalance
from lightning_ecopt.optim import ECSGD, ECAdamW, EquivalentClassOptimizer
from lightning_ecopt.symmetry import ScalingGroup, scaling_group

__version__ = "0.1.0.dev0"

__all__ = [
    "ECSGD",
    "ECAdamW",
    "EquivalentClassDistance",
    "EquivalentClassOptimization",
    "EquivalentClassOptimizer",
    "PathNorm",
    "ScalingGroup",
    "UnitImbalance",
    "ec_adamw",
    "ec_sgd",
    "scaling_group",
]
