"""What a traced call does beside computing losses: backward passes and steps of optimizers, which no trace takes down.

A backward pass computes derivatives of a loss, and a step moves weights by them. As long as the loss does not change
when weights are rescaled, neither says anything about scales; but as operations both would: ``w - lr * g`` has no label
unless that of ``w`` is fixed. So a trace is told only from which tensors a backward pass starts, and which gradients it
returns. A pass with ``create_graph=True`` is part of a loss, and is traced as any other computation; so is a closure
that a step calls.

Autograd's engine is called by one function, whatever began the pass: ``Tensor.backward``, ``torch.autograd.backward``
or ``torch.autograd.grad``. Steps are seen by hooks of all optimizers, because schedulers replace the method itself.
Other methods of optimizers, such as SAM's ``first_step``, are told by the frames of the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as of_all

from lightning_ecopt.common.shared import Shared
from lightning_ecopt.symmetry.isolation import replaced
from lightning_ecopt.symmetry.threads import begin, begin_within, end, retraced, traces_here, untraced


class Watcher(Protocol):
    """What is told of backward passes; a :class:`~.trace_mode.TraceMode`."""

    def begin_backward(self, starts: Sequence[Any], given: Sequence[Any]) -> None:
        """Hold fixed what a backward pass starts from, tensors or edges of the graph, and the gradients given there."""

    def note_gradient(self, of: Tensor, gradient: Tensor) -> None:
        """Take note of a gradient that a backward pass has computed, with respect to a tensor."""

    def find_parameters_again(self) -> None:
        """Take note of parameters that have other memory since a step."""


def _running_untraced(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that calls autograd's engine leave the pass out of the traces of its thread."""

    @wraps(run)
    def run_backward(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        traces = [cast(Watcher, entry.trace) for entry in traces_here()]
        if not traces:
            return run(outputs, *args, **kwargs)
        given, _, creates_graph, inputs, *_ = args
        if not creates_graph or kwargs.get("accumulate_grad", True):  # otherwise the result is part of a loss
            for trace in traces:
                trace.begin_backward(outputs, given)
        if creates_graph:
            return run(outputs, *args, **kwargs)
        with untraced():
            gradients = run(outputs, *args, **kwargs)
        for tensor, gradient in zip(inputs, gradients or (), strict=False):
            if isinstance(tensor, Tensor) and isinstance(gradient, Tensor):
                for trace in traces:
                    trace.note_gradient(tensor, gradient)
        return gradients

    return run_backward


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take nothing down until the step is over, but for its closure."""
    entries = traces_here()
    if not entries:  # perhaps one optimizer runs another, or an earlier step has failed
        begin_within(optimizer)
        return None
    begin(optimizer, untraced())

    def watched(value: Any) -> Any:
        is_closure = callable(value) and not isinstance(value, torch.nn.Module)
        return partial(retraced, entries, value) if is_closure else value

    changed = {"closure": watched(kwargs["closure"])} if "closure" in kwargs else {}
    return (*args[:1], *map(watched, args[1:2]), *args[2:]), {**kwargs, **changed}


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    end(optimizer)
    for entry in traces_here():
        cast(Watcher, entry.trace).find_parameters_again()


@contextmanager
def _hooks_of_all() -> Iterator[None]:
    handles = [
        of_all.register_optimizer_step_pre_hook(_before_step),
        of_all.register_optimizer_step_post_hook(_after_step),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


BACKWARD_PASSES = Shared(lambda: replaced(torch.autograd, "_engine_run_backward", _running_untraced))
STEPS = Shared(_hooks_of_all)

_ON_THE_WAY = ("torch", "contextlib", "functools", "lightning_ecopt")
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
#: Modules whose frames call code of others: closures, modules, training steps.
_CALLING = tuple(
    f"lightning_ecopt.{name}"
    for name in ("symmetry.isolation", "symmetry.threads", "symmetry.pending", "symmetry.module_calls", "optim.calls")
)


def in_method_of_optimizer() -> bool:
    """Whether the innermost code that is neither torch's nor ours is a method of an optimizer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, name = frame.f_code, str(frame.f_globals.get("__name__"))
        if name in _CALLING:
            return False
        if code.co_argcount and isinstance(frame.f_locals.get(code.co_varnames[0]), Optimizer):
            return True
        if name.partition(".")[0] not in _ON_THE_WAY and code.co_name not in _COMPREHENSIONS:
            return False
        frame = frame.f_back
    return False
