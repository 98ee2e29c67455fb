"""The two ways to take a step of the base optimizer in a rule's coordinates: fused in one pass, or wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt.common.sharding import is_sharded, local
from lightning_ecopt.common.signals import uninterrupted
from lightning_ecopt.common.tensors import Tensors, in_shared_memory, ordinary_tensors, to_device, updates_by_difference
from lightning_ecopt.kernels import Coefficient
from lightning_ecopt.kernels.lines import OfPass
from lightning_ecopt.optim.bases import BASES, Base, Value, has_own_step, momentum_to_step, products
from lightning_ecopt.optim.calls import StepCall
from lightning_ecopt.optim.prepared import PreparedStep
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.rule import Coefficients, Reparametrization, Rule
from lightning_ecopt.steps.state import StateEntries

#: Of a host's counts each addition of a number would make a tensor of its own.
_ONE = torch.ones((), device="cpu")


class Stepper:
    """Takes the base optimizer's steps in the coordinates of a rule, fused in one pass where it can.

    Args:
        base: the optimizer.
        rule: says where the base takes its steps.
        parameters: of the scaling group, by name.
        may_fuse: whether a step may be fused at all.
    """

    def __init__(
        self, base: Optimizer, rule: Rule, parameters: Mapping[str, nn.Parameter], may_fuse: bool = True
    ) -> None:
        self._rule = rule
        self._fused = FusedStep(base, rule, parameters, may_fuse)
        self._wrapped = WrappedStep(rule, parameters)

    def take_prepared(self, call: StepCall) -> bool:
        """Take one step in the way that an earlier one has prepared, if it is still the way; returns whether it is."""
        if call.has_more:
            return False
        with uninterrupted():
            return self._fused.take_prepared()

    def take(self, weights: Tensors, gradients: Tensors, entries: Callable[[], StateEntries], call: StepCall) -> Any:
        """Take one step: w and g to coordinates, the base's step, and back to weights.

        Args:
            weights: of the scaling group, by parameter name.
            gradients: by parameter name; parameters without a dense gradient are missing.
            entries: returns the base's state if some of it averages weights, else nothing; a first step makes some.
            call: the call of the base's own ``step``, if that is to be called.

        Returns:
            What the base's own ``step`` has returned; ``None`` if the step was fused.
        """
        here = self._rule.reparametrization(weights, gradients, self._fused.to_step)
        fusible = None if call.has_more else self._fused.entries(gradients)
        result = None
        with uninterrupted():
            if fusible is None:
                result = self._wrapped.take(here, weights, gradients, entries, call)
            else:
                self._fused.take(here, weights, gradients, fusible)
            self._rule.commit()
        return result


class WrappedStep:
    """Steps by the base optimizer's own ``step``, with weights and gradients moved to coordinates meanwhile.

    Args:
        rule: says where the base takes its steps.
        parameters: of the scaling group, by name.
    """

    def __init__(self, rule: Rule, parameters: Mapping[str, nn.Parameter]) -> None:
        self._rule, self._parameters = rule, parameters

    def take(
        self,
        here: Reparametrization,
        weights: Tensors,
        gradients: Tensors,
        entries: Callable[[], StateEntries],
        call: StepCall,
    ) -> Any:
        """Take one step in the coordinates ``here``; the other arguments are those of :meth:`Stepper.take`."""
        # Also if the step fails, no weight and no gradient may stay in coordinates.
        with self._writable(gradients) as shown, ExitStack() as ways_back:
            ways_back.callback(self._rule.transform_gradients_(here, shown))
            found = entries()
            memory = {name: self._parameters[name].data for name in weights}
            to_weights_ = self._rule.to_coordinates_(here, weights, found)

            @ways_back.callback
            def _() -> None:
                moved = found
                try:
                    self._take_over_replaced(weights, memory)
                    moved = entries()  # a first step has made some; and may warn, which may be an error
                finally:
                    to_weights_(moved)

            return call.step(in_coordinates=True)

    def _take_over_replaced(self, weights: Tensors, memory: Tensors) -> None:
        """Put values back into the memory of parameters to which the base has assigned others: ``p.data = ...``."""
        for name, before in memory.items():
            parameter = self._parameters[name]
            if not is_sharded(parameter) and parameter.data_ptr() != before.data_ptr():
                weights[name].copy_(parameter.detach())
                parameter.data = before

    @contextmanager
    def _writable(self, gradients: Tensors) -> Iterator[Tensors]:
        """While entered, gradients can be changed there and back; most of them are the parameters' own.

        Gradients are copied if a change could not be undone: sixteen bits would be rounded, a graph would be broken,
        and memory that two gradients share would be changed twice. So are those that only ``torch.inference_mode``
        lets be changed.
        """
        own = self._parameters
        shared = in_shared_memory(gradients)
        before = {
            name: own[name].grad
            for name, g in gradients.items()
            if own[name].grad is not None  # not an empty one, which others have
            and (updates_by_difference(g) or g.requires_grad or g.is_inference() or name in shared)
        }
        shown = dict(gradients)
        try:
            for name, gradient in before.items():
                assert gradient is not None  # it is one of `gradients`
                own[name].grad = copy = gradient.clone()
                shown[name] = local(copy)
            yield shown
        finally:
            for name, gradient in before.items():
                own[name].grad = gradient


class FusedStep:
    """Steps of SGD, Adam and AdamW in one pass over weights, gradients and state.

    Args:
        base: the optimizer.
        rule: says where the base takes its steps.
        parameters: of the scaling group, by name.
        may_fuse: whether a step may be fused at all.
    """

    def __init__(self, base: Optimizer, rule: Rule, parameters: Mapping[str, nn.Parameter], may_fuse: bool) -> None:
        self._optimizer, self._rule, self._parameters = base, rule, parameters
        self._base: Base | None = BASES.get(type(base)) if may_fuse else None
        self._able = {name for name in rule.rows.covered if not updates_by_difference(parameters[name])}
        self._order: list[list[int]] = []  # the parameter groups that `_group_of` was made for
        self._group_of: list[int] = []  # by name of a parameter that has rows, ``[N]``
        self._prepared: PreparedStep | None = None
        self._told: tuple[dict[str, Value], Coefficients] | None = None  # of the last step
        self._times = 0  # so often a step of the rule was not prepared

    def __getstate__(self) -> dict[str, Any]:  # a copy has other tensors, perhaps in another process
        return {**vars(self), "_prepared": None, "_told": None}

    @property
    def to_step(self) -> Coefficient:
        """The factor that gives the base's momentum the size of one gradient: a number, or one for each row."""
        rows, groups = self._rule.rows, self._optimizer.param_groups
        value = self._of_parameters([momentum_to_step(options) for options in groups])
        return _onto(rows.spread, rows)(value) if isinstance(value, Tensor) and value.ndim else value

    def entries(self, gradients: Tensors) -> list[dict[str, Tensor]] | None:
        """The state that the pass takes, by parameter name; ``None`` if this step has to be wrapped.

        It has to if the base is of another class, takes a step of the user's or has no state yet, for sparse gradients,
        for gradients of parameters that the scaling group does not know, and for weights of 16 bits.
        """
        groups = self._optimizer.param_groups
        names = None if self._base is None else self._base.entry_names(groups)
        with_gradient = [p for options in groups for p in options["params"] if p.grad is not None]
        if names is None or len(with_gradient) > len(gradients) or not has_own_step(self._optimizer):
            return None
        if not gradients.keys() <= self._able:
            return None
        moving = {name: gradient for name, gradient in gradients.items() if self._parameters[name].grad is not None}
        own = [self._parameters[name] for name in moving]
        kinds, states = [p.dtype for p in own], [self._optimizer.state.get(p, {}) for p in own]
        # Lists are cheap, and there is one of them for each entry; networks have hundreds of parameters.
        values = [[state.get(entry) for state in states] for entry in names]
        if any([getattr(value, "dtype", None) for value in of] != kinds for of in (moving.values(), *values)):
            return None
        return [dict(zip(moving, map(local, of), strict=True)) for of in values]

    def take(self, here: Reparametrization, weights: Tensors, gradients: Tensors, entries: Sequence[Tensors]) -> None:
        """Take one step.

        Args:
            here: the coordinates.
            weights: of the scaling group, by parameter name.
            gradients: by parameter name; parameters without a gradient are missing.
            entries: what :meth:`entries` has returned.
        """
        assert self._base is not None  # otherwise there are no entries
        base, rule, rows = self._base, self._rule, self._rule.rows
        coefficients = self._coefficients(base, gradients)
        rest = [None] * (base.num_entries - len(entries))  # the pass takes all entries that there may be

        def advance(
            values: Tensor, gradient: Tensor, state: Sequence[Tensor], spread: Callable[[Tensor], Tensor]
        ) -> Tensor:
            moved = values.clone()
            lists = [[moved], [gradient], *([of] for of in state), *rest]
            getattr(rule.kernels, base.kernel)(*lists, shapes=[tuple(moved.shape)], **coefficients(spread))
            return moved

        back = rule.allocate(here, weights, gradients, entries, advance)
        of_rows = coefficients(rows.spread, here, back.to_weights)
        moving = {name: weights[name] for name in gradients}
        try:
            rows.apply_(rule.kernels, base.kernel, moving, gradients, *entries, *rest, **of_rows)
        finally:
            back.finish_()  # the pass has left no weights where it puts some right
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look for it; the base's step sets it
        self._prepare(gradients)

    def _prepare(self, gradients: Tensors) -> None:
        """Prepare the next step, if none is prepared: in the 1st, 2nd, 4th, 8th ... step that was not itself."""
        self._times += 1
        if self._base is None or self._prepared is not None or self._times & (self._times - 1):
            return
        rule, names = self._rule, self._base.entry_names(self._optimizer.param_groups) or ()
        self._prepared = PreparedStep.of(self._optimizer, rule.kernels, rule.rows, self._parameters, gradients, names)

    @ordinary_tensors()
    def take_prepared(self) -> bool:
        """Take one step in the way that an earlier one has prepared, if it is still the way; returns whether it is."""
        prepared, base, rule = self._prepared, self._base, self._rule
        if prepared is None or base is None:
            return False
        if not prepared.fits():
            self._prepared = None
            return False
        step = prepared.step(base.entry_names(self._optimizer.param_groups), rule.rows.dtype)
        if step is None:
            return False
        rule.step_(prepared.kernels, step, self._coefficients(base, rule.rows.names), self.to_step)
        rule.commit()
        return True

    def _coefficients(self, base: Base, names: Iterable[str]) -> Coefficients:
        """The coefficients of this step, which is counted; ``names`` are those of parameters with a gradient.

        They are the object of the last step if they are numbers that have not changed.
        """
        rates, rows = self._rates(base, names), self._rule.rows
        are_numbers = not any(isinstance(value, Tensor) for value in rates.values())
        if are_numbers and self._told is not None and self._told[0] == rates:
            return self._told[1]
        terms = base.terms(**rates)

        def given(
            spread: Callable[[Tensor], Tensor],
            here: Reparametrization | None = None,
            to_weights: Tensor | None = None,
        ) -> OfPass:
            return products(terms, _onto(spread, rows), here, to_weights)

        self._told = (rates, given) if are_numbers else None
        return given

    def _rates(self, base: Base, names: Iterable[str]) -> dict[str, Value]:
        """The options of all parameters, as this step takes them; ``names`` are those of parameters with a gradient."""
        each = [base.options(options) for options in self._optimizer.param_groups]
        options: dict[str, Value] = dict(each[0])
        if len(each) > 1 or any(isinstance(value, Tensor) for value in options.values()):
            options = {name: self._of_parameters([of[name] for of in each]) for name in options}
        return base.rates(options, lambda: self._count_step(names))

    def _of_parameters(self, of_groups: Sequence[Value]) -> Value:
        """What each parameter group has: one number if it is the same, else one for each parameter, ``[N]``."""
        of_groups = [value.reshape(()) if isinstance(value, Tensor) else value for value in of_groups]
        first = of_groups[0]
        others = of_groups[1:]
        if all(value is first or (isinstance(value, float | int) and value == first) for value in others):
            return first
        order = [list(map(id, options["params"])) for options in self._optimizer.param_groups]
        if order != self._order:
            number = {key: k for k, keys in enumerate(order) for key in keys}
            self._order = order
            self._group_of = [number.get(id(self._parameters[name]), 0) for name in self._rule.rows.names]
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in of_groups])[
            self._group_of
        ]

    def _count_step(self, names: Iterable[str]) -> Value:
        """Add one to the step counts of the parameters that move, and return the counts."""
        own = {name: self._parameters[name] for name in names}
        counts = {name: self._optimizer.state[p]["step"] for name, p in own.items() if p.grad is not None}
        if not counts:  # other ranks hold all that moves
            return 1.0
        first, *others = values = list(counts.values())
        if first.device.type != "cpu":
            torch._foreach_add_(values, 1)
        else:
            torch._foreach_add_(values, _ONE)
            if all(count.item() == first.item() for count in others):
                return float(first)
        return torch.stack([counts.get(name, first) for name in self._rule.rows.names]).to(torch.float64)


def _onto(spread: Callable[[Tensor], Tensor], rows: Rows) -> Callable[[Tensor], Tensor]:
    """Spread what the parameters have, ``[N]``, in the type of vectors over rows and on their device."""
    return lambda value: spread(to_device(value.to(rows.dtype), rows.device))
