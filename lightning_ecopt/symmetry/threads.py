"""The traces that a thread is in, the modules that run there, and what is left out of the traces meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode


class Trace(Protocol):
    """What takes down the operations of a call; a :class:`~.trace_mode.TraceMode`."""

    is_fake: bool
    traced: list[Tensor]  # parameters

    def entered(self) -> AbstractContextManager[None]:
        """Take down what this thread does."""

    def hold_all_fixed(self, name: str) -> None:
        """Demand that no parameter changes."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A trace that one thread is in, and the modules that run there, innermost last."""

    trace: Trace
    modules: list[nn.Module] = field(default_factory=list)


class _Thread(threading.local):
    """The traces that the current thread is in, innermost last, and what has begun in them and has to end before."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.begun: list[tuple[object, ExitStack]] = []


here = _Thread()


def is_traced_by(trace: Trace) -> bool:
    """Whether the current thread is in this trace."""
    return any(entry.trace is trace for entry in here.entries)


def running_module(trace: Trace) -> nn.Module | None:
    """The innermost module that has been called on the current thread since the trace began, if there is one."""
    modules = next((entry.modules for entry in reversed(here.entries) if entry.trace is trace), [])
    return modules[-1] if modules else None


@contextmanager
def on_this_thread(trace: Trace, *modules: nn.Module) -> Iterator[None]:
    """Take down for a trace what the current thread does, which runs these modules, innermost last."""
    entry, depth = Entry(trace, list(modules)), len(here.begun)
    with trace.entered():
        here.entries.append(entry)
        try:
            yield
        finally:
            if len(here.begun) > depth:  # a step of an optimizer has failed, and nobody said when it was over
                _end_begun(depth)
                trace.hold_all_fixed("failed step")
            here.entries.remove(entry)


def traces_here() -> list[Entry]:
    """The traces that the current thread is in, outermost first."""
    return list(here.entries)


@contextmanager
def untraced() -> Iterator[None]:
    """Take nothing down of what the current thread does, and leave other modes of dispatch as they are."""
    entries, here.entries = here.entries, []
    own = {id(entry.trace) for entry in entries}
    try:
        with _disable_current_modes() as before:
            others = [mode for mode in reversed(before) if id(mode) not in own]
            for mode in others:
                _push_mode(mode)
            try:
                yield
            finally:
                for _ in others:
                    _pop_mode()
    finally:
        here.entries = entries


def begin(key: object, context: AbstractContextManager[Any]) -> None:
    """Enter a context on this thread until :func:`end` is called, or until the innermost trace ends."""
    stack = ExitStack()
    stack.enter_context(context)
    here.begun.append((key, stack))


def begin_within(key: object) -> None:
    """Take note of a beginning in the midst of what has begun; nothing changes until its own :func:`end`."""
    if here.begun:
        begin(key, nullcontext())


def end(key: object) -> None:
    """Leave the last context that has begun under this key, and all that have begun since, if there is one."""
    numbers = [number for number, (other, _) in enumerate(here.begun) if other is key]
    if numbers:
        _end_begun(numbers[-1])


def _end_begun(depth: int) -> None:
    while len(here.begun) > depth:
        here.begun.pop()[1].close()


def retraced(entries: list[Entry], call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, and take it down for these traces, in which the thread is not at the moment."""
    with ExitStack() as stack:
        for entry in entries:
            stack.enter_context(on_this_thread(entry.trace, *entry.modules))
        return call(*args, **kwargs)
