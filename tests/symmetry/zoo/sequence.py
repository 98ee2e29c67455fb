"""Placeholder."""

from __future__ import annotations

from tests.symmetry.zoo.case import Case

SEQUENCE: list[Case] = []
