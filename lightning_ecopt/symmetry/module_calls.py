"""The scaling group of parameters, from the calls of all modules that have any of them.

Like :mod:`~.pending`, it traces calls that a training makes anyway. It needs no module, and it is the way to sharded
parameters, which a real call gathers, so that it cannot be watched: each such call is made with fake tensors first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import (
    Ranks,
    can_be_rescaled,
    gathering_modules,
    is_sharded,
    named_parameters,
    plainly_named,
    release,
    whole_shape,
)
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.isolation import wait_for_calls
from lightning_ecopt.symmetry.ranks import RanksOfShards
from lightning_ecopt.symmetry.threads import is_traced_by
from lightning_ecopt.symmetry.trace import all_fixed, trace_call
from lightning_ecopt.symmetry.trace_mode import TraceMode
from lightning_ecopt.symmetry.traced_calls import Gather, GroupFromCalls, ended

_NO_TASK = -1  # of the autograd engine: no backward pass runs on this thread
#: After so many calls in a row that use no further parameter, :class:`GroupFromModuleCalls` waits no longer.
MOST_CALLS = 16


class GroupFromModuleCalls(GroupFromCalls):
    """The scaling group of parameters, from the outermost calls of modules that have any of them.

    The first closure that is passed to a step is traced as a whole: what it returns, and from what it starts backward
    passes, must not change.

    From the moment it is made it *waits*: each such call with gradients enabled is traced as it happens. What enters
    the call and what it returns must not change; backward passes and optimizer steps, which may come in between, are
    not traced. Each traced call may tell more, so the group is solved for anew when it is asked for next. Once every
    parameter has been seen, or ``MOST_CALLS`` calls in a row use no further one, or after :meth:`cancel`, or when
    nobody holds the object, it waits no longer.

    If a call is one of a :class:`~torch.nn.parallel.DistributedDataParallel` module, its ranks find one group together.

    Where parameters are sharded, a call is traced with fake tensors in their places and in those of its inputs, just
    before it is made. What happens between such calls, as a loss or a penalty, is not seen. A call that is impossible
    with fake tensors holds all fixed, with a warning.

    Args:
        parameters: the parameters that may be rescaled while they require a gradient.
        gather: passed to :class:`GroupFromCalls`.
        module: gives the parameters their names; by default the first module that is called.
        equations: of a call that has been traced already. Then no call is awaited until :meth:`look_again`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        gather: Gather | None = None,
        module: nn.Module | None = None,
        equations: Equations | None = None,
    ) -> None:
        super().__init__(parameters, gather, equations)
        self._own = {id(p): cast(nn.Parameter, p) for p in self._offered if can_be_rescaled(p)}
        self._are_sharded = any(map(is_sharded, self._offered))
        self._gatherers: list[Any] = [] if module is None else gathering_modules(module)
        self._module = module
        self._named: dict[str, nn.Parameter] = {} if module is None else self._names(module)
        self._mode: TraceMode | None = None  # takes down all traced calls; there from the first one on
        self._running: list[nn.Module] = []  # whose traced calls have begun and not ended, on all threads
        self._count = 0  # of calls since one has used another parameter
        self._lock = threading.Lock()  # two threads may make the first call
        self._stop_waiting: Callable[[], object] | None = None
        self._closure: TraceMode | None = None  # traces the first closure, while that runs
        self._outermost: nn.Module | None = None  # the first module that it has called
        self._awaits_closure = True
        if equations is None:
            self.look_again()

    def _names(self, module: nn.Module) -> dict[str, nn.Parameter]:
        release(self._gatherers)
        names = {id(parameter): name for name, parameter in plainly_named(module)}
        numbered = enumerate(self._own.items())
        return {names.get(key, f"parameter {number}"): own for number, (key, own) in numbered}

    def __getstate__(self) -> dict[str, Any]:  # a copy, or what is unpickled, waits for calls of its own parameters
        equations = self.equations()
        left_out: dict[str, Any] = {"_mode": None, "_running": [], "_lock": None, "_stop_waiting": None, "_own": None}
        left_out |= {"_closure": None, "_outermost": None}
        if isinstance(self.gather, RanksOfShards):
            left_out["gather"] = None
        waits = self._stop_waiting is not None
        return {**vars(self), **left_out, "_calls": [equations] if equations else [], "waits": waits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        waits = state.pop("waits")
        vars(self).update(state)
        self._lock = threading.Lock()
        self._own = {id(p): cast(nn.Parameter, p) for p in self._offered if can_be_rescaled(p)}
        if waits:
            self.look_again()

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are traced, by name; none before the first call."""
        return self._named

    def _gathering(self) -> list[Any]:
        return self._gatherers

    def equations(self) -> Equations | None:
        """The equations of all calls; ``None`` if there was none, or if one is running."""
        if self._running:
            return None
        parts = [*self._calls, *([self._mode.equations] if self._mode is not None else [])]
        return self._joined(parts) if len(parts) > 1 else parts[0] if parts else None

    @property
    def _uncalled(self) -> str:
        """What nobody has called."""
        return (
            "no module with the optimizer's parameters has been called since the optimizer was made (under a Trainer, "
            "the EquivalentClassOptimization callback does not depend on that)"
        )

    @property
    def group(self) -> ScalingGroup | None:
        """The group as far as calls have been traced; ``None`` before the first, and during one."""
        group = super().group
        if group is not None and not group.unseen:
            self.cancel()
        return group

    def settle(self) -> ScalingGroup | None:
        """The group of what is trained now, or has been; what ranks that train together have found is joined."""
        if self._are_sharded and self.gather is None and self.parameters:
            process_group = Ranks(self.parameters).process_group
            self.gather = None if process_group is None else RanksOfShards(process_group)
        group = super().settle()
        if group is not None and self.has_ranks:  # ranks that wait longer could wait for each other in different steps
            self.cancel()
        return group

    def agreed(self, units: Tensor) -> Tensor:
        """Units that are marked on one of the ranks that train together."""
        # Ranks that share parameters add up what they judge by, and mark the same units.
        return units if isinstance(self.gather, RanksOfShards) else super().agreed(units)

    def replace(self, equations: Equations | None) -> None:
        """Use these equations in place of those of the calls so far, which a new mode adds to."""
        super().replace(equations)
        self._mode = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next call is to be traced."""
        return self._stop_waiting is not None

    def _adopt(self, equations: Equations) -> bool:
        """Whether equations are those of the same parameters, which may have no names before the first call."""
        own = [whole_shape(p) or (1,) for p in self._own.values()]
        if not self._named and own == list(equations.shapes.values()):
            self._named = dict(zip(equations.shapes, self._own.values(), strict=True))
        return super()._adopt(equations)

    def look_again(self) -> None:
        """Wait for calls."""
        # Only Lightning's DDP has all that it trains, so that its ranks see the same gradients and ask together.
        if self._ranks is not None and self.has_ranks:
            return
        self._count = 0
        if self._stop_waiting is None and not self.is_final:
            self._stop_waiting = wait_for_calls(self, self._own.values())

    def cancel(self) -> None:
        """Wait no longer."""
        if self._stop_waiting is not None:
            self._stop_waiting()
            self._stop_waiting = None

    def wants(self, module: nn.Module) -> bool:
        """Whether a call that begins is outermost, has gradients enabled, and its module any of the parameters."""
        if self._closure is not None and is_traced_by(self._closure):
            self._meet(module)
            return False
        if self._mode is not None and is_traced_by(self._mode):
            return False
        if self._are_sharded and self._running:
            return False
        in_backward = torch._C._current_graph_task_id() != _NO_TASK  # a checkpoint computes again what has been seen
        if in_backward or not torch.is_grad_enabled() or detect_fake_mode() is not None:
            return False
        if self._are_sharded:
            self._know_gatherers(module)
        # Lightning's strategies call a whole training step by the `forward` of what wraps the module: not one call of
        # it, but backward passes and optimizer steps, too.
        redirected = None if self._module is None else vars(self._module).get("forward")
        if getattr(redirected, "__qualname__", "").startswith("_ForwardRedirection."):
            return False
        if self._are_sharded:
            release(gathering_modules(module))  # a call may have left whole parameters in place of the sharded ones
        return any(id(parameter) in self._own for _, parameter in named_parameters(module))

    def _know_gatherers(self, module: nn.Module) -> None:
        known = {id(part) for part in self._gatherers}
        self._gatherers += [part for part in gathering_modules(module) if id(part) not in known]

    def watch(self, closure: Callable[[], Any]) -> Any:
        """Return what a closure returns; the first one is traced as a whole, with the calls of modules in it."""
        if not self._awaits_closure or self.is_final or self._running or detect_fake_mode() is not None:
            return closure()
        if self._are_sharded:  # its calls of modules are traced one by one
            return closure()
        named = self._named or {f"parameter {number}": own for number, own in enumerate(self._own.values())}
        mode = self._closure = TraceMode(self._module or nn.Module(), named)
        self._outermost = self._module
        try:
            with mode.tracing():
                output = closure()
        finally:
            module, self._closure, self._outermost = self._outermost, None, None
        if mode.has_used_parameters:  # perhaps all was computed before
            equations = ended(mode, module or nn.Module(), output, "loss")
            if not self._named:
                self._named = named if module is None else self._names(module)
                equations = equations.renamed(dict(zip(named, self._named, strict=True)))
            self._awaits_closure = False
            self._calls.append(equations)
            self.end_call()
            self.note_trained()
        return output

    def _meet(self, module: nn.Module) -> None:
        """Take names from the first module with any of the parameters that a closure calls."""
        if self._outermost is None and any(id(parameter) in self._own for parameter in module.parameters()):
            self._outermost = module
            assert self._closure is not None
            self._closure.name_modules(module)
            self.note_ranks(module)

    def trace_call(self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``call(*args, **kwargs)``, a call of the module, and trace it."""
        if self.skips(module, (args, kwargs)):
            return call(*args, **kwargs)
        if self._are_sharded:
            return self._trace_fake(module, call, *args, **kwargs)
        mode = self._begin(module)
        self.note_ranks(module)
        mode.add_copies(self.copies())
        mode.register_inputs(tensors_in((args, kwargs), objects=True))
        self.note_trained()
        seen, output = len(mode.equations.seen), None
        self._running.append(module)
        try:
            with mode.tracing():
                output = call(*args, **kwargs)
        finally:  # a call that fails may have left something behind, too
            try:
                ended(mode, module, output, "output", self.followers.of(self.parameters))
            finally:
                self._running.remove(module)
            self._end_call(has_news=len(mode.equations.seen) > seen)
        return output

    def _end_call(self, *, has_news: bool) -> None:
        self.end_call()
        self._count = 0 if has_news else self._count + 1
        if self._count >= MOST_CALLS and not self._running:  # perhaps nobody ever takes a step
            self.cancel()

    def _trace_fake(self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Trace a call with fake tensors, then make it."""
        self._named = self._named or self._names(module)
        self.note_trained()
        try:
            equations = trace_call(module, module, self._named, self.copies(), args, kwargs)
        except Exception as error:
            own = {id(parameter) for _, parameter in named_parameters(module)}
            warn(f"All of {type(module).__name__} is held fixed, so that it trains as it would by itself: {error}")
            equations = all_fixed(self._named, [name for name, p in self._named.items() if id(p) in own])
        before = self.equations()
        self._calls.append(equations)
        self._end_call(has_news=before is None or not equations.seen <= before.seen)
        self._running.append(module)  # what it calls has been seen
        try:
            return call(*args, **kwargs)
        finally:
            self._running.remove(module)

    def _begin(self, module: nn.Module) -> TraceMode:
        """The mode that traces the calls; the first module that is called gives the parameters their names."""
        with self._lock:
            if self._mode is None:
                self._named = self._named or self._names(module)
                self._mode = TraceMode(self._module or module, self._named)
            return self._mode
