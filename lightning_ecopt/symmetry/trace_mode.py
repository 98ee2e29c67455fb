"""Watching a call as ATen operations, and carrying the labels along with the memory that they describe.

Labels belong to storages, not to Python objects: a view, a detached copy or an in-place result that shares the memory
is then found again whatever object stands for it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.symmetry.aten import base_name, named_arguments, written_to
from lightning_ecopt.symmetry.constants import Constants
from lightning_ecopt.symmetry.equations import Equations, Operation
from lightning_ecopt.symmetry.labels import (
    FIXED,
    Value,
    constant,
)
from lightning_ecopt.symmetry.memory import Memory, is_ordinary
from lightning_ecopt.symmetry.rules import RULES, Call


class TraceMode(TorchDispatchMode):
    """While it is entered, every ATen operation is taken down in ``equations``.

    Args:
        module: gives the names of the modules in which operations run.
        parameters: the tensors whose scales are looked for, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.equations = Equations({name: tuple(tensor.shape) or (1,) for name, tensor in parameters.items()})
        self.memory = Memory(self.equations)
        self.constants = Constants()
        self._names = {id(part): name for name, part in module.named_modules()}
        self._path: list[str] = []
        self.is_fake = any(isinstance(tensor, FakeTensor) for tensor in parameters.values())
        self._lock = threading.RLock()  # the call may have threads of its own
        self._parameters = list(parameters.values())
        with torch._C.DisableTorchFunction():  # another watch may be looking
            for name, tensor in parameters.items():
                self.memory.add_parameter(name, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        if name.startswith("prim::"):  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ordinary = all(map(is_ordinary, tensors))
        rule = RULES.get(name)
        if rule is None and ordinary and isinstance(func, torch._ops.OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if name == "lift_fresh" and self.is_fake and not tensors[0].untyped_storage().resizable():
            raise RuntimeError("A fake tensor shares no memory with NumPy.")  # the module is called with real ones then
        operation = Operation(name, self._path[-1] if self._path else "")
        with self._lock, torch._C.DisableTorchFunction():
            self.equations.operation = operation
            inputs = {id(tensor): self._read(tensor) for tensor in tensors}
            shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors if not tensor.is_nested}  # some change
        output = func(*args, **kwargs)
        with self._lock, torch._C.DisableTorchFunction():
            self.equations.operation = operation
            arguments = named_arguments(func, args, kwargs)
            constants = {} if arguments is None or not ordinary else self.constants.follow(func, args, kwargs, output)
            if rule is None or arguments is None or not ordinary:
                self._hold_fixed(inputs.values(), (args, kwargs), output, func)
                return output
            try:
                self._apply(rule, Call(self.equations, arguments, inputs, shapes, output, constants), func)
            except Exception as error:  # a form of the operation that the rule does not know must not stop training
                warnings.warn(f"The rule for {name} failed, so what it touches is held fixed: {error!r}", stacklevel=2)
                self._hold_fixed(inputs.values(), (args, kwargs), output, func)
        return output

    def _read(self, tensor: Tensor) -> Value:
        """The label of an input. Of one that nobody saw being made, all that it was made of is held fixed."""
        if not is_ordinary(tensor):
            self.hold_fixed([part for part in tensors_in(vars(tensor)) if part is not tensor])
        elif tensor.grad_fn is not None and not self.memory.has_seen(tensor):
            self._fix_origin(tensor)
        return self.memory.read(tensor)

    def _fix_origin(self, tensor: Tensor) -> None:
        """Hold fixed the parameters that a tensor was computed from, on another thread for instance."""
        own = {id(parameter): parameter for parameter in self._parameters}
        waiting, seen = [tensor.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if id(variable) in own:
                self.equations.hold_fixed(self.memory.read(own[id(variable)]))
            waiting += [source for source, _ in node.next_functions]

    def _hold_fixed(self, inputs: Iterable[Value], arguments: Any, output: Any, func: Any) -> None:
        """An operation without a rule: nothing that it touches may change."""
        for value in inputs:
            self.equations.hold_fixed(value)
        if getattr(getattr(func, "_schema", None), "is_mutable", True):
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, Tensor):
                    self.memory.overwrite(leaf, constant(FIXED, leaf.ndim))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.memory.write(leaf, constant(FIXED, leaf.ndim))

    def _apply(self, rule: Callable[[Call], Any], call: Call, func: Any) -> None:
        values = rule(call)
        outputs = call.output if isinstance(call.output, list | tuple) else [call.output]
        values = values if isinstance(values, list | tuple) else [values]
        written = written_to(func)
        if torch.Tag.inplace_view in func.tags or len(written) != len(outputs):  # a list of views is one output
            written = [None] * len(outputs)
        left_out = all(prod(shape) for shape in call.shapes.values())
        for tensor, value, name in zip(outputs, values, written, strict=True):
            if not isinstance(tensor, Tensor) or value is None:
                continue
            target = call.arguments[name] if name is not None else None
            if target is not None:
                self.memory.overwrite(target, value)
            if tensor is not target:
                self.memory.write(tensor, value, left_out=left_out)

    def leaves(self, name: str, tensor: Tensor) -> None:
        """Take down that a tensor's values leave torch in the module that is running."""
        with self._lock, torch._C.DisableTorchFunction():  # another watch may be looking
            self.equations.operation = Operation(name, self._path[-1] if self._path else "")
            self.equations.hold_fixed(self._read(tensor))
            if is_ordinary(tensor):
                self.constants.forget(tensor)

    def hold_fixed(self, tensors: Iterable[Tensor], name: str | None = None) -> None:
        """Demand that tensors which leave the call stay as they are; ``name`` is for the report."""
        with self._lock, torch._C.DisableTorchFunction():
            if name is not None:
                self.equations.operation = Operation(name, "")
            for tensor in tensors:
                self.equations.hold_fixed(self._read(tensor))

    def accept(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for constants that the call is given."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                self.memory.read(tensor)

    def hold_all_fixed(self, name: str) -> None:
        """Demand that no parameter changes."""
        self.hold_fixed(self._parameters, name)

    def hold_new_fixed(self, tensors: Iterable[Tensor], name: str) -> None:
        """Likewise, but only those that the call has made."""
        with torch._C.DisableTorchFunction():
            new = [tensor for tensor in tensors if self.memory.is_new(tensor)]
        self.hold_fixed(new, name)

    def enter_module(self, module: nn.Module, inputs: Any = None) -> None:
        """A module begins to run."""
        self._path.append(self._names.get(id(module), type(module).__name__))

    def leave_module(self, module: nn.Module, inputs: Any = None, output: Any = None) -> None:
        """It ends."""
        self._path.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Enter the mode, and follow which module is running."""
        handles = [
            register_module_forward_pre_hook(self.enter_module),
            register_module_forward_hook(self.leave_module, always_call=True),
        ]
        try:
            with self.recording():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Enter the mode."""
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer, for inference only
        try:
            with torch.compiler.set_stance("force_eager"), self._threads_watched(), _Escapes(self), self:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)

    @contextmanager
    def _threads_watched(self) -> Iterator[None]:
        """Enter the mode on threads too that the call starts."""
        start, own = threading.Thread.start, threading.get_ident()

        def watched(run: Callable[[], None]) -> None:
            with _Escapes(self), self:
                run()

        def noticed(thread: threading.Thread) -> None:
            if threading.get_ident() == own:
                if self.is_fake:
                    raise RuntimeError("Threads cannot share fake tensors.")  # the module is called with real ones then
                thread.run = partial(watched, thread.run)  # type: ignore[method-assign]
            start(thread)

        threading.Thread.start = noticed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            threading.Thread.start = start  # type: ignore[method-assign]


class _Escapes(TorchFunctionMode):
    """Grounds tensors whose values leave torch, where no operation shows what becomes of them."""

    EXITS = frozenset(
        {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "__reduce_ex__", "storage", "untyped_storage"}
    )

    def __init__(self, watch: TraceMode) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.EXITS and args and isinstance(args[0], Tensor):
            if name in ("data_ptr", "__dlpack__") and isinstance(args[0], FakeTensor):
                raise RuntimeError("A fake tensor has no memory.")  # the module is called with real ones then
            self.watch.leaves(name, args[0])
        return func(*args, **(kwargs or {}))
