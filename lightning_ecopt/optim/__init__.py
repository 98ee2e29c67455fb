"""Optimizers that move in the equivalent-class space."""

from __future__ import annotations

from lightning_ecopt.optim.muon import MuonAdamW
from lightning_ecopt.optim.named import ECSGD, ECAdamW, ECMuon
from lightning_ecopt.optim.optimizer import EquivalentClassOptimizer
from lightning_ecopt.steps.path import set_skeleton_to_one_
from lightning_ecopt.steps.rule import PathStatistics, UnitStatistics

__all__ = [
    "ECSGD",
    "ECAdamW",
    "ECMuon",
    "EquivalentClassOptimizer",
    "MuonAdamW",
    "PathStatistics",
    "UnitStatistics",
    "set_skeleton_to_one_",
]
