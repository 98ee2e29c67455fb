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
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ecopt.common.flat import plain_name
from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.aten import (
    EXITS,
    base_name,
    changed_tensors,
    named_arguments,
    tensor_by_tensor,
    written_to,
)
from lightning_ecopt.symmetry.constants import Constants
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.isolation import traced
from lightning_ecopt.symmetry.labels import FIXED, ZERO, Cases, ParameterView, Product, Value, constant
from lightning_ecopt.symmetry.left_out import BACKWARD_PASSES, STEPS, in_method_of_optimizer
from lightning_ecopt.symmetry.memory import Memory, is_ordinary
from lightning_ecopt.symmetry.picking import in_any_case
from lightning_ecopt.symmetry.places import line_of_user
from lightning_ecopt.symmetry.rules import RULES, Call
from lightning_ecopt.symmetry.rules.cases import by_case
from lightning_ecopt.symmetry.rules.registry import Rule
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.stand_ins import STAND_INS
from lightning_ecopt.symmetry.threads import is_traced_by, running_module


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
        self.has_used_parameters = False  # whether an operation has
        self.num_backward_passes = 0
        self.is_fake = any(isinstance(tensor, FakeTensor) for tensor in parameters.values())
        self.name_modules(module)
        self.traced = list(parameters.values())
        self._copied: set[str] = set()  # names of parameters that copies follow
        self._copies: dict[int, str] = {}  # by `id` of the copies, which live as long as the call
        self._lock = threading.RLock()  # the call may have threads of its own
        with torch._C.DisableTorchFunction():
            for name, tensor in parameters.items():
                self.memory.add_parameter(name, tensor)

    def name_modules(self, module: nn.Module) -> None:
        """Call modules as this one does, of which they are parts."""
        self._names = {id(part): plain_name(name) for name, part in module.named_modules()}
        self._home = type(module)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Take down what the current thread does, and the threads that it starts meanwhile."""
        with BACKWARD_PASSES(), STEPS(), traced(self):
            yield

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Take down what the current thread does; :func:`~.isolation.traced` enters it on each thread."""
        with _Escapes(self), self:
            yield

    # One operation ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, in its parts where these are known better, and take it down."""
        if isinstance(func, torch._ops.OpOverload) and any(issubclass(kind, NestedTensor) for kind in types):
            return NotImplemented  # a jagged tensor says what it does as operations on the tensor of its values
        kwargs = kwargs or {}
        name = base_name(func)
        if name.startswith("prim::"):  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        calls = tensor_by_tensor(name, func, args, kwargs)
        if calls is not None:
            with self:
                outputs = [call() for call in calls]
            return outputs if func._schema.returns else None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

        # An operation that has no rule is replaced by its parts, if torch can name them.
        rule = RULES.get(name)
        if name in STAND_INS:
            rule = partial(self._labels_of_stand_in, STAND_INS[name], func, args, kwargs)
        if rule is None and all(map(is_ordinary, tensors)) and isinstance(func, torch._ops.OpOverload):
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if name == "lift_fresh" and self.is_fake and not tensors[0].untyped_storage().resizable():
            # The module may read the values through NumPy later, which a fake tensor cannot show. After this error
            # `scaling_group` calls the module with real tensors.
            raise RuntimeError("A fake tensor shares no memory with NumPy.")
        return self._take_down(rule, self._operation(name), tensors, func, args, kwargs)

    def _take_down(
        self, rule: Rule | None, operation: Operation, tensors: list[Tensor], func: Any, args: Any, kwargs: Any
    ) -> Any:
        """Run an operation on tensors, and write down what its rule says of their labels."""
        # 1. Read the labels and shapes of the inputs, which the operation may change.
        labels: dict[int, Value | Cases] = {}
        origins: frozenset[str] = frozenset()
        with self._taking_down(operation):
            labels = {id(tensor): self._read(tensor) for tensor in tensors}
            shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors if not tensor.is_nested}
            origins = self._origins(tensors, labels)
        is_of_optimizer = bool(origins) and running_module(self) is None and in_method_of_optimizer()

        # 2. Run the operation.
        output = func(*args, **kwargs)

        # 3. Ask the rule for the labels of the outputs, or hold all that was touched fixed.
        flows = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        with self._taking_down(operation), self._unseen_copies(flows):
            if self.has_failed:  # perhaps above
                return output
            marks = origins if is_of_optimizer else self.memory.marks(tensors)
            if marks:
                self.memory.mark([*changed_tensors(func, args, kwargs), *tensors_in(output)], marks)
            arguments = named_arguments(func, args, kwargs)
            are_plain = all(map(is_ordinary, tensors))  # labels belong to memory, which others may not have
            if is_of_optimizer or not are_plain or arguments is None:
                for tensor in filter(is_ordinary, tensors):  # it may have been written to
                    self.constants.forget(tensor)
            else:
                constants = self.constants.follow(func, args, kwargs, output)  # of operations without a rule, too
                call = Call(self.equations, arguments, labels, shapes, output, constants, self.constants.name)
                if rule is not None and self._apply(rule, func, call):
                    return output
            if not is_of_optimizer:  # which moves weights, and computes no loss
                self._hold_touched_fixed(func, labels.values(), (args, kwargs), output)
        return output

    @contextmanager
    def _unseen_copies(self, flows: bool = False) -> Iterator[None]:
        """Let what happens to copies alone, without gradients, not count as a use of the parameter they follow."""
        before = self._copied & self.equations.seen
        yield
        if not flows:
            self.equations.seen -= self._copied - before

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
        place = "" if module is None else self._names.get(id(module), type(module).__name__)
        return Operation(name, place or line_of_user(self._home))

    def _origins(self, tensors: Iterable[Tensor], labels: Mapping[int, Value | Cases]) -> frozenset[str]:
        """Names of the parameters among tensors, and of those from whose gradients others come."""
        values = [label.value if isinstance(label, Cases) else label for label in labels.values()]
        views = [value for value in values if isinstance(value, ParameterView)]
        self.has_used_parameters |= bool(views)
        return self.memory.marks(tensors).union(*({part.name for part in view.parts()} for view in views))

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
            self._hold_sources_fixed(tensor.grad_fn)
        return self.memory.read(tensor)

    def find_parameters_again(self) -> None:
        """Take note of parameters that have other memory since a step."""
        with self._taking_down(Operation("step", "")):
            for name, parameter in zip(self.equations.shapes, self.traced, strict=True):
                if is_ordinary(parameter) and id(parameter) not in self._copies:
                    self.memory.add_again(name, parameter)

    def give_memory(self, tensor: Tensor) -> None:
        """Take note of ``tensor.data = ...``, after which a parameter stays as it is, unless its optimizer does so."""
        if id(tensor) in self._copies:
            copies = [(self._copies[id(tensor)], tensor)]
            self.tie_copies(copies)
            self.add_copies(copies)
            return
        with self._taking_down(self._operation("data")):
            names = [name for name, own in zip(self.equations.shapes, self.traced, strict=True) if own is tensor]
            for name in names if not in_method_of_optimizer() else ():
                whole, value = ParameterView.whole(name, self.equations.shapes[name]), self._read(tensor)
                if not isinstance(value, ParameterView) or not whole.shows_same(value):  # as a cast does
                    self.equations.hold_fixed(whole)
        self.find_parameters_again()

    def _hold_sources_fixed(self, node: Any) -> None:
        """Hold fixed the parameters that something was computed from, on another thread for instance."""
        own = {id(parameter): parameter for parameter in self.traced}
        waiting, seen = [node], set()
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

    def add_copies(self, copies: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors for copies that are rescaled with a parameter, each with the parameter's name."""
        copies = list(copies)
        self._copied |= {name for name, _ in copies}
        self._copies |= {id(tensor): name for name, tensor in copies}
        with self._taking_down(Operation("copies of weights", "")), self._unseen_copies():
            for name, tensor in copies:
                self.memory.add_copy(name, tensor)

    def tie_copies(self, copies: Iterable[tuple[str, Tensor]]) -> None:
        """Demand that copies scale like the parameter that they follow; the call may have put others in their place."""
        with self._taking_down(Operation("copies of weights", "")), self._unseen_copies():
            for name, tensor in copies:
                whole, value = ParameterView.whole(name, tensor.shape), self._read(tensor)
                if not isinstance(value, ParameterView) or not whole.shows_same(value):
                    self.memory.tie(whole, value)

    def hold_fixed(self, tensors: Iterable[Tensor], name: str) -> None:
        """Demand that tensors which leave the call stay as they are; ``name`` is for the report."""
        self._hold_fixed(tensors, Operation(name, ""))

    def _hold_fixed(self, tensors: Iterable[Tensor], operation: Operation, *, only_new: bool = False) -> None:
        with self._taking_down(operation):
            held = [tensor for tensor in tensors if not only_new or self.memory.is_new(tensor)]
            for tensor in held:
                self.equations.hold_fixed(self._read(tensor))
            for name in self.memory.marks(held):  # a gradient by one of these is in it
                self.equations.hold_fixed(ParameterView.whole(name, self.equations.shapes[name]))

    def hold_all_fixed(self, name: str) -> None:
        """Demand that no parameter changes."""
        self.hold_fixed(self.traced, name)

    def hold_new_fixed(self, tensors: Iterable[Tensor], name: str) -> None:
        """Demand that tensors stay as they are if the call has made them."""
        self._hold_fixed(tensors, Operation(name, ""), only_new=True)

    def begin_backward(self, starts: Sequence[Any], given: Sequence[Any]) -> None:
        """Hold fixed what a backward pass starts from, tensors or edges of the graph, and the gradients given there."""
        self.num_backward_passes += 1
        operation = self._operation("loss")
        self._hold_fixed([tensor for tensor in (*starts, *given) if isinstance(tensor, Tensor)], operation)
        with self._taking_down(operation):
            for edge in starts:
                if isinstance(edge, GradientEdge):
                    self._hold_sources_fixed(edge.node)

    def note_gradient(self, of: Tensor, gradient: Tensor) -> None:
        """Take note of a gradient that a backward pass has computed, with respect to a tensor.

        The loss does not change, so the gradient is divided by what multiplies the tensor. Of a parameter that says
        less: those who read it, to clip it or to log its norm, cost nothing; but if it gets into a loss, the parameter
        is held fixed.
        """
        with self._taking_down(self._operation("gradient")):
            if self.has_failed or self.memory.is_new(gradient):  # a pass that was watched has made it
                return
            label = self._read(of)
            if isinstance(label, Cases):
                label = in_any_case(self.equations, label)
            if isinstance(label, ParameterView):
                self.memory.read(gradient)  # which was there before anyone has seen it
                self.memory.mark([gradient], {part.name for part in label.parts()})
            elif ((ids := self.equations.whole(label)) > FIXED).any():
                self.memory.write(gradient, self.equations.combine((-1, ids)))

    def hold_escaped_fixed(self, tensor: Tensor, name: str) -> None:
        """Demand that a tensor stays as it is, whose values leave torch in the module that is running."""
        with self._taking_down(self._operation(name)):
            self.equations.hold_fixed(self._read(tensor))
            if is_ordinary(tensor):
                self.constants.forget(tensor, escaped=True)


def _is_zero(label: Value | Cases) -> bool:
    """Whether a tensor is zero, or empty whatever the batch."""
    return not isinstance(label, Product | ParameterView | Cases) and bool((label == ZERO).all())


_GRADIENT = cast(Any, Tensor.grad).__get__
_SET_DATA = cast(Any, Tensor.data).__set__


class _Escapes(TorchFunctionMode):
    """Holds tensors fixed whose values leave torch: no operation shows what becomes of them.

    It sees gradients that are read and ``p.data = ...``, too, which are no operations either.
    """

    def __init__(self, mode: TraceMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not is_traced_by(self.mode):  # in a backward pass, or in a step of an optimizer
            return func(*args, **(kwargs or {}))
        if func == _SET_DATA:
            func(*args)
            return self.mode.give_memory(args[0])
        if func == _GRADIENT:
            gradient = func(*args)
            if isinstance(gradient, Tensor):
                self.mode.note_gradient(args[0], gradient)
            return gradient
        if name in EXITS and args and isinstance(args[0], Tensor):
            if name in ("data_ptr", "__dlpack__") and isinstance(args[0], FakeTensor):
                raise RuntimeError("A fake tensor has no memory.")  # the module is called with real ones then
            self.mode.hold_escaped_fixed(args[0], name)
        return func(*args, **(kwargs or {}))
