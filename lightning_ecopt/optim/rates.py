"""What the learning rate of a step in the equivalent-class space means, in words, and which rates are mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_ecopt.optim.bases import ParamGroups, step_kinds
from lightning_ecopt.steps.rule import StepKind

#: Relative lengths of a step beyond which it is a mistake: a thousandth and three times the weights. Adam's rate may be
#: tiny in fine-tuning; 0.3 is thirty times the largest that is usual.
_LINEAR_RANGE, _ADAM_RANGE = (1e-3, 3.0), (0.0, 0.3)
_MEANINGS: Mapping[StepKind, str] = {
    "linear": "the relative length of a step of a unit",
    "own size": "{base}'s, for a row of weights of typical size",
    "whole": "{base}'s, for the balanced weights",
}
_OF: Mapping[StepKind, str] = {"linear": " of SGD", "own size": " of all others", "whole": " of matrices"}


def meaning(base: Optimizer, rule: str) -> str:
    """Say in one line what ``lr`` is, for the report.

    Args:
        base: the optimizer whose steps are taken.
        rule: ``"unit"`` or ``"path"``.

    Example::

        meaning(torch.optim.AdamW(model.parameters(), lr=1e-3), "unit")
        # lr = 0.001 is AdamW's, for a row of weights of typical size
    """
    name, kinds = type(base).__name__, step_kinds(base)
    if rule != "unit":
        return f"lr{_shown(base.param_groups)} is {name}'s, in values of basis paths"
    groups: dict[StepKind, list[Mapping[str, Any]]] = {}  # one may have parameters of several kinds
    for options in base.param_groups:
        for kind in dict.fromkeys(kinds[id(p)] for p in options["params"]):
            groups.setdefault(kind, []).append(options)
    return "; ".join(
        f"lr{_shown(own)}{_OF[kind] if len(groups) > 1 else ''} is {_MEANINGS[kind].format(base=name)}"
        for kind, own in groups.items()
    )


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
    rate = max(_rates(base.param_groups), default=0.0)  # groups may have smaller ones, as layers that are tuned less
    if rate == 0 or smallest <= rate <= largest:
        return None
    message = (
        f"lr = {rate:g} of {type(base).__name__} is far outside of the rates that train with the rule 'unit', "
        f"{smallest:g} to {largest:g}. It is {meaning(base, rule).split(' is ', 1)[1]}."
    )
    return "large" if rate > largest else "small", message


def _shown(groups: ParamGroups) -> str:
    """The rates of some parameter groups in a message: one, the smallest and the largest, or none."""
    rates = sorted(set(_rates(groups)))
    return " = " * bool(rates) + " to ".join(f"{r:g}" for r in dict.fromkeys([*rates[:1], *rates[-1:]]))


def _rates(groups: ParamGroups) -> list[float]:
    """The rates of some parameter groups, without what a scheduler has made of them; some optimizers have none."""
    found = [[options.get(name) for name in ("lr", "initial_lr", "max_lr")] for options in groups]
    numbers = [[float(rate) for rate in of if isinstance(rate, Real | Tensor)] for of in found]
    return [max(of) for of in numbers if of]
