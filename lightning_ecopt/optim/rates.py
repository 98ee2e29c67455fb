"""What the learning rate of a step in the equivalent-class space means, in words, and which rates are mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Literal

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_ecopt.optim.bases import step_kinds
from lightning_ecopt.steps.rule import StepKind

#: Relative lengths of a step beyond which it is a mistake: a thousandth and three times the weights. Adam's rate may be
#: tiny in fine-tuning; thirty times the largest in use is a mistake.
_LINEAR_RANGE, _ADAM_RANGE = (1e-3, 3.0), (0.0, 0.3)
_MEANINGS: Mapping[StepKind, str] = {
    "linear": "with the rule 'unit' the relative length of a step: of each row of weights, about this share changes",
    "own size": "as {base} has it; rows of weights move in proportion to their size, a typical row by {base}'s step",
    "whole": "as {base} has it; the step is taken at the balanced weights",
}
_OF: Mapping[StepKind, str] = {"linear": "of SGD", "own size": "of all others", "whole": "of matrices"}


def meaning(base: Optimizer, rule: str) -> str:
    """Say in one line what ``lr`` is, for the report.

    Args:
        base: the optimizer whose steps are taken.
        rule: ``"unit"`` or ``"path"``.

    Example::

        meaning(torch.optim.AdamW(model.parameters(), lr=1e-3), "unit")
        # lr = 0.001: as AdamW has it; rows of weights move in proportion to their size, a typical row by AdamW's step
    """
    name = type(base).__name__
    rates = sorted(set(_rates(base)))
    shown = " to ".join(f"{rate:g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]])) or f"{name}'s own"
    if rule != "unit":
        return f"lr = {shown}: as {name} has it, in values of basis paths"
    kinds = dict.fromkeys(step_kinds(base).values())
    if len(kinds) == 1:
        (kind,) = kinds
        return f"lr = {shown}: {_MEANINGS[kind].format(base=name)}"
    return f"lr = {shown}: " + "; ".join(f"{_OF[kind]}: {_MEANINGS[kind].format(base=name)}" for kind in kinds)


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
    rate = max(_rates(base), default=0.0)  # groups may have smaller ones, as layers that are tuned less
    if rate == 0 or smallest <= rate <= largest:
        return None
    message = (
        f"lr = {rate:g} of {type(base).__name__} is far outside of the rates that train with the rule 'unit', "
        f"{smallest:g} to {largest:g}. It is {meaning(base, rule).split(': ', 1)[1]}."
    )
    return "large" if rate > largest else "small", message


def _rates(base: Optimizer) -> list[float]:
    """The rates of the parameter groups, without what a scheduler has made of them; some optimizers have none."""
    found = [[options.get(name) for name in ("lr", "initial_lr", "max_lr")] for options in base.param_groups]
    numbers = [[float(rate) for rate in of if isinstance(rate, Real | Tensor)] for of in found]
    return [max(of) for of in numbers if of]
