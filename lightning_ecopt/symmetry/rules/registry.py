"""The table of rules by operation, and the :class:`Call` that a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    Cases,
    IntArray,
    Label,
    ParameterView,
    Plain,
    Value,
    align,
    constant,
)
from lightning_ecopt.symmetry.picking import in_any_case


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation, as a rule sees it.

    Args:
        equations: where the rule writes its equations.
        arguments: the arguments by their names in the operation's schema, defaults filled in.
        values: the label or parameter view of every tensor argument, by ``id`` of the tensor.
        shapes: the shape of every tensor argument before the operation ran, by ``id`` of the tensor.
        output: what the operation has returned.
        constants: the values of integer tensors that are the same in every call, by ``id`` of the tensor.
        values_of: names the values of an integer tensor: they are those of every tensor of the same name.
    """

    equations: Equations
    arguments: dict[str, Any]
    values: Mapping[int, Value | Cases]
    shapes: dict[int, tuple[int, ...]]
    output: Any
    constants: Mapping[int, IntArray] = field(default_factory=dict)
    values_of: Callable[[Tensor], int] = id

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument; ``()`` for a number."""
        return self.shapes.get(id(self.arguments[name]), ())

    def factored(self, argument: Any) -> Value:
        """The label or parameter view of a tensor or number, given by itself or by its name; perhaps in factors."""
        if isinstance(argument, str):
            argument = self.arguments[argument]
        if isinstance(argument, Tensor):
            value = self.values[id(argument)]
            return in_any_case(self.equations, value) if isinstance(value, Cases) else value
        return constant(ZERO if argument == 0 else FIXED, 0)

    def value(self, argument: Any) -> Plain:
        """The label, as one array, or parameter view of a tensor or number, given by itself or by its name."""
        value = self.factored(argument)
        return value if isinstance(value, ParameterView) else self.equations.whole(value)

    def label(self, argument: Any, uniform: Iterable[int] = ()) -> Label:
        """The label of a tensor or number, perhaps in factors.

        A parameter gets a new scale per element, but one along ``uniform`` axes.
        """
        value = self.factored(argument)
        return self.equations.materialise(value, uniform) if isinstance(value, ParameterView) else value

    def ids(self, argument: Any, uniform: Iterable[int] = ()) -> IntArray:
        """The label of a tensor or number as one array; see :meth:`label`."""
        return self.equations.whole(self.label(argument, uniform))

    def uniform(self, name: str, axes: Iterable[int]) -> IntArray:
        """Demand one scale along ``axes`` of a tensor; returns its label, with size 1 there."""
        axes = tuple(axes)
        return self.equations.whole(self.equations.match_along(self.label(name, axes), axes))

    def hold_fixed(self, *names: str) -> None:
        """Demand that arguments do not change; an argument that is ``None``, or missing, is passed over."""
        for name in names:
            if self.arguments.get(name) is not None:
                self.equations.hold_fixed(self.factored(name))

    def broadcast(self, argument: Any) -> IntArray:
        """The label of a tensor or number, with as many axes as the output."""
        return align(self.ids(argument), self.output.ndim)

    def axes(self, name: str) -> tuple[int, ...]:
        """The axes of ``self`` that an argument names, as non-negative numbers; all axes if it is ``None`` or empty."""
        ndim = len(self.shape("self"))
        given = self.arguments.get(name)
        if given is None or (isinstance(given, Sequence) and len(given) == 0):
            return tuple(range(ndim))
        return tuple(axis % ndim for axis in (given if isinstance(given, Sequence) else (given,)) if ndim)


Rule = Callable[[Call], Value | Cases | Sequence[Value | Cases] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operations of these base names.

    Example::

        @rule("relu", "abs")
        def passes(call):
            return call.ids("self")
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"the operation {name!r} has a rule already: {RULES[name].__name__}")
            RULES[name] = function
        return function

    return register
