"""The base optimizers whose steps are fused: SGD, Adam and AdamW as coefficients of one pass.

The base takes its step at v = w / weight_scale, with gradients g_v = grad_scale g + grad_shift, and v is multiplied by
``to_weights`` afterwards. Instead of three passes, the scalings are folded into the coefficients of the base's update:
for plain SGD

    w' = to_weights (w / weight_scale - lr g_v) = keep w + pull g + push
    keep = to_weights / weight_scale    pull = -lr to_weights grad_scale    push = -lr to_weights grad_shift

and the state of the base ends as if the three passes had been made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer

from lightning_ecopt.kernels.passes import Product
from lightning_ecopt.optim.calls import optimizers_in
from lightning_ecopt.steps.rule import Reparametrization, StepKind

ParamGroups = Sequence[Mapping[str, Any]]
#: An option: one number for all parameters, or one for each, ``[N]`` in float64.
Value = float | Tensor


class Term(NamedTuple):
    """A coefficient of the pass: a value of the options, times what the coordinates are.

    Args:
        value: of the options.
        of: what it is multiplied by: one of those in :func:`products`.
    """

    value: Value
    of: str = "one"


def products(
    terms: Mapping[str, Term],
    spread: Callable[[Tensor], Tensor],
    here: Reparametrization | None = None,
    to_weights: Tensor | None = None,
) -> dict[str, Product]:
    """The coefficients of a pass, without those that change nothing: no decay, no shift, a weight that stays.

    Args:
        terms: by name of the coefficient.
        spread: makes values of what the pass goes over, such as rows, ``[R]``, of those of parameters, ``[N]``.
        here: the coordinates; ``None`` if what the pass goes over is coordinates already.
        to_weights: ``[R]``; ``None`` if it is ``here.weight_scale``.
    """
    vectors: dict[str, tuple[tuple[Tensor, ...], Tensor | None]]
    if here is None:
        vectors = dict.fromkeys(("one", "end", "scale", "end scale", "per weight", "keep"), ((), None))
    else:
        end = here.weight_scale if to_weights is None else to_weights
        vectors = {
            "one": ((), None),
            "end": ((end,), None),
            "scale": ((here.grad_scale,), None),
            "end scale": ((end, here.grad_scale), None),
            "per weight": ((), here.weight_scale),
            "keep": ((), None) if to_weights is None else ((to_weights,), here.weight_scale),
        }
        if here.grad_shift is not None:
            vectors |= {"shift": ((here.grad_shift,), None), "end shift": ((end, here.grad_shift), None)}
    found: dict[str, Product] = {}
    for name, (value, of) in terms.items():
        is_left_out = (of == "per weight" and _is(value, 0)) or (of == "keep" and to_weights is None and _is(value, 1))
        if of in vectors and not is_left_out:
            factor = spread(value) if isinstance(value, Tensor) and value.ndim else value
            found[name] = Product(factor, *vectors[of])
    return found


#: Optimizers whose steps are linear in the gradients.
LINEAR = (SGD, ASGD)


def step_kinds(base: Optimizer) -> dict[int, StepKind]:
    """The kind of an optimizer's step in each of its parameters, by ``id``.

    A step is ``"whole"`` in every group that says ``use_muon=True``; and in parameters of two axes or more of an
    optimizer, or of one that it runs, that has "Muon" in the name of its class or of a base class, unless the group
    says ``use_muon=False`` (or ``use_fallback=True``, as timm's does). Else it is ``"linear"`` if the optimizer is SGD
    or ASGD, or leaves the group to such: then this very group is one of theirs, and of no other that it runs, as in
    Lookahead around SGD. Else it is of its ``"own size"``.

    What cannot be seen: a wrapper may give gradients a length of its own before the SGD inside takes its step. That is
    taken for linear, and the lengths of its steps then change with the size of the loss.
    """
    found = optimizers_in(base)
    last = [one for one in found if len(optimizers_in(one)) == 1]  # those that run no others
    kinds: dict[int, StepKind] = {}
    for options in base.param_groups:
        steppers = [one for one in last if any(own is options for own in one.param_groups)]
        is_linear = isinstance(base, LINEAR) or (steppers and all(isinstance(one, LINEAR) for one in steppers))
        kinds |= {id(p): "linear" if is_linear else "own size" for p in options["params"]}
    for one in found:
        for options in one.param_groups:
            kinds |= {id(p): "whole" for p in options["params"] if _is_whole(one, options, p)}
    return kinds


def _is_whole(optimizer: Optimizer, options: Mapping[str, Any], p: Tensor) -> bool:
    if "use_muon" in options:
        return bool(options["use_muon"])
    is_muon = any("muon" in kind.__name__.lower() for kind in type(optimizer).__mro__)
    return is_muon and p.ndim > 1 and not options.get("use_fallback")


@dataclass(frozen=True)
class Base:
    """What a fused step needs to know of an optimizer class.

    A step asks in this order: which state, ``entry_names(groups)``; which numbers, ``options(group)``, as lr and beta1
    of Adam; what follows from them at step t, ``rates(options, count)``, as lr / (1 - beta1**t); and the terms,
    ``terms(**rates)``, of the coefficients that :mod:`lightning_ecopt.kernels.passes` lists.

    Args:
        kernel: name of the pass, a method of :class:`~lightning_ecopt.kernels.Kernels`.
        num_entries: how many state tensors the pass takes.
        entry_names: the state entries that parameter groups need; ``None`` if one pass cannot serve all groups.
        options: the numbers that a step takes from one parameter group.
        rates: what the coefficients depend on, from the options and a function that counts the step.
        terms: of the coefficients of the pass.
    """

    kernel: str
    num_entries: int
    entry_names: Callable[[ParamGroups], tuple[str, ...] | None]
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    rates: Callable[[dict[str, Value], Callable[[], Value]], dict[str, Value]]
    terms: Callable[..., dict[str, Term]]


def momentum_to_mean(options: Mapping[str, Any]) -> float:
    """The factor that turns momentum, a sum of gradients in SGD, into a mean of gradients.

    m = momentum m + (1 - dampening) g tends to (1 - dampening) / (1 - momentum) times the mean.

    Args:
        options: a parameter group of any optimizer.
    """
    momentum, dampening = _momentum(options)
    return (1 - momentum) / (1 - dampening)


def momentum_to_step(options: Mapping[str, Any]) -> float:
    """The factor that gives momentum, a sum of gradients in SGD, the size of one gradient.

    It is the geometric mean of 1 - momentum, which does so if all gradients are the same, and sqrt(1 - momentum^2),
    which does so if they are independent, by (1 - dampening). SGD does not dampen the first gradient; so that its step
    is no longer than those that follow it may be, ((1 + momentum) / (1 - momentum))^(1/4) is the most.

    Args:
        options: a parameter group of any optimizer.
    """
    momentum, dampening = _momentum(options)
    factor = math.sqrt((1 - momentum) * math.sqrt(1 - momentum**2)) / (1 - dampening)
    return min(factor, ((1 + momentum) / (1 - momentum)) ** 0.25)


def _momentum(options: Mapping[str, Any]) -> tuple[float, float]:
    """Momentum and dampening; zero where momentum does not add up gradients."""
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    return (momentum, dampening) if 0 < momentum < 1 and dampening < 1 else (0.0, 0.0)


def _sgd_entry_names(groups: ParamGroups) -> tuple[str, ...] | None:
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


def _sgd(*, lr: Value, sign: Value, decay: Value, momentum: Value, damped: Value, nesterov: float) -> dict[str, Term]:
    # d = sign g_v + decay v
    # m = momentum m + damped d;    v' = v - lr (m or, with nesterov, d + momentum m);    w' = to_weights v'
    has_momentum = not _is(momentum, 0)
    terms: dict[str, Term] = {}
    if has_momentum:
        into = damped * sign
        terms |= {"fade": Term(momentum), "gain": Term(into, "scale"), "shift": Term(into, "shift")}
        terms |= {"decay": Term(damped * decay, "per weight"), "move": Term(-lr * momentum if nesterov else -lr, "end")}
    directly = bool(nesterov) or not has_momentum
    if directly:
        terms |= {"pull": Term(-lr * sign, "end scale"), "push": Term(-lr * sign, "end shift")}
    terms["keep"] = Term(1 - lr * decay if directly else 1.0, "keep")
    return terms


def _adam_entry_names(groups: ParamGroups) -> tuple[str, ...] | None:
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


def _adam_rates(options: dict[str, Value], count: Callable[[], Value]) -> dict[str, Value]:
    """Correct the bias of the means, which start at zero, for the numbers of steps."""
    steps = count()
    beta1, beta2 = options.pop("beta1"), options.pop("beta2")
    return {
        **options,
        "rate": options["lr"] / (1 - beta1**steps),
        "first": 1 - beta1,
        "second": 1 - beta2,
        "root": (1 - beta2**steps) ** -0.5,
    }


def _adam(
    *,
    lr: Value,
    sign: Value,
    decay: Value,
    shrink: Value,
    rate: Value,
    first: Value,
    second: Value,
    root: Value,
    eps: Value,
) -> dict[str, Term]:
    return {
        "gain": Term(sign, "scale"),
        "shift": Term(sign, "shift"),
        "decay": Term(decay, "per weight"),
        "first": Term(first),
        "second": Term(second),
        "keep": Term(1 - lr * shrink, "keep"),  # decoupled decay shrinks coordinates, and so weights
        "move": Term(-rate, "end"),
        "root": Term(root),
        "eps": Term(eps),
    }


def _is(value: Value, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _adamw_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return _adam_options(options, decoupled=True)


def _as_they_are(options: dict[str, Value], count: Callable[[], Value]) -> dict[str, Value]:
    return options


#: The steps of torch, by class, without what counts and profiles them. Whoever has replaced one wants to be called.
_STEPS: Mapping[type, Callable[..., Any]] = {kind: inspect.unwrap(kind.step) for kind in (SGD, Adam, AdamW)}


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer of torch takes torch's step: nobody has replaced it, for the class or for the instance."""
    replaced = vars(optimizer).get("step")
    is_counted = replaced is None or hasattr(replaced, "_wrapped_by_lr_sched")  # schedulers of learning rates count
    return is_counted and inspect.unwrap(type(optimizer).step) is _STEPS.get(type(optimizer))


#: Only these very classes: a subclass may take another step.
BASES: Mapping[type, Base] = {
    SGD: Base("sgd_", 1, _sgd_entry_names, _sgd_options, _as_they_are, _sgd),
    Adam: Base("adam_", 3, _adam_entry_names, _adam_options, _adam_rates, _adam),
    AdamW: Base("adam_", 3, _adam_entry_names, _adamw_options, _adam_rates, _adam),
}
