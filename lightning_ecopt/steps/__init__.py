"""Coordinates of the equivalent-class space: skeleton, inverse chain rule, weight allocation."""

from __future__ import annotations

from lightning_ecopt.steps.coordinates import PathCoordinates
from lightning_ecopt.steps.skeleton import Skeleton, choose_skeleton

__all__ = ["PathCoordinates", "Skeleton", "choose_skeleton"]
