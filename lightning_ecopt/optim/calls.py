"""How the base optimizer is called: as if it were alone, with what the user has passed to ``step``.

Hooks of the base, and those that are registered for all optimizers, run around the call of the optimizer that wraps it:
once, and with weights to see. While the base itself is called they are left out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as of_all

from lightning_ecopt.common.sharding import can_be_rescaled, local
from lightning_ecopt.common.shared import Shared

#: The hooks of steps and of checkpoints, which the base optimizer shares with the one that wraps it.
HOOKS = tuple(
    f"_optimizer_{event}_{when}_hooks"
    for event in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
)
_HOOKS_OF_ALL: tuple[dict[int, Callable[..., Any]], ...] = (
    of_all._global_optimizer_pre_hooks,
    of_all._global_optimizer_post_hooks,
)

State = MutableMapping[Any, Any]


def optimizers_in(base: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it runs: Lookahead and its like have others in an attribute."""
    found = [base]
    for optimizer in found:  # which grows
        for value in vars(optimizer).values():
            inner = value if isinstance(value, list | tuple) else [value]
            found += [one for one in inner if isinstance(one, Optimizer) and all(one is not other for other in found)]
    return found


def states_in(base: Optimizer) -> list[State]:
    """The states of :func:`optimizers_in`, each once, as some are shared."""
    states = [getattr(optimizer, "state", None) for optimizer in optimizers_in(base)]
    return list({id(state): state for state in states if isinstance(state, MutableMapping)}.values())


@contextmanager
def without_hooks(base: Optimizer) -> Iterator[None]:
    """Leave out hooks while the base is called: those of its own, and on this thread those of all optimizers."""
    own = {name: vars(base)[name] for name in HOOKS if name in vars(base)}
    vars(base).update({name: OrderedDict() for name in own})
    try:
        with _without_hooks_of_all() if any(_HOOKS_OF_ALL) else nullcontext():
            yield
    finally:
        vars(base).update(own)


def or_else(changed: Any, state: Any) -> Any:
    """What a hook has returned, or the state that it was given if it has returned nothing."""
    return state if changed is None else changed


class _Thread(threading.local):
    inside = 0


_thread = _Thread()


class _Outside:
    """A hook of all optimizers that is not called on threads that are inside of :func:`without_hooks`."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if _thread.inside else self.hook(*args, **kwargs)


@contextmanager
def _outside_hooks() -> Iterator[None]:
    changed = [(hooks, number, _Outside(hook)) for hooks in _HOOKS_OF_ALL for number, hook in list(hooks.items())]
    for hooks, number, outside in changed:
        hooks[number] = outside
    try:
        yield
    finally:
        for hooks, number, outside in changed:
            if hooks.get(number) is outside:  # otherwise it has been removed meanwhile
                hooks[number] = outside.hook


_OUTSIDE_HOOKS = Shared(_outside_hooks)


@contextmanager
def _without_hooks_of_all() -> Iterator[None]:
    with _OUTSIDE_HOOKS():
        _thread.inside += 1
        try:
            yield
        finally:
            _thread.inside -= 1


class ClosureError(RuntimeError):
    """The base wants gradients at other weights in the middle of its step, as SAM does."""


class StepCall:
    """One call of the base's ``step``: what the user has passed, but for a closure, which runs before anything moves.

    In the closure's place the base gets one that returns the loss again, as long as weights and gradients are those
    that the closure has left. At others the closure itself is called; in coordinates, where it cannot be, an error is
    raised.

    Args:
        base: the base optimizer.
        args: what ``step`` was called with; the closure, if there is one, is the first or ``closure``.
        kwargs: likewise.
        compare: whether to compare norms of weights, too: a change of ``p.data`` counts no version.

    Attributes:
        closure: the user's closure; ``None`` if there is none.
        loss: what it has returned.
        has_more: whether there is more than a closure, which only the base's own step can take.
        closure_came_first: whether the base has called its closure before anything else; ``None`` if not at all.
    """

    def __init__(self, base: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], compare: bool = False) -> None:
        given = args[0] if args else kwargs.get("closure")
        self.closure: Callable[[], Any] | None = given if callable(given) else None
        self.loss: Any = None
        self.has_more = bool(args[1:]) or bool(kwargs.keys() - {"closure"}) or given is not self.closure
        self.closure_came_first: bool | None = None
        self._base, self._compare, self._in_coordinates = base, compare, False
        if self.closure is not None and args:
            args = (self._again, *args[1:])
        elif self.closure is not None:
            kwargs = {**kwargs, "closure": self._again}
        self._args, self._kwargs = args, kwargs

    def run_closure(self, watch: Callable[[Callable[[], Any]], Any]) -> None:
        """Call the closure, which computes gradients at the weights, by a function that may watch it meanwhile."""
        if self.closure is not None:
            with torch.enable_grad():
                self.loss = watch(self.closure)

    def step(self, *, in_coordinates: bool = False) -> Any:
        """Call the base's ``step``, in coordinates or at the weights as they are; returns what that returns."""
        self._in_coordinates = in_coordinates
        self._before = None if self.closure is None else self._signs()
        with without_hooks(self._base):
            return self._base.step(*self._args, **self._kwargs)

    def _again(self) -> Any:
        if self._signs() == self._before:
            self.closure_came_first = self.closure_came_first is not False
            return self.loss
        self.closure_came_first = False
        if self._in_coordinates:
            name = type(self._base).__name__
            raise ClosureError(
                f"{name} calls the closure again after it has moved weights or taken gradients away, but in the middle "
                "of a step in the equivalent-class space there are no weights to call it at. Turn the two inside out, "
                f"if {name} takes an optimizer: {name}(model.parameters(), base_optimizer=ECSGD, ...), with ECSGD or "
                "ECAdamW of lightning_ecopt and without the callback. Or train without the equivalent-class space."
            )
        assert self.closure is not None
        with torch.enable_grad():
            return self.closure()

    def _signs(self) -> list[Any]:
        """What changes when somebody moves weights or gradients."""
        own = [p for options in self._base.param_groups for p in options["params"]]
        signs: list[Any] = [(p._version, None if p.grad is None else (id(p.grad), p.grad._version)) for p in own]
        if self._compare:
            signs.append(repr([float(local(p.detach()).norm()) for p in own if can_be_rescaled(p)]))  # nan is nan
        return signs
