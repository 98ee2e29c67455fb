"""Scaling groups that are found in calls that a training makes anyway, traced as they happen.

=============================  =====================================================================================
:class:`GroupFromNextCall`     traces the next call of one method of a module: ``training_step``, or ``forward``
:class:`GroupFromModuleCalls`  knows parameters only, and traces whichever modules are called that have any of them
=============================  =====================================================================================
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.parallel import DistributedDataParallel

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import can_be_rescaled, is_sharded
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.symmetry.deferred import DeferredGroup
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.isolation import is_traced_by, wait_for_calls
from lightning_ecopt.symmetry.trace import group_of, hold_results_fixed, select_parameters
from lightning_ecopt.symmetry.trace_mode import TraceMode

_NO_TASK = -1  # of the autograd engine: no backward pass runs on this thread


class GroupFromNextCall(DeferredGroup):
    """The scaling group of a module, from the next real call of one of its methods, traced as it happens.

    The method is replaced on the instance until it has been called once and has returned something. The call itself
    runs as ever, and the replacement has the signature, the attributes and the pickle of the method. What the method
    returns, and the tensors that it leaves in attributes, must not change.

    Args:
        module: the module, in a Lightning pipeline the ``LightningModule``.
        method: name of the method to trace: ``training_step``, so that the loss is traced too, or ``forward``.
        parameters: the parameters that may be rescaled; by default all that require a gradient.
        check: passed to :class:`DeferredGroup`.

    Raises:
        ValueError: if one of ``parameters`` is not a parameter of ``module``, or any of the module's is sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        parameters: Iterable[Tensor] | None = None,
        check: Callable[[ScalingGroup], object] | None = None,
    ) -> None:
        super().__init__(check)
        self.module = module
        self.method = method
        self.trainable = select_parameters(module, parameters)
        sharded = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
        if sharded:
            raise ValueError(
                f"{type(module).__name__} has sharded parameters, {sharded[0]} first, which a real call gathers, so "
                "that it cannot be watched. Give the LightningModule an example_input_array, so that its forward call "
                "can be traced instead, or use scaling_group(module, inputs)."
            )
        self._group: ScalingGroup | None = None
        self._method: Callable[..., Any] = getattr(module, method)
        self._own = vars(module).get(method)  # an attribute of the instance, if the user has set one
        self._cancelled = False
        vars(module)[method] = _WatchedMethod(self, self._method)

    def __setstate__(self, state: dict[str, Any]) -> None:  # what is unpickled with its module waits for its next call
        vars(self).update(state)
        if self._group is None and not self._cancelled:
            vars(self.module)[self.method] = _WatchedMethod(self, self._method)

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group; ``None`` before the call."""
        return self._group

    @property
    def missing(self) -> str:
        """What has not happened while there is no group."""
        return f"nothing has called {self.method}() of {type(self.module).__name__} since the optimizer was made"

    def cancel(self) -> None:
        """Give the module its method back, at once or when whoever has replaced it since gives it back."""
        self._cancelled = True
        while True:
            current = vars(self.module).get(self.method)
            if not isinstance(current, _WatchedMethod) or not current.pending._cancelled:
                return
            del vars(self.module)[self.method]
            if current.pending._own is not None:
                vars(self.module)[self.method] = current.pending._own

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and trace the call if no group has been found yet."""
        if self._cancelled or detect_fake_mode() is not None:  # a call that computes nothing is no real one
            return self._method(*args, **kwargs)
        mode = TraceMode(self.module, self.trainable)
        with mode.tracing():
            output = self._method(*args, **kwargs)
        if output is not None:  # a training step may skip its batch
            hold_results_fixed(mode, self.module, output, "loss" if self.method == "training_step" else "output")
            self._group = group_of(mode, self.trainable)
            self.cancel()
        return output


class _WatchedMethod:
    """Stands for a method of a module while a :class:`GroupFromNextCall` waits for its next call.

    Lightning, Hugging Face and others read signatures (does ``training_step`` take a ``batch_idx``?), and look through
    one decorator on the way, so everything but the call is the method's own. A pickle holds the method itself; a deep
    copy of the module waits for a call of its own.
    """

    def __init__(self, pending: GroupFromNextCall, method: Callable[..., Any]) -> None:
        self.pending = pending
        self._method = method
        self.__module__, self.__doc__ = method.__module__, method.__doc__  # which the class has, too

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pending.call(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # inspect and torch.jit.script look for the source of methods only
        return type(self._method)

    @property
    def __wrapped__(self) -> Any:
        return getattr(self._method, "__wrapped__", self._method)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    def __getattr__(self, name: str) -> Any:
        if name == "_method":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._method, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._method,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WatchedMethod:
        return _WatchedMethod(copy.deepcopy(self.pending, memo), copy.deepcopy(self._method, memo))


def _itself(value: Any) -> Any:
    return value


class GroupFromModuleCalls(DeferredGroup):
    """The scaling group of parameters, from the outermost calls of modules that have any of them.

    From the moment it is made it *waits*: each such call with gradients enabled is traced as it happens. What enters
    the call and what it returns must not change; backward passes and optimizer steps, which may come in between, are
    not traced. Each traced call may tell more, so the group is solved for anew when it is asked for next. Once every
    parameter has been seen, or after :meth:`cancel`, or when nobody holds the object, it waits no longer.

    If a call is one of a :class:`~torch.nn.parallel.DistributedDataParallel` module, its ranks must find the same.

    Args:
        parameters: the parameters that may be rescaled; any that require no gradient are left out.
        check: passed to :class:`DeferredGroup`.
    """

    def __init__(self, parameters: Iterable[Tensor], check: Callable[[ScalingGroup], object] | None = None) -> None:
        super().__init__(check)
        self._own = {id(p): cast(nn.Parameter, p) for p in parameters if p.requires_grad and can_be_rescaled(p)}
        self._named: dict[str, nn.Parameter] = {}  # the same, once a module gives them names
        self._mode: TraceMode | None = None  # takes down all traced calls; there from the first one on
        self._running: list[nn.Module] = []  # whose traced calls have begun and not ended, on all threads
        self._group: ScalingGroup | None = None  # of all calls that have ended, once somebody has asked
        self._lock = threading.Lock()  # two threads may make the first call
        self._stop_waiting = wait_for_calls(self, self._own.values())

    def __reduce__(self) -> tuple[Any, ...]:  # a copy, or what is unpickled, waits for calls of its own parameters
        return type(self), (list(self._own.values()), self._check)

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group as far as calls have been traced; ``None`` before the first, and during one."""
        if self._mode is None or self._running:
            return None
        if self._group is None:
            self._group = group_of(self._mode, self._named)
            if not self._group.unseen:
                self.cancel()
        return self._group

    @property
    def missing(self) -> str:
        """What has not happened while there is no group."""
        return (
            "no module with the optimizer's parameters has been called since the optimizer was made (under a Trainer, "
            "the EquivalentClassOptimization callback does not depend on that)"
        )

    def cancel(self) -> None:
        """Wait no longer."""
        self._stop_waiting()

    def wants(self, module: nn.Module) -> bool:
        """Whether a call that begins is outermost, has gradients enabled, and its module any of the parameters."""
        if self._mode is not None and is_traced_by(self._mode):
            return False
        in_backward = torch._C._current_graph_task_id() != _NO_TASK  # a checkpoint computes again what has been seen
        if in_backward or not torch.is_grad_enabled() or detect_fake_mode() is not None:
            return False
        return any(id(parameter) in self._own for parameter in module.parameters())

    def trace_call(self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``call(*args, **kwargs)``, a call of the module, and trace it."""
        mode = self._begin(module)
        if isinstance(module, DistributedDataParallel) and self._check is None:
            name = f"first call of {type(module.module).__name__}"
            self._check = partial(check_ranks_agree, call=name, process_group=module.process_group)
        mode.register_inputs(tensors_in((args, kwargs), objects=True))
        output = None
        self._running.append(module)
        try:
            with mode.tracing():
                output = call(*args, **kwargs)
        finally:  # a call that fails may have left something behind, too
            hold_results_fixed(mode, module, output)
            self._group = None
            self._running.remove(module)
        return output

    def _begin(self, module: nn.Module) -> TraceMode:
        """The mode that traces the calls; the first module that is called gives the parameters their names."""
        with self._lock:
            if self._mode is None:
                names = {id(parameter): name for name, parameter in module.named_parameters()}
                numbered = enumerate(self._own.items())
                self._named = {names.get(key, f"parameter {number}"): own for number, (key, own) in numbered}
                self._mode = TraceMode(module, self._named)
            return self._mode


def check_ranks_agree(group: ScalingGroup, call: str, process_group: Any = None) -> None:
    """Raise on all ranks if they have found different groups: each would rescale its weights in its own way.

    Args:
        group: the group that this rank has found.
        call: the call that it was found in, for the message.
        process_group: the ranks; by default all.

    Raises:
        ValueError: if the ranks have found different groups.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size(process_group)
    own = group.fingerprint(), group.num_units, group.unseen
    torch.distributed.all_gather_object(found, own, process_group)
    if len({fingerprint for fingerprint, _, _ in found}) == 1:
        return
    unseen = sorted({name for _, _, names in found for name in names})
    raise ValueError(
        f"The {call} ran other operations on some ranks than on others (freedoms found: "
        f"{', '.join(str(units) for _, units, _ in found)}"
        + (f"; parameters not used by all: {listing(unseen)}" if unseen else "")
        + "), so that their weights would drift apart: give all ranks an example_input_array that takes the same way "
        "through the network."
    )
