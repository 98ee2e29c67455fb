"""What a rescaling of the weights does to the state of an optimizer.

An entry has power p if it would have been divided by c^p, had all gradients been those of weights c times as large,
which are divided by c themselves. So momentum has power 1, a mean of squared gradients 2, a gradient over its own
magnitude 0, and what is an average of weights -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: By name, for the optimizers of torch and what is common beside them.
POWERS = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,  # Adamax
    "sum": 2,  # Adagrad
    "square_avg": 2,  # RMSprop, Adadelta
    "grad_avg": 1,  # RMSprop
    "acc_delta": 0,  # Adadelta: of steps, which are as long whatever the size of the gradients
    "variance": 2,  # Adafactor
    "row_var": 0,  # likewise, but not of single weights, so that no rescaling can be exact
    "col_var": 0,
    "prev": 1,  # Rprop
    "step_size": 0,  # Rprop
    "ax": -1,  # ASGD
    "momentum": 1,
    "hessian": 2,
    "z": -1,  # schedule-free forms
    "slow_buffer": -1,  # lookahead
}
#: Entries that never start from zero.
LASTING = {"step_size"}


@dataclass(frozen=True)
class Moment:
    """One entry of the base optimizer's state.

    Args:
        power: 1 for a mean of gradients, which is a covector; 2 for one of their squares; -1 for one of weights.
        tensors: by parameter name.
        lasting: whether it is kept where momentum starts anew.
    """

    power: int
    tensors: dict[str, Tensor]
    lasting: bool = False


Moments = Mapping[str, Moment]


def moments_of(
    state: Mapping[Tensor, Mapping[str, Any]], parameters: Mapping[str, Tensor], given: Mapping[str, int]
) -> tuple[dict[str, Moment], set[str]]:
    """The entries of a state that belong to weights one by one.

    Args:
        state: of an optimizer.
        parameters: by name.
        given: powers that the user knows, by entry.

    Returns:
        The moments, by entry; and the names of entries whose power is not known.
    """
    found: dict[str, Moment] = {}
    unknown = set()
    for name, p in parameters.items():
        entries = state.get(p, {})
        if "step" in entries and float(entries["step"]) == 0:  # it holds what an option says, as in Adagrad
            continue
        for entry, value in entries.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or entry == "step":
                continue
            power = given.get(entry, _power(entry, entries))
            if value.shape != p.shape or power is None:
                if value.ndim > 0 and power != 0:  # a number is a count, or a rate
                    unknown.add(entry)
                continue
            found.setdefault(entry, Moment(power, {}, entry in LASTING)).tensors[name] = value
    return found, unknown


def points_of(moments: Moments) -> list[Mapping[str, Tensor]]:
    """Those that are averages of weights, and go where weights go."""
    return [moment.tensors for moment in moments.values() if moment.power == -1]


def has_points(state: Mapping[Tensor, Mapping[str, Any]], given: Mapping[str, int]) -> bool:
    """Whether there are any, by the entries of the first parameter that has some."""
    entries = next((entries for entries in state.values() if entries), {})
    return any(given.get(entry, POWERS.get(entry)) == -1 for entry in entries)


def _power(entry: str, entries: Iterable[str]) -> int | None:
    if entry == "momentum_buffer" and "square_avg" in entries:  # RMSprop: of gradients over their magnitudes
        return 0
    return POWERS.get(entry)
