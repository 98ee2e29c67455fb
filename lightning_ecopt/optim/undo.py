"""A step that has been refused in its middle is undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import local
from lightning_ecopt.optim.binding import parameters_of
from lightning_ecopt.optim.calls import ClosureError, StepCall, states_in
from lightning_ecopt.optim.session import Session


@contextmanager
def undone_if_refused(session: Session, call: StepCall) -> Iterator[None]:
    """Undo all that has changed if the base is found out to call its closure in the middle of a step.

    That takes a copy of weights, gradients and state, which is made until the base has shown at one step that it calls
    its closure first. The optimizers of torch need not show it.
    """
    if call.closure is None or session.closure_comes_first:
        yield
        return
    before = _Copy(session)
    try:
        yield
    except ClosureError:
        before.put_back()
        raise
    if call.closure_came_first is not None:
        session.closure_comes_first = call.closure_came_first


class _Copy:
    """The weights, gradients and state of an optimizer, and its stage, as they are now."""

    def __init__(self, session: Session) -> None:
        base, group = session.base, session.group
        others = [] if group is None else list(group.parameters.values())
        parameters = list({id(p): p for p in [*parameters_of(base), *others]}.values())
        copies = [] if group is None else session.binding.deferred.followers.of(group.parameters)
        self._session = session
        self._stage = session.stage, session.steps_since_refresh, session.refresh_due, session.last_epoch
        self._options = [(options, dict(options)) for options in base.param_groups]
        self._gradients = [(p, p.grad) for p in parameters]
        self._states = [
            (state, {key: _shallow(entries) for key, entries in state.items()}) for state in states_in(base)
        ]
        held = [entry for _, state in self._states for entries in state.values() for entry in _tensors(entries)]
        values = [*parameters, *(p.grad for p in parameters), *held, *(copy for _, copy in copies)]
        self._values = [(local(t.detach()), local(t.detach()).clone()) for t in values if t is not None]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything as it was."""
        for tensor, value in self._values:
            tensor.copy_(value)
        for p, gradient in self._gradients:
            p.grad = gradient
        for options, content in [*self._options, *self._states]:
            options.clear()
            options.update(content)
        session = self._session
        session.stage, session.steps_since_refresh, session.refresh_due, session.last_epoch = self._stage
        session.forget_version()  # units that were held in the step stay held


def _shallow(entries: Any) -> Any:
    return dict(entries) if type(entries) is dict else entries


def _tensors(entries: Any) -> list[Tensor]:
    found = entries.values() if isinstance(entries, Mapping) else [entries]
    return [entry for entry in found if isinstance(entry, Tensor)]
