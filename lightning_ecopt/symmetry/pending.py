"""The scaling group of a module, found in a call that its training makes anyway, traced as it happens.

It keeps the equations of all calls that it has traced, over all parameters that it was given, frozen ones too. So
another set of trained parameters is solved for without another call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from lightning_ecopt.common.sharding import plainly_named
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.threads import traces_here
from lightning_ecopt.symmetry.trace import select_parameters
from lightning_ecopt.symmetry.trace_mode import TraceMode
from lightning_ecopt.symmetry.traced_calls import Gather, GroupFromCalls, ended

#: Under manual optimization, where one training step may train one part and the next another, no further ones are
#: traced after so many in a row that use no further parameter.
MOST_STEPS = 8


class GroupFromNextCall(GroupFromCalls):
    """The scaling group of a module, from the next real call of one of its methods, traced as it happens.

    The method is replaced on the instance until it has been called once and has returned something, or has begun a
    backward pass. The call itself runs as ever, and the replacement has the signature, the attributes and the pickle of
    the method. What the method returns, from what backward passes in it start, and the tensors that it leaves in
    attributes, must not change. The passes themselves and steps of optimizers are not traced.

    Under manual optimization one training step may train one part of the module, and the next another. So further ones
    are traced until all parameters have been seen, or ``MOST_STEPS`` in a row use no further one.

    Args:
        module: the module, in a Lightning pipeline the ``LightningModule``.
        method: name of the method to trace: ``training_step``, so that the loss is traced too, or ``forward``.
        parameters: the parameters that may be rescaled while they require a gradient; by default all.
        gather: passed to :class:`GroupFromCalls`.
        equations: of example inputs that have been traced already. The group is known then, and the next call may tell
            that it is smaller.

    It is not for sharded parameters, which a real call gathers; see :class:`~.module_calls.GroupFromModuleCalls`.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        parameters: Iterable[Tensor] | None = None,
        gather: Gather | None = None,
        equations: Equations | None = None,
    ) -> None:
        super().__init__(module.parameters() if parameters is None else parameters, gather, equations)
        self.module = module
        self.method = method
        self._parameters = select_parameters(module, self._offered, plainly_named)
        self._waits = False
        self._mode: TraceMode | None = None  # while a call is traced
        self._has_begun = False  # whether the method has been called while that was awaited
        self._count = 0  # of calls since one has used another parameter
        self._stepped: set[str] = set()  # names of parameters whose optimizers have stepped in a call
        self._method: Callable[..., Any] = getattr(module, method)
        self._own = vars(module).get(method)  # an attribute of the instance, if the user has set one
        self.look_again()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # what is unpickled with its module waits for its next call
        vars(self).update(state)
        if self._waits:
            self._replace()

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are traced, by name."""
        return self._parameters

    @property
    def is_waiting(self) -> bool:
        """Whether the next call is to be traced."""
        return self._waits

    @property
    def _uncalled(self) -> str:
        """What nobody has called."""
        return f"nothing has called {self.method}() of {type(self.module).__name__} since the optimizer was made"

    def look_again(self) -> None:
        """Replace the method until its next call."""
        if self._waits or self.is_final:
            return
        self._waits = True
        self._method, self._own = getattr(self.module, self.method), vars(self.module).get(self.method)
        self._replace()

    def _replace(self) -> None:
        vars(self.module)[self.method] = _WatchedMethod(self, self._method, self._own)

    def cancel(self) -> None:
        """Give the module its method back, at once or when whoever has replaced it since gives it back."""
        self._waits, self._count = False, 0
        while True:
            current = vars(self.module).get(self.method)
            if not isinstance(current, _WatchedMethod) or current.pending._waits:
                return
            del vars(self.module)[self.method]
            if current.own is not None:
                vars(self.module)[self.method] = current.own

    def call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and trace the call if one is awaited."""
        if not self._may_trace():
            return method(*args, **kwargs)
        self._has_begun = True
        return (method if self.skips(self.module, (args, kwargs)) else partial(self._traced, method))(*args, **kwargs)

    def watch(self, closure: Callable[[], Any]) -> Any:
        """Return what a closure returns; it is traced as a whole in place of the ``forward`` that it calls."""
        if self.method != "forward" or not self._may_trace() or self.skips(self.module, ()):
            return closure()
        return self._traced(closure)

    def _may_trace(self) -> bool:
        if not self._waits or self._mode is not None or detect_fake_mode() is not None:
            return False  # what computes nothing is not real
        own = set(map(id, self._parameters.values()))
        # There is one trace of a parameter at a time: another optimizer's may go on.
        return not any(id(p) in own for entry in traces_here() for p in entry.trace.traced)

    def _traced(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.note_trained()
        self.note_ranks(self.module)
        mode = self._mode = TraceMode(self.module, self._parameters)
        mode.add_copies(self.copies())
        try:
            with mode.tracing():
                output = call(*args, **kwargs)
        finally:
            self._mode = None
        if output is not None or mode.num_backward_passes:  # a training step may skip its batch
            known = self.equations()
            name = "output" if call is self._method and self.method == "forward" else "loss"
            self._calls.append(ended(mode, self.module, output, name, self.followers.of(self._parameters)))
            self._end_traced(known is not None and mode.equations.seen <= known.seen)
        return output

    def _end_traced(self, is_old: bool) -> None:
        """Wait no longer if a call has told all that it will, or has used no further parameter, several times."""
        self.end_call()
        self.note_trained()
        self._count = self._count + 1 if is_old else 0
        is_manual = self.method == "training_step" and not getattr(self.module, "automatic_optimization", True)
        equations = self.equations()
        # An optimizer that steps in every fifth batch may have a loss of its own, which the first has not shown.
        wanted = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        is_over = not is_manual or self._count >= MOST_STEPS
        self.is_provisional = not is_over and bool(self._stepped) and not self._stepped >= wanted
        if is_over or (equations is not None and equations.seen & self._stepped >= wanted):
            self.cancel()

    def note_step(self, parameters: Iterable[Tensor]) -> bool:
        """Take note of a step; what the call has computed before it is held fixed if the call uses it afterwards."""
        names: set[str] = set()
        if self._mode is not None or len(self._stepped) < len(self.parameters):  # most steps have nothing to add
            own = set(map(id, parameters))
            names = {name for name, parameter in self.parameters.items() if id(parameter) in own}
            self._stepped |= names
        if self._mode is not None:
            self._mode.memory.num_steps += 1
        elif not (self._has_begun and self._calls):
            return False
        if self.is_provisional or self._mode is None:
            return self.is_provisional and self.method == "training_step"
        known = self.equations()
        return known is None or known.seen.isdisjoint(names)


class _WatchedMethod:
    """Stands for a method of a module while a :class:`GroupFromNextCall` waits for its next call.

    Lightning, Hugging Face and others read signatures (does ``training_step`` take a ``batch_idx``?), and look through
    one decorator on the way, so everything but the call is the method's own. A pickle holds the method itself; a deep
    copy of the module waits for a call of its own.
    """

    def __init__(self, pending: GroupFromNextCall, method: Callable[..., Any], own: Any) -> None:
        self.pending = pending
        self.own = own  # the attribute of the instance that it stands for, if there was one
        self._method = method
        self.__module__, self.__doc__ = method.__module__, method.__doc__  # which the class has, too

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pending.call(self._method, *args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # inspect and torch.jit.script look for the source of methods only
        return type(self._method)

    @property
    def __wrapped__(self) -> Any:
        return getattr(self._method, "__wrapped__", self._method)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    @property
    def __func__(self) -> Callable[..., Any]:  # accelerate wraps the function of a method, and binds it to the module
        function = self._method.__func__  # type: ignore[attr-defined]

        @wraps(function)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs) if module is self.pending.module else function(module, *args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        if name == "_method":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._method, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._method,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WatchedMethod:
        pending, method, own = copy.deepcopy((self.pending, self._method, self.own), memo)
        return _WatchedMethod(pending, method, own)


def _itself(value: Any) -> Any:
    return value
