"""What a step does to weights: the two rules, the rows and the coordinates that they are written in.

A step rule is a class with the methods of :class:`~lightning_ecopt.steps.rule.Rule` and an entry in :data:`RULES`.
"""

from __future__ import annotations

from lightning_ecopt.steps.path import PathRule
from lightning_ecopt.steps.rule import Rule
from lightning_ecopt.steps.unit import UnitRule

#: The rules by the names that options have. Nothing else in the package asks which rule it is.
RULES: dict[str, type[Rule]] = {UnitRule.name: UnitRule, PathRule.name: PathRule}

__all__ = ["RULES", "PathRule", "Rule", "UnitRule"]
