"""Finding the scaling group of parameters whose module nobody has named: from whatever modules use them."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.trace import group_of, kept, select_parameters
from lightning_ecopt.symmetry.trace_mode import TraceMode


class DeferredGroup:
    """A scaling group that is found while training has begun.

    Args:
        check: called by :meth:`settle` with the group; what it raises goes to whoever wants to use the group.
    """

    group: ScalingGroup | None
    missing: str  # what has not happened while there is no group

    def __init__(self, check: Callable[[ScalingGroup], object] | None = None) -> None:
        self._check = check
        self._checked: ScalingGroup | None = None

    def cancel(self) -> None:
        """Stop watching."""

    def settle(self) -> ScalingGroup | None:
        """The group, to be used from now on, if there is one."""
        group = self.group
        if group is not None and group is not self._checked and self._check is not None:
            self._check(group)
        self._checked = group
        return group


class KnownGroup(DeferredGroup):
    """A scaling group that is known already."""

    missing = ""

    def __init__(self, group: ScalingGroup) -> None:
        super().__init__()
        self.group = group


class GroupFromModuleCalls(DeferredGroup):
    """The scaling group of parameters, from the outermost calls of modules that have any of them.

    Calls with gradients enabled are watched as they happen, until all parameters have been seen. What enters them and
    what they return must not change; backward passes and steps, which may come in between, are not watched. If one is
    that of a :class:`~torch.nn.parallel.DistributedDataParallel` module, its ranks must have found the same.

    Args:
        parameters: those that may be rescaled; those that require no gradient are left out.
        check: as in :class:`~lightning_ecopt.symmetry.trace.DeferredGroup`.
    """

    def __init__(self, parameters: Iterable[Tensor], check: Callable[[ScalingGroup], object] | None = None) -> None:
        super().__init__(check)
        self._own = {id(p): cast(nn.Parameter, p) for p in parameters if p.requires_grad}
        self._watch: TraceMode | None = None
        self._names: dict[int, str] = {}
        self._depth = 0
        self._calls = 0
        self._found: tuple[int, ScalingGroup] | None = None  # after so many calls
        self._context: AbstractContextManager[None] | None = None
        _watchers.append(weakref.ref(self))
        _install()

    @property
    def group(self) -> ScalingGroup | None:  # type: ignore[override]
        """The scaling group as far as calls have been seen; ``None`` if there was none."""
        if self._watch is None or self._depth > 0:
            return None
        if self._found is None or self._found[0] < self._calls:
            group = group_of(self._watch, {self._names[k]: p for k, p in self._own.items()})
            self._found = self._calls, group
            if not group.unseen:
                self.cancel()
        return self._found[1]

    @property
    def missing(self) -> str:  # type: ignore[override]
        """What has not happened while there is no group."""
        return (
            "no module with the optimizer's parameters has been called since the optimizer was made (under a Trainer, "
            "the EquivalentClassOptimization callback does not depend on that)"
        )

    def cancel(self) -> None:
        """Stop watching."""
        _watchers[:] = [other for other in _watchers if other() not in (None, self)]
        _install()

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """A module is called."""
        if self._depth == 0:
            in_backward = torch._C._current_graph_task_id() != -1  # a checkpoint computes again what has been seen
            if in_backward or not torch.is_grad_enabled() or detect_fake_mode() is not None:
                return
            names = {id(p): name for name, p in module.named_parameters()}
            if self._own.keys().isdisjoint(names):
                return
            if self._watch is None:
                self._names = {k: names.get(k, f"parameter {number}") for number, k in enumerate(self._own)}
                self._watch = TraceMode(module, {self._names[k]: p for k, p in self._own.items()})
            if isinstance(module, DistributedDataParallel) and self._check is None:
                call = f"first call of {type(module.module).__name__}"
                self._check = partial(check_ranks_agree, call=call, process_group=module.process_group)
            self._watch.accept(tensors_in(inputs, objects=True))
            self._context = self._watch.recording()
            self._context.__enter__()
        assert self._watch is not None
        self._watch.enter_module(module)
        self._depth += 1

    def leave(self, module: nn.Module, output: Any) -> None:
        """It has returned, or raised."""
        if self._depth == 0:
            return
        assert self._watch is not None
        assert self._context is not None
        self._watch.leave_module(module)
        self._depth -= 1
        if self._depth == 0:
            self._context.__exit__(None, None, None)
            self._context = None
            self._calls += 1
            self._watch.hold_fixed(tensors_in(output, objects=True), "output")
            self._watch.hold_new_fixed(kept(module), "kept by the module")


_watchers: list[weakref.ref[GroupFromModuleCalls]] = []
_handles: list[Any] = []


def _enter(module: nn.Module, inputs: Any) -> None:
    for watcher in _living():
        watcher.enter(module, inputs)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    for watcher in reversed(_living()):  # modes are left in the opposite order
        watcher.leave(module, output)


def _living() -> list[GroupFromModuleCalls]:
    return [watcher for reference in _watchers if (watcher := reference()) is not None]


def _install() -> None:
    """Have hooks of all modules as long as somebody watches."""
    if _watchers and not _handles:
        _handles.append(register_module_forward_pre_hook(_enter))
        _handles.append(register_module_forward_hook(_leave, always_call=True))
    elif not _watchers:
        while _handles:
            _handles.pop().remove()


def check_ranks_agree(group: ScalingGroup, call: str, process_group: Any = None) -> None:
    """Raise on all ranks if they have found different groups: each would rescale its weights in its own way.

    Args:
        group: that of this rank.
        call: where it was found, for the message.
        process_group: the ranks; by default all.

    Raises:
        ValueError: if they differ.
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


class GroupFromNextCall(DeferredGroup):
    """The scaling group of a module that is found from its next real call, as it happens.

    The method is replaced on the instance until it has been called once and has returned something; the call itself
    runs as ever, and what stands there has the signature, the attributes and the pickle of the method. What the method
    returns, and the tensors that it leaves in attributes, must not change.

    Args:
        module: the module, in a Lightning pipeline the ``LightningModule``.
        method: name of the method to watch: ``training_step``, so that the loss is watched too, or ``forward``.
        parameters: as in :func:`scaling_group`.
        check: as in :class:`DeferredGroup`.
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
        self.group: ScalingGroup | None = None
        self._method: Callable[..., Any] = getattr(module, method)
        self._own = vars(module).get(method)  # an attribute of the instance, if the user has set one
        self._cancelled = False
        vars(module)[method] = _WatchedMethod(self, self._method)

    @property
    def missing(self) -> str:  # type: ignore[override]
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
        """Call the method, and watch it if no group has been found yet."""
        if self._cancelled or detect_fake_mode() is not None:  # a call that computes nothing is no real one
            return self._method(*args, **kwargs)
        watch = TraceMode(self.module, self.trainable)
        with watch.watching():
            output = self._method(*args, **kwargs)
        if output is not None:  # a training step may skip its batch
            name = "loss" if self.method == "training_step" else "output"
            watch.hold_fixed(tensors_in(output, objects=True), name)
            watch.hold_new_fixed(kept(self.module), "kept by the module")
            self.group = group_of(watch, self.trainable)
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
        pending = copy.deepcopy(self.pending, memo)
        return _WatchedMethod(pending, pending._method)


def _itself(value: Any) -> Any:
    return value
