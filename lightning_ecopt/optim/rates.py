"""What the learning rate of a step in the equivalent-class space means, in words, and which rates are mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch.optim import Adam, AdamW, Optimizer

from lightning_ecopt.optim.bases import step_kinds
from lightning_ecopt.steps.rule import StepKind

#: Smallest and largest rate that trained any network that we tried, with a factor of three on both sides.
_LINEAR_RANGE, _ADAM_RANGE = (1e-3, 3.0), (3e-5, 0.3)
_MEANINGS: Mapping[StepKind, str] = {
    "linear": "with the rule 'unit' the relative length of a step: of each row of weights, about this share changes",
    "own size": "as {base} has it; rows of weights move in proportion to their size, a typical row by {base}'s step",
    "whole": "as {base} has it; the step is taken at the balanced weights",
}


def meaning(base: Optimizer, rule: str) -> str:
    """Say in one line what ``lr`` is, for the report.

    Args:
        base: the optimizer whose steps are taken.
        rule: ``"unit"`` or ``"path"``.

    Example::

        meaning(torch.optim.AdamW(model.parameters(), lr=1e-3), "unit")
        # lr = 0.001: as AdamW has it; rows of weights move in proportion to their size, a typical row by AdamW's step
    """
    rates = sorted({_rate(options) for options in base.param_groups})
    shown = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    if rule != "unit":
        return f"lr = {shown}: as {type(base).__name__} has it, in values of basis paths"
    kinds = dict.fromkeys(step_kinds(base).values())
    return f"lr = {shown}: " + "; ".join(_MEANINGS[kind].format(base=type(base).__name__) for kind in kinds)


def mistaken_rate(base: Optimizer, rule: str) -> tuple[Literal["small", "large"], str] | None:
    """Tell a rate that is far outside of the useful range; ``None`` if no rate is.

    Rates of zero are not judged, and the rate that a scheduler started from is, not what it has made of it.

    Returns:
        On which side it is, and a message.
    """
    kinds = set(step_kinds(base).values())
    if rule != "unit" or (kinds != {"linear"} and type(base) not in (Adam, AdamW)):  # others have rates of their own
        return None
    smallest, largest = _LINEAR_RANGE if kinds == {"linear"} else _ADAM_RANGE
    rates = [_rate(options) for options in base.param_groups]
    wrong = [rate for rate in rates if rate > largest] or [rate for rate in rates if 0 < rate < smallest]
    if not wrong:
        return None
    message = (
        f"lr = {wrong[0]:g} of {type(base).__name__} is far outside of the rates that train with the rule 'unit', "
        f"{smallest:g} to {largest:g}. It is {meaning(base, rule).split(': ', 1)[1]}."
    )
    return "large" if wrong[0] > largest else "small", message


def _rate(options: Mapping[str, Any]) -> float:
    """The rate of a parameter group, without what a scheduler has made of it."""
    return max(float(options[name]) for name in ("lr", "initial_lr", "max_lr") if name in options)
