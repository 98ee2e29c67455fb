"""Steps of SGD, Adam and AdamW in a frame, in one pass over weights, gradients and state.

In a :class:`~lightning_ecopt.steps.rule.Frame` the base optimizer would take its step at v = w / scale, with gradients
times g + plus, and v would be multiplied by ``arrival`` to give weights again. Here each element goes there and back on
the way, by coefficients of its row, and the state of the base optimizer becomes what it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ecopt.common.sharding import local
from lightning_ecopt.common.tensors import Tensors, to_device, updates_by_difference
from lightning_ecopt.kernels import Coefficient, EagerKernels
from lightning_ecopt.steps.path import PathRule
from lightning_ecopt.steps.rule import Frame, Rule

Groups = Sequence[Mapping[str, Any]]
#: An option for all parameters, or one for each, ``[N]`` in float64.
Value = float | Tensor
Coefficients = dict[str, Coefficient | None]


@dataclass(frozen=True)
class _Base:
    """What a fused step needs to know of the class of an optimizer.

    Args:
        kernel: name of the method of :class:`~lightning_ecopt.kernels.Kernels`.
        num_moments: how many tensors of state that takes.
        entries: names of those that there are with these parameter groups; ``None`` if the groups do not go together.
        options: of a parameter group, as numbers.
        coefficients: of the kernel, from the frame and the options.
    """

    kernel: str
    num_moments: int
    entries: Callable[[Groups], tuple[str, ...] | None]
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    coefficients: Callable[..., Coefficients]


def _sgd_entries(groups: Groups) -> tuple[str, ...] | None:
    if len({(options["momentum"] != 0, options["nesterov"]) for options in groups}) > 1:
        return None
    return ("momentum_buffer",) if groups[0]["momentum"] != 0 else ()


def _sgd_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "lr": options["lr"],
        "sign": -1.0 if options["maximize"] else 1.0,
        "decay": options["weight_decay"],
        "momentum": options["momentum"],
        "damped": 1.0 - options["dampening"] if options["momentum"] != 0 else 1.0,
        "nesterov": float(options["nesterov"]),
    }


def _sgd(
    scale: Tensor,
    times: Tensor,
    plus: Tensor | None,
    arrival: Tensor | None,
    *,
    lr: Coefficient,
    sign: Coefficient,
    decay: Coefficient,
    momentum: Coefficient,
    damped: Coefficient,
    nesterov: float,
) -> Coefficients:
    # d = sign (times g + plus) + decay w / scale
    # m = momentum m + damped d; a step of -lr (m or, with nesterov, d + momentum m), times scale
    gain, shift, pulled = sign * times, _times(sign, plus), _times(decay, 1 / scale)
    end = -lr * (scale if arrival is None else arrival)
    keep = None if arrival is None else arrival / scale
    directly: Coefficients = {"pull": end * gain, "push": _times(end, shift)}
    if pulled is not None and (nesterov or _is(momentum, 0)):
        keep = (1.0 if keep is None else keep) + end * pulled
    if _is(momentum, 0):
        return {"keep": keep, **directly}
    into_momentum: Coefficients = {
        "fade": momentum,
        "gain": damped * gain,
        "shift": _times(damped, shift),
        "decay": _times(damped, pulled),
        "move": _times(momentum, end) if nesterov else end,
    }
    return {"keep": keep, **into_momentum, **(directly if nesterov else {})}


def _adam_entries(groups: Groups) -> tuple[str, ...] | None:
    if len({options["amsgrad"] for options in groups}) > 1:
        return None
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if groups[0]["amsgrad"] else 2]


def _adam_options(options: Mapping[str, Any], decoupled: bool = False) -> Mapping[str, Any]:
    decoupled |= bool(options.get("decoupled_weight_decay"))
    return {
        "lr": options["lr"],
        "sign": -1.0 if options["maximize"] else 1.0,
        "decay": 0.0 if decoupled else options["weight_decay"],
        "shrink": options["weight_decay"] if decoupled else 0.0,
        "beta1": options["betas"][0],
        "beta2": options["betas"][1],
        "eps": options["eps"],
    }


def _adam_rates(options: dict[str, Value], steps: Value) -> dict[str, Value]:
    """The options as the step uses them, after so many steps."""
    beta1, beta2 = options.pop("beta1"), options.pop("beta2")
    return {
        **options,
        "rate": options["lr"] / (1 - beta1**steps),
        "first": 1 - beta1,
        "second": 1 - beta2,
        "root": (1 - beta2**steps) ** -0.5,
    }


def _adam(
    scale: Tensor,
    times: Tensor,
    plus: Tensor | None,
    arrival: Tensor | None,
    *,
    lr: Coefficient,
    sign: Coefficient,
    decay: Coefficient,
    shrink: Coefficient,
    rate: Coefficient,
    first: Coefficient,
    second: Coefficient,
    root: Coefficient,
    eps: Coefficient,
) -> Coefficients:
    kept = None if _is(shrink, 0) else 1 - lr * shrink
    keep = kept if arrival is None else arrival / scale if kept is None else kept * arrival / scale
    return {
        "gain": sign * times,
        "shift": _times(sign, plus),
        "decay": _times(decay, 1 / scale),
        "first": first,
        "second": second,
        "keep": keep,
        "move": -rate * (scale if arrival is None else arrival),
        "root": root,
        "eps": eps,
    }


def _is(value: Coefficient, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _times(value: Coefficient | None, other: Tensor | None) -> Tensor | None:
    """The product; ``None`` if a factor is, or zero."""
    return None if value is None or other is None or _is(value, 0) else value * other


BASES = {
    SGD: _Base("sgd_", 1, _sgd_entries, _sgd_options, _sgd),
    Adam: _Base("adam_", 3, _adam_entries, _adam_options, _adam),
    AdamW: _Base("adam_", 3, _adam_entries, lambda options: _adam_options(options, decoupled=True), _adam),
}


def averaging(options: Mapping[str, Any]) -> float:
    """By what momentum that is a sum of gradients, as that of SGD, becomes a mean."""
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    return (1 - momentum) / (1 - dampening) if 0 < momentum < 1 and dampening < 1 else 1.0


def _at(value: Value, spread: Callable[[Tensor], Tensor], like: Tensor) -> Coefficient:
    """What the parameters have, spread over a vector ``like``."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return spread(to_device(value.to(like.dtype), like.device))
    return value


class FusedStep:
    """Steps of a base optimizer under one rule.

    Args:
        optimizer: the base.
        rule: which says where the base takes its steps.
        parameters: of the scaling group, by name.
        fused: whether a step may be taken in one pass at all.
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, parameters: Tensors, fused: bool = True) -> None:
        self._optimizer, self._rule, self._parameters = optimizer, rule, parameters
        self._base = BASES.get(type(optimizer)) if fused else None
        number = {id(p): k for k, options in enumerate(optimizer.param_groups) for p in options["params"]}
        self._able = {name for name in rule.rows.covered if not updates_by_difference(parameters[name])}
        self._group_of = [number.get(id(parameters[name]), 0) for name in rule.rows.names]

    @property
    def average(self) -> Coefficient:
        """As for the frame of the rule."""
        value = self._of_parameters([averaging(options) for options in self._optimizer.param_groups])
        return _at(value, self._rule.rows.spread, self._rule.rows.sizes)

    def moments(self, gradients: Tensors) -> list[dict[str, Tensor]] | None:
        """The state that a step needs, by parameter name; ``None`` if the base has to take this step by itself.

        It has to if it is of another class, as long as its state is not made, for sparse gradients, for gradients of
        parameters that the scaling group does not know, and for weights of 16 bits.
        """
        groups = self._optimizer.param_groups
        entries = None if self._base is None else self._base.entries(groups)
        with_gradient = sum(p.grad is not None for options in groups for p in options["params"])
        if entries is None or with_gradient > len(gradients):
            return None
        found: list[dict[str, Tensor]] = [{} for _ in entries]
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            if name not in self._able or gradient.dtype != parameter.dtype:
                return None
            state = self._optimizer.state.get(parameter, {})
            for entry, moments in zip(entries, found, strict=True):
                value = state.get(entry)
                if not isinstance(value, Tensor) or value.dtype != parameter.dtype:
                    return None
                moments[name] = local(value)
        return found

    def take(self, weights: Tensors, gradients: Tensors, moments: Sequence[Tensors]) -> None:
        """Take one step.

        Args:
            weights: of the scaling group, by parameter name.
            gradients: those that there are.
            moments: what :meth:`moments` has returned.
        """
        assert self._base is not None
        rule, base = self._rule, self._base
        frame = rule.frame(weights, gradients, self.average)
        options = self._options(gradients)
        own = {name: _at(value, rule.rows.spread, frame.scale) for name, value in options.items()}
        moving = {name: weights[name] for name in gradients}
        state = [*moments, *[None] * (base.num_moments - len(moments))]
        arrival = leave_ = None
        if isinstance(rule, PathRule):
            arrival, leave_ = self._allocate(rule, frame, options, weights, gradients, moments)
            resting = {name: weights[name] for name in rule.scaled if name not in gradients}
            rule.rows.apply_(rule.kernels, "affine_", resting, times=arrival / frame.scale)
        coefficients = base.coefficients(frame.scale, frame.times, frame.plus, arrival, **own)
        rule.rows.apply_(rule.kernels, base.kernel, moving, gradients, *state, **coefficients)
        if leave_ is not None:
            leave_()

    def _allocate(
        self,
        rule: PathRule,
        frame: Frame,
        options: Mapping[str, Value],
        weights: Tensors,
        gradients: Tensors,
        moments: Sequence[Tensors],
    ) -> tuple[Tensor, Callable[[], None]]:
        """Move the coordinates of free skeleton weights, on which those of all others depend.

        Returns:
            What coordinates are to be multiplied by to be weights again, ``[R]``; and what puts the skeleton weights,
            and their moments, right when that has been done.
        """
        assert frame.free is not None
        assert self._base is not None
        base, free, elements = self._base, frame.free, rule.elements

        def spread(values: Tensor) -> Tensor:
            """From parameters to the units whose free skeleton weights are in them."""
            found = torch.zeros_like(free.values)
            for number, units in self._free_units:
                found[units] = values[number].to(found.dtype)
            return found

        moved, at_free = free.values.clone(), [elements.read(of)[1] for of in moments]
        ones = torch.ones_like(moved)
        state = [*([one] for one in at_free), *[None] * (base.num_moments - len(moments))]
        own = {name: _at(value, spread, ones) for name, value in options.items()}
        coefficients = base.coefficients(ones, ones, None, None, **own)
        getattr(EagerKernels(), base.kernel)(
            [moved], [free.gradient], *state, shapes=[tuple(moved.shape)], **coefficients
        )
        present = rule.rows.present(gradients)
        if present is not None:
            moved = torch.where(spread(present) > 0, moved, free.values)
        arrival, write_skeleton_ = rule.allocate(free, moved)

        def leave_() -> None:
            write_skeleton_(weights)
            for of, value in zip(moments, at_free, strict=True):
                elements.write_(of, torch.zeros_like(value), value)

        return arrival, leave_

    @cached_property
    def _free_units(self) -> list[tuple[int, Tensor]]:
        """For the numbers of parameters, the units whose free skeleton weights are in them."""
        assert isinstance(self._rule, PathRule)
        found = []
        for name, (slots, _) in self._rule.elements.places.items():
            units = slots - self._rule.elements.num_units
            found.append((self._rule.rows.names.index(name), units[units >= 0]))
        return found

    def _options(self, gradients: Tensors) -> dict[str, Value]:
        """Options of all parameters; the rates of Adam are those of the step that is taken now."""
        assert self._base is not None
        each = [self._base.options(options) for options in self._optimizer.param_groups]
        found = {name: self._of_parameters([options[name] for options in each]) for name in each[0]}
        if self._base.kernel == "adam_":
            return _adam_rates(found, self._count(gradients))
        return found

    def _of_parameters(self, of_groups: Sequence[Value]) -> Value:
        """What each parameter group has, for each parameter of the rule, or for all if it is the same."""
        first = of_groups[0]
        if all(value is first or (isinstance(value, float | int) and value == first) for value in of_groups):
            return first
        return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in of_groups])[self._group_of]

    def _count(self, gradients: Tensors) -> Value:
        counts = [self._optimizer.state[self._parameters[name]]["step"] for name in gradients]
        torch._foreach_add_(counts, 1)
        if counts[0].device.type == "cpu" and all(map(counts[0].equal, counts)):
            return float(counts[0])
        of = dict(zip(gradients, counts, strict=True))
        return torch.stack([of.get(name, counts[0]) for name in self._rule.rows.names]).to(torch.float64)
