"""Placeholder."""

from __future__ import annotations

from tests.symmetry.zoo.case import Case

ASSORTED: list[Case] = []
