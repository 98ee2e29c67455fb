"""Gradients and state that are on the ranks in another way than their parameters, as tensor parallelism leaves them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor
from torch.optim import Optimizer

from lightning_ecopt.common.sharding import is_sharded, placed_like
from lightning_ecopt.optim.calls import states_in


def place_gradients_(parameters: Iterable[Tensor]) -> None:
    """Place gradients on the ranks as their parameters are; nothing is done where nothing is sharded."""
    for parameter in parameters:
        if is_sharded(parameter) and parameter.grad is not None:
            parameter.grad = placed_like(parameter.grad, parameter)


def place_state_(base: Optimizer) -> None:
    """Place the state of an optimizer on the ranks as its parameters are: steps that were plain have made it."""
    for state in states_in(base):
        for parameter, entries in state.items():
            if is_sharded(parameter) and isinstance(entries, MutableMapping):
                for name, value in list(entries.items()):
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = placed_like(value, parameter)
