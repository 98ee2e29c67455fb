"""Calls that mix up optimizers, modules, parameters and groups: each error says the call that was meant."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from lightning_ecopt.optim.calls import optimizers_in
from lightning_ecopt.optim.options import shown
from lightning_ecopt.optim.session import Session
from lightning_ecopt.symmetry import DeferredGroup, ScalingGroup


def check_wrapped(optimizer: Any, group: Any) -> None:
    """Check what ``EquivalentClassOptimizer(optimizer, group)`` is made of.

    Raises:
        TypeError: with the call that was meant.
    """
    meant = "EquivalentClassOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaling_group(model, inputs))"
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        raise TypeError(
            f"EquivalentClassOptimizer wraps an optimizer, not a class of optimizers: make it first, as in "
            f"EquivalentClassOptimizer({optimizer.__name__}(model.parameters(), ...), scaling_group(model, inputs))."
        )
    if isinstance(group, Optimizer):
        raise TypeError(
            f"The optimizer comes first, then the group: EquivalentClassOptimizer(optimizer, {_what(optimizer)})."
        )
    if not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"EquivalentClassOptimizer wraps an optimizer, but got {shown(optimizer)}: use {meant}, or ECSGD."
        )
    if group is not None:
        check_source(group, "EquivalentClassOptimizer(optimizer, ...)")


def check_base(optimizer: Optimizer) -> None:
    """Raise unless ``optimizer`` can be run in the equivalent-class space.

    Raises:
        TypeError: with what to do instead.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"{type(optimizer).__name__} has no param_groups, so that nobody knows what it trains: use the optimizer "
            "that it runs, or train without the equivalent-class space."
        )
    for one in optimizers_in(optimizer):
        if isinstance(vars(one).get("_session"), Session):  # an EquivalentClassOptimizer
            what = "The optimizer is" if one is optimizer else f"{type(optimizer).__name__} runs"
            raise TypeError(
                f"{what} an EquivalentClassOptimizer already: wrap it once, either in configure_optimizers (ec_sgd) or "
                "with the callback."
            )
        if isinstance(one, LBFGS):
            raise TypeError(
                "LBFGS computes gradients several times in a step, at weights of its own: use another optimizer, or "
                "train without the equivalent-class space."
            )
        if getattr(one, "defaults", {}).get("differentiable"):
            raise TypeError(
                "A step in the equivalent-class space is not differentiable: leave out differentiable=True, or train "
                "without the equivalent-class space."
            )
    if any(isinstance(p, UninitializedParameter) for options in optimizer.param_groups for p in options["params"]):
        raise TypeError(
            "Some parameters have no shape yet, as their modules are lazy: neither EquivalentClassOptimizer nor the "
            "EquivalentClassOptimization callback can trace them. Call the model once with a batch before the "
            "optimizer is made, and before fit."
        )


def check_source(group: Any, call: str) -> None:
    """Check that a group is given, or what finds one.

    Args:
        group: what has been given.
        call: how, with ``...`` where the group stands.

    Raises:
        TypeError: with the call that was meant.
    """
    known = isinstance(group, ScalingGroup | DeferredGroup)
    if known or (callable(group) and not isinstance(group, nn.Module | type)):
        return
    made = "scaling_group(model, inputs)"
    raise TypeError(
        f"{call} needs the scaling group of the module, but got {shown(group)}: {call.replace('...', made)}."
    )


def check_params(owner: str, function: str, params: Any, lr: Any) -> None:
    """Check the parameters of a class such as ``ECSGD``.

    Args:
        owner: name of the class.
        function: name of the function that takes a module instead.
        params: what stands where parameters should.
        lr: what stands where the learning rate should.

    Raises:
        TypeError: with the call that was meant.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"{owner} takes parameters, but got {shown(params)}: {owner}(model.parameters(), lr=0.1), or "
            f"{function}(model, lr=0.1), which knows the module from then on."
        )
    if isinstance(params, Optimizer) or (isinstance(params, type) and issubclass(params, Optimizer)):
        raise TypeError(
            f"{owner} makes an optimizer from parameters, got {shown(params)}: {owner}(model.parameters(), lr=0.1)."
            " What wraps an optimizer is EquivalentClassOptimizer(optimizer, group)."
        )
    if any(isinstance(given, ScalingGroup | DeferredGroup) for given in (params, lr)):
        raise TypeError(
            f"{owner} takes no scaling group in its call: optimizer = {owner}(model.parameters(), lr=0.1), then "
            "optimizer.bind(group)."
        )
    if not isinstance(lr, Real | Tensor):
        raise TypeError(
            f"{owner} takes the learning rate next to the parameters, but got {shown(lr)}: "
            f"{owner}(model.parameters(), lr=0.1)."
        )


def check_module(function: str, owner: str, module: Any, params: Any) -> None:
    """Check what ``ec_sgd(module, params)`` and its like are called with.

    Args:
        function: name of the function.
        owner: name of the class that takes parameters alone.
        module: what stands where the module should.
        params: what stands where parameters should.

    Raises:
        TypeError: with the call that was meant.
    """
    if isinstance(params, nn.Module):
        raise TypeError(f"{function} takes the module first, then its parameters: {function}(model, params, lr=0.1).")
    if isinstance(module, Optimizer | ScalingGroup | DeferredGroup):
        raise TypeError(
            f"{function} takes a module and makes an optimizer, got {shown(module)}: {function}(model, lr=0.1)."
            " What wraps an optimizer is EquivalentClassOptimizer(optimizer, group)."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{function} takes a module, but got {shown(module)}: {function}(model, lr=0.1), or "
            f"{function}(model, parameters, lr=0.1) to train some of its parameters, or {owner}(parameters, lr=0.1)."
        )
    if params is not None and (isinstance(params, Tensor | str) or not isinstance(params, Iterable)):
        name = f"lr={params!r}" if isinstance(params, Real) else "lr=0.1"
        raise TypeError(
            f"What follows the module in {function} are parameters, but got {shown(params)}: all else has a name, as "
            f"in {function}(model, {name})."
        )


def _what(given: Any) -> str:
    return "group" if isinstance(given, ScalingGroup | DeferredGroup) else "scaling_group(model, inputs)"
