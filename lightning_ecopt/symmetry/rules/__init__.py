"""One rule per ATen operation: from the labels of its inputs to the label of its output.

A rule is a function of a :class:`Call`; it returns the label of each output and imposes on the equations the equations
under which those labels are right. Rules are found by the operation's base name, so that overloads, in-place and
``out=`` forms share one. An operation without a rule grounds all that it touches.
"""

from __future__ import annotations

from lightning_ecopt.symmetry.rules import (
    attention,
    contractions,
    factories,
    images,
    indexing,
    normalization,
    pointwise,
    recurrent,
    reductions,
    views,
)
from lightning_ecopt.symmetry.rules.registry import RULES, Call, rule

__all__ = [
    "RULES",
    "Call",
    "attention",
    "contractions",
    "factories",
    "images",
    "indexing",
    "normalization",
    "pointwise",
    "recurrent",
    "reductions",
    "rule",
    "views",
]
