"""Watching a call as ATen operations, and carrying the labels along with the memory that they describe.

Labels belong to storages, not to Python objects: a view, a detached copy or an in-place result that shares the memory
is then found again whatever object stands for it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ecopt.symmetry.labels import (
    GROUND,
    ZERO,
    IntArray,
    ParameterView,
    Value,
    compress,
    constant,
    reshape,
    stretch,
)
from lightning_ecopt.symmetry.rules import RULES, Call
from lightning_ecopt.symmetry.rules.registry import is_inexact
from lightning_ecopt.symmetry.structure import tensors_in
from lightning_ecopt.symmetry.tracer import Operation, Tracer

View = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(eq=False)
class _Storage:
    """The labels of one piece of memory, by the views of it that have been seen.

    The first of them is the whole, as far as is known: others can be found from it.
    """

    reference: StorageWeakRef  # keeps the address from being used again while labels hang on it
    external: bool  # was there before the call, or stays after it
    views: dict[View, Value] = field(default_factory=dict)


class _Memory:
    """Labels of all tensors that the call has touched."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.storages: dict[int, _Storage] = {}

    def _find(self, tensor: Tensor) -> tuple[_Storage, bool] | None:
        """The storage of a tensor and whether it is new; ``None`` for a tensor without one (sparse, opaque)."""
        storage = _storage_of(tensor)
        if storage is None:
            return None
        found = self.storages.get(storage._cdata)
        if found is None:
            found = self.storages[storage._cdata] = _Storage(StorageWeakRef(storage), external=False)
            return found, True
        return found, False

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Register a parameter whose scales are looked for."""
        found = self._find(tensor)
        if found is None or not is_ordinary(tensor) or not tensor.dtype.is_floating_point:
            self.tracer.ground(ParameterView.whole(name, tensor.shape))
            return
        storage, _ = found
        storage.external = True
        storage.views[_view(tensor)] = ParameterView.whole(name, tensor.shape)

    def read(self, tensor: Tensor) -> Value:
        """The label of a tensor. Memory first met as an input is constant and stays after the call."""
        found = self._find(tensor) if is_ordinary(tensor) else None
        if found is None:
            return constant(GROUND, tensor.dim())
        storage, new = found
        view = _view(tensor)
        if new:
            storage.external = True
            storage.views[view] = constant(GROUND, tensor.ndim)
        if view not in storage.views:  # one that nobody saw being made, or that was not there before a change in place
            self._derive(storage, view)
        value = storage.views[view]
        if not isinstance(value, ParameterView):
            value = storage.views[view] = self.tracer.simplify(value)
        return value

    def _derive(self, storage: _Storage, view: View) -> None:
        """Find the label of a view from that of the whole."""
        whole, value = next(iter(storage.views.items()), (view, constant(GROUND, len(view[1]))))
        box = _box(whole, view)
        if isinstance(value, ParameterView) or (box is None and value.size > 1 and not _same_order(whole, view)):
            self._ground_all(storage)
            value = constant(GROUND, len(view[1]))
        elif value.size == 1:
            value = value.reshape((1,) * len(view[1]))
        elif box is None:
            value = reshape(value, whole[1], view[1])
        else:
            value = box.of(value)
        storage.views[view] = value

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether the memory of the tensor has been met."""
        storage = _storage_of(tensor)
        return storage is None or storage._cdata in self.storages

    def is_new(self, tensor: Tensor) -> bool:
        """Whether the call has made the memory of the tensor."""
        storage = _storage_of(tensor)
        found = None if storage is None else self.storages.get(storage._cdata)
        return found is not None and not found.external

    def write(self, tensor: Tensor, value: Value, *, left_out: bool = False) -> None:
        """Set the label of the output of an operation.

        A tensor without elements fits any label. But if it is one because the inputs were, as in an empty batch, others
        will have elements; ``left_out`` says that it is not.
        """
        found = self._find(tensor) if is_ordinary(tensor) else None
        if found is None or not is_inexact(tensor) or (tensor.numel() == 0 and not left_out):
            self.tracer.ground(value)
            value = constant(GROUND, tensor.dim())
        if tensor.numel() == 0:
            value = constant(ZERO, tensor.dim())
        if found is not None:
            value = value if isinstance(value, ParameterView) else compress(value)
            found[0].views[_view(tensor)] = value

    def overwrite(self, tensor: Tensor, value: Value) -> None:
        """Set the label of memory that an operation has changed in place."""
        before = self.read(tensor)
        if not isinstance(before, ParameterView) and not isinstance(value, ParameterView) and (before == value).all():
            return
        found = self._find(tensor)
        if found is not None:
            storage, view = found[0], _view(tensor)
            if not storage.external:
                if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
                    storage.views = {}
                    self.write(tensor, value)
                    return
                whole, base = next(iter(storage.views.items()))
                box = _box(whole, view)
                if box is not None and not isinstance(base, ParameterView) and not isinstance(value, ParameterView):
                    storage.views = {whole: box.put(base, value, whole[1])}  # other views are found from it again
                    return
            self._ground_all(storage)
            storage.views[view] = constant(GROUND, tensor.ndim)
        self.tracer.ground(value)

    def _ground_all(self, storage: _Storage) -> None:
        for view, value in storage.views.items():
            self.tracer.ground(value)
            storage.views[view] = constant(GROUND, len(view[1]))


def _storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _view(tensor: Tensor) -> View:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def is_ordinary(tensor: Tensor) -> bool:
    """Whether the tensor is dense, and of no class that makes something else of the operations."""
    kind = type(tensor)
    plain = issubclass(kind, FakeTensor) or kind.__torch_dispatch__ in _PLAIN
    return plain and tensor.layout is torch.strided and not tensor.is_nested


_PLAIN = (Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl)


@dataclass(frozen=True, eq=False)
class _Box:
    """A view as slices of the whole, and for each axis of the view the axis of the whole that it is."""

    part: tuple[slice, ...]
    axes: tuple[int | None, ...]

    def of(self, ids: IntArray) -> IntArray:
        """The label of the view from that of the whole."""
        taken = ids[tuple(slice(None) if size == 1 else part for size, part in zip(ids.shape, self.part, strict=True))]
        kept = [axis for axis in self.axes if axis is not None]
        taken = taken.transpose(*kept, *(axis for axis in range(ids.ndim) if axis not in kept))
        taken = taken.reshape(taken.shape[: len(kept)])
        return np.expand_dims(taken, tuple(k for k, axis in enumerate(self.axes) if axis is None))

    def put(self, ids: IntArray, new: IntArray, shape: Sequence[int]) -> IntArray:
        """The label of the whole after the view has got a new one."""
        kept = [axis for axis in self.axes if axis is not None]
        new = new.squeeze(tuple(k for k, axis in enumerate(self.axes) if axis is None)).transpose(np.argsort(kept))
        new = np.expand_dims(new, tuple(axis for axis in range(len(shape)) if axis not in kept))
        partial = {axis for axis, part in enumerate(self.part) if part != slice(None)}
        result = np.array(stretch(ids, shape, partial | {axis for axis, size in enumerate(new.shape) if size > 1}))
        result[self.part] = new
        return compress(result)


def _box(whole: View, view: View) -> _Box | None:
    """``view`` as a box of ``whole``, if it is one."""
    offset, shape, strides = whole
    rest = view[0] - offset
    part = [slice(None)] * len(shape)
    starts = {}
    smallest = None
    for axis in sorted((k for k, size in enumerate(shape) if size > 1), key=lambda k: -strides[k]):
        if smallest is not None and strides[axis] * shape[axis] > smallest:
            return None  # axes overlap
        smallest = strides[axis]
        starts[axis], rest = divmod(rest, smallest) if smallest else (0, -1)
        if not 0 <= starts[axis] < shape[axis]:
            return None
    if rest:
        return None
    axes: list[int | None] = []
    for size, stride in zip(view[1], view[2], strict=True):
        if size == 1 or stride == 0:
            axes.append(None)
            continue
        fitting = [
            axis
            for axis, start in starts.items()
            if axis not in axes
            and stride % strides[axis] == 0
            and start + (size - 1) * (stride // strides[axis]) < shape[axis]
        ]
        if not fitting:
            return None
        axis = max(fitting, key=lambda k: strides[k])
        step = stride // strides[axis]
        if (starts[axis], size, step) != (0, shape[axis], 1):
            part[axis] = slice(starts[axis], starts[axis] + (size - 1) * step + 1, step)
        axes.append(axis)
    for axis, start in starts.items():
        if axis not in axes:
            part[axis] = slice(start, start + 1)
    return _Box(tuple(part), tuple(axes))


def _same_order(whole: View, view: View) -> bool:
    """Whether both show the same elements, in the order in which they lie in memory."""
    return (
        whole[0] == view[0] and prod(whole[1]) == prod(view[1]) and all(_is_contiguous(*v[1:]) for v in (whole, view))
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class _Constants:
    """Integers and truth values that the call makes from nothing, so that they are always the same: indices, masks."""

    MOST = 2**16

    def __init__(self) -> None:
        self._known: dict[tuple[int, View], tuple[Tensor, Tensor]] = {}

    def follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> dict[int, IntArray]:
        """Take note of the outputs of an operation; returns the values of its inputs that are known, by ``id``."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(t): self._known[key][1] for t in tensors if (key := _key(t)) in self._known}
        if base_name(func) == "lift_fresh" and not is_inexact(tensors[0]) and not isinstance(tensors[0], FakeTensor):
            known[id(tensors[0])] = tensors[0]  # a literal
        with unset_fake_temporarily():
            if func._schema.is_mutable:
                for tensor in tensors:
                    self.forget(tensor)
            elif len(known) == len(tensors) and torch.Tag.nondeterministic_seeded not in func.tags:
                self._make(func, args, kwargs, output, known)
            return {number: value.numpy() for number, value in known.items()}

    def _make(self, func: Any, args: Any, kwargs: Any, output: Any, known: dict[int, Tensor]) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if any(is_inexact(leaf) or leaf.numel() > self.MOST or not is_ordinary(leaf) for leaf in outputs):
            return

        def value(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return known[id(leaf)] if isinstance(leaf, Tensor) else leaf

        made = tree_leaves(func(*tree_map(value, args), **tree_map(value, kwargs)))
        for leaf, real in zip(outputs, (leaf for leaf in made if isinstance(leaf, Tensor)), strict=True):
            self._known[_key(leaf)] = (leaf, real.clone())

    def forget(self, tensor: Tensor) -> None:
        """The values of a tensor, or of what shares its memory, are no longer known."""
        place = tensor.untyped_storage()._cdata
        for key in [key for key in self._known if key[0] == place]:
            del self._known[key]


def _key(tensor: Tensor) -> tuple[int, View]:
    return tensor.untyped_storage()._cdata, _view(tensor)


class Watch(TorchDispatchMode):
    """While it is entered, every ATen operation is taken down in ``tracer``.

    Args:
        module: gives the names of the modules in which operations run.
        parameters: the tensors whose scales are looked for, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tracer = Tracer({name: tuple(tensor.shape) or (1,) for name, tensor in parameters.items()})
        self.memory = _Memory(self.tracer)
        self.constants = _Constants()
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
            self.tracer.operation = operation
            inputs = {id(tensor): self._read(tensor) for tensor in tensors}
            shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors if not tensor.is_nested}  # some change
        output = func(*args, **kwargs)
        with self._lock, torch._C.DisableTorchFunction():
            self.tracer.operation = operation
            arguments = named_arguments(func, args, kwargs)
            constants = {} if arguments is None or not ordinary else self.constants.follow(func, args, kwargs, output)
            if rule is None or arguments is None or not ordinary:
                self._ground(inputs.values(), (args, kwargs), output, func)
                return output
            try:
                self._apply(rule, Call(self.tracer, arguments, inputs, shapes, output, constants), func)
            except Exception as error:  # a form of the operation that the rule does not know must not stop training
                warnings.warn(f"The rule for {name} failed, so what it touches is held fixed: {error!r}", stacklevel=2)
                self._ground(inputs.values(), (args, kwargs), output, func)
        return output

    def _read(self, tensor: Tensor) -> Value:
        """The label of an input. Of one that nobody saw being made, all that it was made of is held fixed."""
        if not is_ordinary(tensor):
            self.ground([part for part in tensors_in(vars(tensor)) if part is not tensor])
        elif tensor.grad_fn is not None and not self.memory.has_seen(tensor):
            self._ground_origin(tensor)
        return self.memory.read(tensor)

    def _ground_origin(self, tensor: Tensor) -> None:
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
                self.tracer.ground(self.memory.read(own[id(variable)]))
            waiting += [source for source, _ in node.next_functions]

    def _ground(self, inputs: Iterable[Value], arguments: Any, output: Any, func: Any) -> None:
        """An operation without a rule: nothing that it touches may change."""
        for value in inputs:
            self.tracer.ground(value)
        if getattr(getattr(func, "_schema", None), "is_mutable", True):
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, Tensor):
                    self.memory.overwrite(leaf, constant(GROUND, leaf.ndim))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.memory.write(leaf, constant(GROUND, leaf.ndim))

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
            self.tracer.operation = Operation(name, self._path[-1] if self._path else "")
            self.tracer.ground(self._read(tensor))
            if is_ordinary(tensor):
                self.constants.forget(tensor)

    def ground(self, tensors: Iterable[Tensor], name: str | None = None) -> None:
        """Demand that tensors which leave the call stay as they are; ``name`` is for the report."""
        with self._lock, torch._C.DisableTorchFunction():
            if name is not None:
                self.tracer.operation = Operation(name, "")
            for tensor in tensors:
                self.tracer.ground(self._read(tensor))

    def accept(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for constants that the call is given."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                self.memory.read(tensor)

    def ground_all(self, name: str) -> None:
        """Demand that no parameter changes."""
        self.ground(self._parameters, name)

    def ground_new(self, tensors: Iterable[Tensor], name: str) -> None:
        """Likewise, but only those that the call has made."""
        with torch._C.DisableTorchFunction():
            new = [tensor for tensor in tensors if self.memory.is_new(tensor)]
        self.ground(new, name)

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

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.EXITS and args and isinstance(args[0], Tensor):
            if name in ("data_ptr", "__dlpack__") and isinstance(args[0], FakeTensor):
                raise RuntimeError("A fake tensor has no memory.")  # the module is called with real ones then
            self.watch.leaves(name, args[0])
        return func(*args, **(kwargs or {}))


def base_name(func: Any) -> str:
    """``aten.relu_.default`` is relu: in-place forms share the rule of the operation."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func)
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return str(schema.name)
    in_place = name.endswith("_") and not name.endswith("__") and schema.is_mutable
    return name[:-1] if in_place else name


def named_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments by the names of the schema; ``None`` if there is none."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    named = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def written_to(func: Any) -> list[str | None]:
    """For each output the name of the argument that the operation writes it to."""
    names = {
        alias: argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
        for alias in argument.alias_info.before_set
    }
    aliases = [value.alias_info.before_set if value.alias_info else () for value in func._schema.returns]
    return [next((names[alias] for alias in output if alias in names), None) for output in aliases]
