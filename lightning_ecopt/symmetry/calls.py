"""Finding the scaling group of parameters whose module nobody has named: from whatever modules use them."""

from __future__ import annotations

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

from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.structure import tensors_in
from lightning_ecopt.symmetry.trace import Pending, check_ranks_agree, group_of, kept
from lightning_ecopt.symmetry.watch import Watch


class WatchedCalls(Pending):
    """The scaling group of parameters, from the outermost calls of modules that have any of them.

    Calls with gradients enabled are watched as they happen, until all parameters have been seen. What enters them and
    what they return must not change; backward passes and steps, which may come in between, are not watched. If one is
    that of a :class:`~torch.nn.parallel.DistributedDataParallel` module, its ranks must have found the same.

    Args:
        parameters: those that may be rescaled; those that require no gradient are left out.
        check: as in :class:`~lightning_ecopt.symmetry.trace.Pending`.
    """

    def __init__(self, parameters: Iterable[Tensor], check: Callable[[ScalingGroup], object] | None = None) -> None:
        super().__init__(check)
        self._own = {id(p): cast(nn.Parameter, p) for p in parameters if p.requires_grad}
        self._watch: Watch | None = None
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
                self._watch = Watch(module, {self._names[k]: p for k, p in self._own.items()})
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
            self._watch.ground(tensors_in(output, objects=True), "output")
            self._watch.ground_new(kept(module), "kept by the module")


_watchers: list[weakref.ref[WatchedCalls]] = []
_handles: list[Any] = []


def _enter(module: nn.Module, inputs: Any) -> None:
    for watcher in _living():
        watcher.enter(module, inputs)


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    for watcher in reversed(_living()):  # modes are left in the opposite order
        watcher.leave(module, output)


def _living() -> list[WatchedCalls]:
    return [watcher for reference in _watchers if (watcher := reference()) is not None]


def _install() -> None:
    """Have hooks of all modules as long as somebody watches."""
    if _watchers and not _handles:
        _handles.append(register_module_forward_pre_hook(_enter))
        _handles.append(register_module_forward_hook(_leave, always_call=True))
    elif not _watchers:
        while _handles:
            _handles.pop().remove()
