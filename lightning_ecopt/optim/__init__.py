"""Optimizers that move in the equivalent-class space."""

from __future__ import annotations

from lightning_ecopt.optim.optimizer import EquivalentClassOptimizer, StepStatistics

__all__ = ["EquivalentClassOptimizer", "StepStatistics"]
