"""What a trace changes in the process and in the module, and how all of it is put back.

========================================================  =======  =======================================
what is changed                                           where    by whom, and put back by
========================================================  =======  =======================================
dispatch modes and function modes                         thread   every trace, :func:`traced`
fast path of attention, ``torch.backends.mha``            process  every trace, :func:`traced`
stance of ``torch.compile``: eager                        process  every trace, :func:`traced`
``threading.Thread.start``                                process  every trace, :func:`traced`
``torch.nn.Module.__call__``                              process  every trace, :func:`traced`, and while
                                                                   anyone waits, :func:`wait_for_calls`
the call of autograd's engine; hooks of all optimizers    process  every trace, :mod:`.left_out`
cuDNN: off                                                process  fake traces, :func:`fake_tensors`
where ``torch.tensor`` makes its tensors                  process  fake traces, :func:`fake_tensors`
log of torch of errors in fake tensors: none              thread   fake traces, :func:`fake_tensors`
the mode of fake tensors, gradients: on                   thread   fake traces, :func:`fake_tensors`
random numbers of Python, NumPy and torch                 process  all but awaited calls, :func:`attributes_kept`
attributes of the module; lists, dictionaries, arrays     module   all but awaited calls, :func:`attributes_kept`
and generators in them; hooks by which FSDP gathers
values of parameters, gradients and buffers               module   real traces, :func:`values_kept`
values and contents of the inputs                         inputs   all but awaited calls, :func:`inputs_kept`
========================================================  =======  =======================================

A *fake* trace calls the module with fake tensors, a *real* trace with its own. An *awaited call* is one that the user
makes, and what that changes is meant to stay.

All of it is put back whatever ends the call, ``KeyboardInterrupt`` included, but for one that arrives while a change
is made or undone. What belongs to the process is :class:`~lightning_ecopt.common.shared.Shared`, as several threads may
trace at once. Replaced methods do nothing on threads that no trace is on.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch._dynamo  # remembers Module.__call__ when it is imported, which must not be while that is replaced
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_ecopt.common.nested import CONTAINERS, contents, dictionary, elements, is_a, put_back, walk
from lightning_ecopt.common.shared import Shared
from lightning_ecopt.symmetry.threads import Entry, Trace, here, on_this_thread, retraced

# Changes that threads share -------------------------------------------------------------------------------------------


@contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def replaced(owner: Any, name: str, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a method or function by ``replace(it)``. Whoever has replaced that since keeps what is theirs."""
    original = getattr(owner, name)
    replacement = replace(original)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if getattr(owner, name) is replacement:
            setattr(owner, name, original)


@contextmanager
def _random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.is_initialized()
    waiting = vars(torch.cuda._lazy_seed_tracker)  # seeds for GPUs that are not in use yet
    seeds = {name: copy.copy(value) for name, value in waiting.items()}
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpus else ()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            waiting.update(seeds)


def _lifting() -> AbstractContextManager[None]:
    # Fake modes set this where there is no GPU, and each puts back what it has found, another one's setting perhaps.
    read, write = torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors
    return _set(read, write, read() or not torch.cuda.is_available())


def _is_wanted(record: logging.LogRecord) -> bool:
    # Torch logs the traceback of an error in an operation on fake tensors; the real call that follows raises it again.
    return record.levelno < logging.ERROR or not any(entry.trace.is_fake for entry in here.entries)


UNCOMPILED = Shared(lambda: torch.compiler.set_stance("force_eager"))
# The fast path of attention is one operation for a whole layer, for inference only.
_MHA = torch.backends.mha
_SLOW_ATTENTION = Shared(lambda: _set(_MHA.get_fastpath_enabled, _MHA.set_fastpath_enabled, False))
# cuDNN runs a recurrent network as one operation.
_NO_CUDNN = Shared(lambda: _set(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False))
_LIFTING = Shared(_lifting)
_LOG = logging.getLogger(torch._subclasses.fake_tensor.__name__)
_QUIET = Shared(lambda: _set(lambda: False, lambda on: (_LOG.addFilter if on else _LOG.removeFilter)(_is_wanted), True))
_RANDOMNESS = Shared(_random_numbers)
_THREAD_STARTS = Shared(lambda: replaced(threading.Thread, "start", _starting_traced))
_MODULE_CALLS = Shared(lambda: replaced(nn.Module, "__call__", _calling_traced))


# Traces, on the threads that they concern -----------------------------------------------------------------------------


@contextmanager
def traced(trace: Trace) -> Iterator[None]:
    """Trace what the current thread does, and the threads that it starts meanwhile."""
    with UNCOMPILED(), _SLOW_ATTENTION(), _THREAD_STARTS(), _MODULE_CALLS(), on_this_thread(trace):
        yield


def _starting_traced(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Make ``Thread.start`` hand the traces of the thread that calls it on to the one that it starts."""

    @functools.wraps(start)
    def start_traced(thread: threading.Thread) -> None:
        handed_on = [Entry(entry.trace, entry.modules[-1:]) for entry in here.entries]
        if any(entry.trace.is_fake for entry in handed_on):
            raise RuntimeError("Threads cannot share fake tensors.")  # the module is called with real ones then
        if handed_on:
            thread.run = partial(retraced, handed_on, thread.run)  # type: ignore[method-assign]
        start(thread)

    return start_traced


# Calls of modules -----------------------------------------------------------------------------------------------------


class Waiter(Protocol):
    """What waits for calls of modules; a :class:`~.module_calls.GroupFromModuleCalls`."""

    def wants(self, module: nn.Module) -> bool:
        """Whether to trace this call, which is about to begin on the current thread."""

    def trace_call(self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``call(*args, **kwargs)``, a call of the module, and trace it."""


_numbers = itertools.count()
_waiting: dict[int, weakref.ref[Waiter]] = {}  # in the order in which they began to wait
_awaited: dict[int, frozenset[int]] = {}  # for each of them the ``id`` of its parameters


def wait_for_calls(waiting: Waiter, parameters: Collection[Tensor]) -> Callable[[], object]:
    """Hand calls of all modules to ``waiting``, until the returned function is called or nobody holds ``waiting``.

    Module hooks would not do: torch calls none after a ``KeyboardInterrupt``, so that what a hook has entered before a
    call would never be left. ``Module.__call__`` is replaced instead.

    A compiled module is handed over as a whole, and runs uncompiled if it is traced. Compiled functions break their
    graph at a module with any of the ``parameters``, because what is in a graph cannot be traced; all others are
    compiled as ever.
    """
    number = next(_numbers)
    _MODULE_CALLS.enter()
    _waiting[number] = weakref.ref(waiting)
    _awaited[number] = frozenset(map(id, parameters))
    stop = weakref.finalize(waiting, _stop_waiting, number)
    stop.atexit = False
    return stop


def _stop_waiting(number: int) -> None:
    del _waiting[number], _awaited[number]
    _MODULE_CALLS.leave()


def _calling_traced(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``Module.__call__`` tell traces which module runs, and hand the call to those who wait."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call_traced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Callable[..., Any] = partial(_run_module, original, module)
        for waiting in [reference() for reference in reversed(list(_waiting.values()))]:  # the first one is outermost
            if waiting is not None and waiting.wants(module):
                call = partial(waiting.trace_call, module, call)
        return call(*args, **kwargs)

    @functools.wraps(original)
    def __call__(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if torch.compiler.is_compiling() and not _is_awaited(self):
            return original(self, *args, **kwargs)
        return call_traced(self, args, kwargs)

    return __call__


def _is_awaited(module: nn.Module) -> bool:
    """Whether somebody waits for one of the module's parameters; in words that torch.compile understands."""
    return any(id(parameter) in own for parameter in module.parameters() for own in _awaited.values())


def _run_module(original: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    entries = list(here.entries)
    for entry in entries:
        entry.modules.append(module)
    try:
        return original(module, *args, **kwargs)
    finally:
        for entry in entries:
            entry.modules.pop()


# Fake tensors ---------------------------------------------------------------------------------------------------------


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Compute shapes only, no values, on this thread."""
    with _NO_CUDNN(), _LIFTING(), _QUIET(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        try:
            yield mode
        finally:  # weak references would keep module.to from swapping sharded parameters, until they are collected
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


# What the module and the inputs hold ----------------------------------------------------------------------------------


@contextmanager
def attributes_kept(module: nn.Module, replaced: Mapping[int, Tensor]) -> Iterator[None]:
    """Put back the attributes of a module and its submodules, the contents of containers in them, and randomness.

    Args:
        module: the module; its parameters and buffers are among the attributes.
        replaced: tensors that stand for others in the meantime, by ``id`` of the others.
    """
    held = _held(module)
    containers = [item for item in held if is_a(item, CONTAINERS)]
    with _RANDOMNESS(), _generators_kept(held), _arrays_kept(held), _contents_kept(containers):
        for container in containers:
            if is_a(container, (list, dict)):
                for key, value in elements(container) if is_a(container, dict) else list(enumerate(container)):
                    if id(value) in replaced:
                        container[key] = replaced[id(value)]
        yield


@contextmanager
def _contents_kept(containers: list[Any]) -> Iterator[None]:
    before = [(container, elements(container)) for container in containers]
    try:
        yield
    finally:
        for container, content in before:
            put_back(container, content)


_KINDS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


def _held(module: nn.Module) -> list[Any]:
    """Find the containers, arrays, generators and tensors in the attributes of a module and its submodules."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(part) for part in module.modules()]
    while waiting:
        item = waiting.pop()
        if id(item) in found:
            continue
        if type(item) in _KINDS:
            found[id(item)] = item
            waiting.extend(contents(item))
        elif is_a(item, types.SimpleNamespace | UserDict | UserList):
            waiting.append(dictionary(item))
        elif is_a(item, np.ndarray | np.random.Generator | torch.Generator | Tensor):
            found[id(item)] = item
    return list(found.values())


@contextmanager
def _arrays_kept(held: list[Any]) -> Iterator[None]:
    before = [(array, np.ndarray.copy(array)) for array in held if is_a(array, np.ndarray) and array.flags.writeable]
    try:
        yield
    finally:
        for array, values in before:
            if array.flags.writeable:
                array[...] = values


@contextmanager
def _generators_kept(held: list[Any]) -> Iterator[None]:
    torchs = [(item, item.get_state()) for item in held if is_a(item, torch.Generator)]
    numpys = [(item, item.bit_generator.state) for item in held if is_a(item, np.random.Generator)]
    try:
        yield
    finally:
        for generator, state in torchs:
            generator.set_state(state)
        for other, values in numpys:
            other.bit_generator.state = values


@contextmanager
def inputs_kept(inputs: Any) -> Iterator[None]:
    """Put back what the inputs of a call hold: values of tensors, contents of containers, attributes of objects."""
    parts: list[Any] = [part for item in walk(inputs, objects=True) for part in (item, dictionary(item))]
    containers = [part for part in parts if is_a(part, CONTAINERS)]
    with _contents_kept(containers), _tensors_kept([part for part in parts if is_a(part, Tensor)]):
        yield


@contextmanager
def values_kept(module: nn.Module) -> Iterator[None]:
    """Put back the values of parameters, gradients, buffers and attributes of a module, and randomness."""
    tensors = [item for item in _held(module) if is_a(item, Tensor)]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    gradients = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    with attributes_kept(module, {}), _tensors_kept(tensors):
        try:
            yield
        finally:
            for parameter, required, gradient in gradients:
                parameter.requires_grad_(required)
                parameter.grad = gradient


@contextmanager
def _tensors_kept(tensors: list[Tensor]) -> Iterator[None]:
    before = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                if tensor.layout is not torch.strided or tensor.is_nested or not torch.equal(tensor, values):
                    tensor.copy_(values)
