"""How the state of an optimizer scales when weights are rescaled.

If weights are multiplied by c, gradients are divided by c. A state entry of *degree* p (of homogeneity in the
gradients) is then divided by c**p: the state becomes what it would be, had all gradients been those of the new weights.

    momentum        mean of gradients               degree  1
    second moment   mean of squared gradients       degree  2
    step size       anything free of scale          degree  0
    averaged weight mean of weights                 degree -1
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Degrees by the names of entries, for the optimizers of torch and for names that others share.
DEGREES = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,  # Adamax
    "sum": 2,  # Adagrad
    "square_avg": 2,  # RMSprop, Adadelta
    "grad_avg": 1,  # RMSprop
    "acc_delta": 0,  # Adadelta: squared steps, whose length does not depend on the size of gradients
    "variance": 2,  # Adafactor
    "row_var": 0,  # Adafactor: one number for many weights, so that no rescaling can be exact
    "col_var": 0,
    "second_momentum_buffer": 0,  # NorMuon: of steps that have no scale any more
    "prev": 1,  # Rprop
    "step_size": 0,  # Rprop
    "ax": -1,  # ASGD
    "momentum": 1,
    "hessian": 2,
    "z": -1,  # schedule-free optimizers
    "slow_buffer": -1,  # Lookahead, by two names
    "slow_params": -1,
    "slow_momentum": 1,
}
WEIGHT_AVERAGE = -1
#: Entries that never are zero, so that a restart leaves them as they are.
KEPT_ON_RESTART = {"step_size"}


@dataclass(frozen=True)
class StateEntry:
    """One entry of the base optimizer's state, for all parameters that have it.

    Args:
        degree: the entry is divided by ``c**degree`` if weights are multiplied by ``c``.
        tensors: by parameter name, in the parameters' shapes.
        keep_on_restart: whether the entry keeps its value where momentum is set to zero.
    """

    degree: int
    tensors: dict[str, Tensor]
    keep_on_restart: bool = False


StateEntries = Mapping[str, StateEntry]


def entries_of(
    state: Mapping[Tensor, Mapping[str, Any]], parameters: Mapping[str, Tensor], degrees: Mapping[str, int]
) -> tuple[dict[str, StateEntry], set[str]]:
    """Sort an optimizer's state by entry, and keep the entries that have one number for each weight.

    Args:
        state: the state of an optimizer.
        parameters: by name.
        degrees: degrees by entry that the user gives; they precede :data:`DEGREES`.

    Returns:
        The entries by name; and the names of entries whose degree nobody knows.
    """
    found: dict[str, StateEntry] = {}
    unknown = set()
    for name, p in parameters.items():
        entries = state.get(p, {})
        if not isinstance(entries, Mapping):  # someone else's state, of which nothing is known
            continue
        if "step" in entries and float(entries["step"]) == 0:  # no gradient was seen; Adagrad starts at an option
            continue
        for entry, value in entries.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or entry == "step":
                continue
            degree = degrees.get(entry, _degree(entry, entries))
            if value.shape != p.shape or degree is None:
                if value.ndim > 0 and degree != 0:  # a scalar is a count or a rate, which has no scale
                    unknown.add(entry)
                continue
            found.setdefault(entry, StateEntry(degree, {}, entry in KEPT_ON_RESTART)).tensors[name] = value
    return found, unknown


def weight_averages(entries: StateEntries) -> list[Mapping[str, Tensor]]:
    """The entries that average weights: they move with the weights into coordinates and back."""
    return [entry.tensors for entry in entries.values() if entry.degree == WEIGHT_AVERAGE]


def has_weight_averages(state: Mapping[Tensor, Mapping[str, Any]], degrees: Mapping[str, int]) -> bool:
    """Whether the state averages weights, judged by the first parameter that has state."""
    entries = next((entries for entries in state.values() if entries and isinstance(entries, Mapping)), {})
    return any(degrees.get(entry, DEGREES.get(entry)) == WEIGHT_AVERAGE for entry in entries)


def _degree(entry: str, entries: Iterable[str]) -> int | None:
    if entry == "momentum_buffer" and "square_avg" in entries:  # RMSprop averages gradients over their magnitudes
        return 0
    return DEGREES.get(entry)
