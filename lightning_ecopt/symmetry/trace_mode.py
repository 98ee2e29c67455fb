"""The mode that takes down the operations of a call: a label for every tensor, and equations between the labels.

PyTorch hands each ATen operation of the call to :meth:`TraceMode.__torch_dispatch__` before it runs it. For::

    h = linear(x, weight)  # label of x: FIXED
    y = relu(h)

the rule for ``linear`` gives ``h`` one new scale per channel, and notes that ``weight`` scales by label(h) / label(x);
the rule for ``relu`` gives ``y`` the label of ``h``. An operation without a rule is replaced by its parts, or, if torch
knows none, has all its inputs and outputs held fixed. Labels belong to memory, not to Python objects: a view, a
detached copy or the result of an in-place operation is found again whatever object stands for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.aten import base_name, named_arguments, written_to
from lightning_ecopt.symmetry.constants import Constants
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.isolation import running_module, traced
from lightning_ecopt.symmetry.labels import FIXED, ZERO, Cases, ParameterView, Product, Value, constant
from lightning_ecopt.symmetry.memory import Memory, is_ordinary
from lightning_ecopt.symmetry.rules import RULES, Call
from lightning_ecopt.symmetry.rules.cases import by_case
from lightning_ecopt.symmetry.rules.registry import Rule
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.stand_ins import STAND_INS


class TraceMode(TorchDispatchMode):
    """Takes down in ``equations`` what every ATen operation says about the scales of its tensors.

    Args:
        module: gives the names of the modules in which operations run.
        parameters: the tensors whose scales are looked for, by name.

    Example::

        mode = TraceMode(module, dict(module.named_parameters()))
        with mode.tracing():
            output = module(x)
        mode.hold_fixed([output], "output")
        solution = solve(mode.equations)
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.equations = Equations({name: tuple(tensor.shape) or (1,) for name, tensor in parameters.items()})
        self.memory = Memory(self.equations)
        self.constants = Constants()
        self.has_failed = False
        self.is_fake = any(isinstance(tensor, FakeTensor) for tensor in parameters.values())
        self._names = {id(part): name for name, part in module.named_modules()}
        self._parameters = list(parameters.values())
        self._lock = threading.RLock()  # the call may have threads of its own
        with torch._C.DisableTorchFunction():
            for name, tensor in parameters.items():
                self.memory.add_parameter(name, tensor)

    def tracing(self) -> AbstractContextManager[None]:
        """Take down what the current thread does, and the threads that it starts meanwhile."""
        return traced(self)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Take down what the current thread does; :func:`~.isolation.traced` enters it on each thread."""
        with _Escapes(self), self:
            yield

    # One operation ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and any(issubclass(kind, NestedTensor) for kind in types):
            return NotImplemented  # a jagged tensor says what it does as operations on the tensor of its values
        kwargs = kwargs or {}
        name = base_name(func)
        if name.startswith("prim::"):  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        are_plain = all(map(is_ordinary, tensors))  # labels belong to memory, which others may not have

        # 1. Find the rule. An operation that has none is replaced by its parts, if torch can name them.
        rule = RULES.get(name)
        if name in STAND_INS:
            rule = partial(self._labels_of_stand_in, STAND_INS[name], func, args, kwargs)
        if rule is None and are_plain and isinstance(func, torch._ops.OpOverload):
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if name == "lift_fresh" and self.is_fake and not tensors[0].untyped_storage().resizable():
            # The module may read the values through NumPy later, which a fake tensor cannot show. After this error
            # `scaling_group` calls the module with real tensors.
            raise RuntimeError("A fake tensor shares no memory with NumPy.")

        # 2. Read the labels and shapes of the inputs, which the operation may change.
        operation = self._operation(name)
        labels: dict[int, Value | Cases] = {}
        with self._taking_down(operation):
            labels = {id(tensor): self._read(tensor) for tensor in tensors}
            shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors if not tensor.is_nested}

        # 3. Run the operation.
        output = func(*args, **kwargs)

        # 4. Ask the rule for the labels of the outputs, or hold all that was touched fixed.
        with self._taking_down(operation):
            if self.has_failed:  # perhaps above
                return output
            arguments = named_arguments(func, args, kwargs)
            if are_plain and arguments is not None:
                constants = self.constants.follow(func, args, kwargs, output)  # of operations without a rule, too
                call = Call(self.equations, arguments, labels, shapes, output, constants, self.constants.name)
                if rule is not None and self._apply(rule, func, call):
                    return output
            else:
                for tensor in filter(is_ordinary, tensors):  # it may have been written to
                    self.constants.forget(tensor)
            self._hold_touched_fixed(func, labels.values(), (args, kwargs), output)
        return output

    def _labels_of_stand_in(
        self, function: Callable[..., Any], func: Any, args: Any, kwargs: Any, call: Call
    ) -> list[Value | Cases]:
        """Trace a function in the place of an operation that it is a stand-in for."""
        if func._schema.is_mutable:
            raise ValueError("an operation that writes to its arguments can have no stand-in")
        operation = self.equations.operation
        with torch.no_grad(), self:
            shown = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        self.equations.operation = operation
        sizes = [
            [tuple(leaf.shape) for leaf in tree_leaves(of) if isinstance(leaf, Tensor)] for of in (shown, call.output)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the stand-in has outputs of shapes {sizes[0]}, the operation {sizes[1]}")
        return [self._read(leaf) for leaf in shown]

    def _operation(self, name: str) -> Operation:
        module = running_module(self)
        return Operation(name, "" if module is None else self._names.get(id(module), type(module).__name__))

    @contextmanager
    def _taking_down(self, operation: Operation) -> Iterator[None]:
        """Write down equations in the name of an operation, alone among threads and unseen by other modes.

        What fails here must not end a call that trains: all parameters are held fixed then. After a trace with fake
        tensors there is another one with real tensors.
        """
        with self._lock, torch._C.DisableTorchFunction():
            self.equations.operation = operation
            try:
                yield
            except Exception as error:
                if self.is_fake:
                    raise
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Hold all parameters fixed, whatever the call does from now on."""
        self.equations.hold_all_fixed()
        if not self.has_failed:
            self.has_failed = True
            name = self.equations.operation.name
            warn(f"{name} cannot be watched, so all parameters are held fixed: {error!r}")

    def _read(self, tensor: Tensor) -> Value | Cases:
        """The label of an input. If no operation was seen that made it, all that it was made of is held fixed."""
        if not is_ordinary(tensor):
            for part in tensors_in(vars(tensor)):
                if part is not tensor:
                    self.equations.hold_fixed(self._read(part))
        elif tensor.grad_fn is not None and not self.memory.has_seen(tensor):
            self._hold_origin_fixed(tensor)
        return self.memory.read(tensor)

    def _hold_origin_fixed(self, tensor: Tensor) -> None:
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

    def _apply(self, rule: Rule, func: Any, call: Call) -> bool:
        """Label what an operation has made, and say whether its rule was able to."""
        try:
            labels: Any = by_case(self.equations.operation.name, rule, call)
            self._write(labels if isinstance(labels, list | tuple) else [labels], func, call)
        except Exception as error:  # a form of the operation that the rule does not know must not stop training
            name = self.equations.operation.name
            warn(f"The rule for {name} failed, so what it touches is held fixed: {error!r}")
            return False
        return True

    def _write(self, labels: Sequence[Value | Cases | None], func: Any, call: Call) -> None:
        """Write labels to the outputs of an operation, and to the arguments that it has changed in place."""
        outputs = call.output if isinstance(call.output, list | tuple) else [call.output]
        written = written_to(func)
        if torch.Tag.inplace_view in func.tags or len(written) != len(outputs):  # a list of views is one output
            written = [None] * len(outputs)
        # An output without elements has none for every batch, unless it follows from an input that may have some.
        always_empty = all(prod(shape) or _is_zero(call.values[key]) for key, shape in call.shapes.items())
        for tensor, label, name in zip(outputs, labels, written, strict=True):
            if not isinstance(tensor, Tensor) or label is None:
                continue
            target = call.arguments[name] if name is not None else None
            if target is not None:
                self.memory.overwrite(target, label)
            if tensor is not target:
                self.memory.write(tensor, label, always_empty=always_empty)

    def _hold_touched_fixed(self, func: Any, labels: Iterable[Value | Cases], inputs: Any, output: Any) -> None:
        """Hold the inputs and outputs of an operation fixed, about which nothing is known."""
        for label in labels:
            self.equations.hold_fixed(label)
        if getattr(getattr(func, "_schema", None), "is_mutable", True):
            for leaf in tree_leaves(inputs):
                if isinstance(leaf, Tensor):
                    self.memory.overwrite(leaf, constant(FIXED, leaf.ndim))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.memory.write(leaf, constant(FIXED, leaf.ndim))

    # What comes into the call, and what leaves it ---------------------------------------------------------------------

    def register_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for constants that the call is given."""
        with self._taking_down(Operation("input", "")):
            for tensor in tensors:
                self.memory.read(tensor)

    def hold_fixed(self, tensors: Iterable[Tensor], name: str) -> None:
        """Demand that tensors which leave the call stay as they are; ``name`` is for the report."""
        with self._taking_down(Operation(name, "")):
            for tensor in tensors:
                self.equations.hold_fixed(self._read(tensor))

    def hold_all_fixed(self, name: str) -> None:
        """Demand that no parameter changes."""
        self.hold_fixed(self._parameters, name)

    def hold_new_fixed(self, tensors: Iterable[Tensor], name: str) -> None:
        """Demand that tensors stay as they are if the call has made them."""
        with self._taking_down(Operation(name, "")):
            for tensor in tensors:
                if self.memory.is_new(tensor):
                    self.equations.hold_fixed(self._read(tensor))

    def hold_escaped_fixed(self, tensor: Tensor, name: str) -> None:
        """Demand that a tensor stays as it is, whose values leave torch in the module that is running."""
        with self._taking_down(self._operation(name)):
            self.equations.hold_fixed(self._read(tensor))
            if is_ordinary(tensor):
                self.constants.forget(tensor, escaped=True)


def _is_zero(label: Value | Cases) -> bool:
    """Whether a tensor is zero, or empty whatever the batch."""
    return not isinstance(label, Product | ParameterView | Cases) and bool((label == ZERO).all())


class _Escapes(TorchFunctionMode):
    """Holds tensors fixed whose values leave torch: no operation shows what becomes of them."""

    EXITS = frozenset(
        {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "__reduce_ex__", "storage", "untyped_storage"}
    )

    def __init__(self, mode: TraceMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.EXITS and args and isinstance(args[0], Tensor):
            if name in ("data_ptr", "__dlpack__") and isinstance(args[0], FakeTensor):
                raise RuntimeError("A fake tensor has no memory.")  # the module is called with real ones then
            self.mode.hold_escaped_fixed(args[0], name)
        return func(*args, **(kwargs or {}))
