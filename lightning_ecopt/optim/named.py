"""EC-SGD, EC-AdamW and EC-Muon: optimizers made of parameters and options alone, as configuration files have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_ecopt.kernels import Implementation
from lightning_ecopt.optim.arguments import check_params
from lightning_ecopt.optim.muon import NS_COEFFICIENTS, AdjustLR, MuonAdamW
from lightning_ecopt.optim.optimizer import EquivalentClassOptimizer
from lightning_ecopt.optim.options import (
    Check,
    OptionArguments,
    RefreshInterval,
    Representative,
    RuleName,
    SkeletonChoice,
)
from lightning_ecopt.symmetry.followers import Given

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
_Kind = TypeVar("_Kind", bound=EquivalentClassOptimizer)


#: The options that all of these optimizers have, in their docstrings, which a command line prints.
_OPTIONS = """\
        rule: ``"unit"``; ``"path"`` for the paper's path coordinates; or ``"paper"`` for these with all options as in
            the paper, see :class:`~lightning_ecopt.EquivalentClassOptimizer`.
        refresh_interval: ``"epoch"``: a refresh in the first step of each epoch, which a Trainer tells; ``"auto"``:
            likewise, but no sooner than 128 steps after the last, and every 500 steps where nobody tells the epoch; or
            a number of steps; or ``None`` if only :meth:`refresh` asks for it.
        representative: ``"balanced"``, or ``"current"`` to stay at the weights as they are.
        skeleton: how the rule ``"path"`` chooses skeleton weights: ``"max"`` or ``"diagonal"``.
        max_path_ratio: the guard of the rule ``"path"``: the largest factor by which the scale of a unit changes
            in one step.
        free_start: value at which the rule ``"path"`` starts the coordinates of free skeleton weights.
        state_powers: accepted so that all optimizers have the same options; torch's state needs none.
        check: ``"gradient"`` asks the gradient, now and then, whether the loss changes when units are rescaled, and
            holds those fixed for which it does, with a warning: a loss may read what the trace has not seen. ``None``
            trusts the trace; see :func:`~lightning_ecopt.check_invariance`.
        implementation: how the step is run, which changes its speed alone.
        followers: copies that are mixed with the weights, and what they follow: ``{target: online}``; with
            ``ec_sgd`` and its like also names in the module, ``{"target": "online"}``."""


def _documented(kind: type[_Kind]) -> type[_Kind]:
    """Put what is said of the options above where the docstring of a class has ``{options}``."""
    kind.__doc__ = (kind.__doc__ or "").replace("        {options}", _OPTIONS)
    return kind


class SGDArguments(OptionArguments, total=False):
    """The keyword arguments of :class:`ECSGD` but ``lr``."""

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    followers: Given | None


class AdamWArguments(OptionArguments, total=False):
    """The keyword arguments of :class:`ECAdamW` but ``lr``."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    followers: Given | None


class MuonArguments(OptionArguments, total=False):
    """The keyword arguments of :class:`ECMuon` but ``lr``."""

    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    adjust_lr_fn: AdjustLR
    adamw_lr: float | None
    betas: tuple[float, float]
    eps: float
    amsgrad: bool
    foreach: bool | None
    fused: bool | None
    followers: Given | None


@_documented
class ECSGD(EquivalentClassOptimizer):
    """SGD in the equivalent-class space.

    The scaling group is found by the callback :class:`~lightning_ecopt.EquivalentClassOptimization` if the Trainer has
    one; otherwise from the calls of modules that use the parameters, until the first step; or it is given to
    :meth:`bind`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; with the rule ``"unit"`` it is the relative length of a step.
        momentum: factor by which past steps fade; 0 keeps none.
        dampening: share of a gradient that does not enter the momentum.
        weight_decay: the share of the weights (of path values with the rule ``"path"``) that is added to the gradient;
            without momentum, under the rule ``"unit"``, that a step takes away times ``lr``.
        nesterov: whether to look ahead along the momentum.
        maximize: whether to maximise the loss.
        foreach: whether torch's own step, where it is used, groups tensors.
        fused: whether torch's own step, where it is used, is its fused one.
        {options}

    Raises:
        TypeError: if an option is unknown.
        ValueError: if an option is out of range.

    Example::

        optimizer = ECSGD(model.parameters(), lr=0.03, momentum=0.9)
        loss_function(model(x), y).backward()
        optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.03,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        rule: RuleName = "unit",
        refresh_interval: RefreshInterval = "auto",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        check: Check = "gradient",
        implementation: Implementation = "auto",
        followers: Given | None = None,
    ) -> None:
        check_params(type(self).__name__, "ec_sgd", params, lr)
        base = SGD(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused
        )
        super().__init__(
            base,
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            check=check,
            implementation=implementation,
            followers=followers,
        )


@_documented
class ECAdamW(EquivalentClassOptimizer):
    """AdamW in the equivalent-class space.

    The scaling group is found by the callback :class:`~lightning_ecopt.EquivalentClassOptimization` if the Trainer has
    one; otherwise from the calls of modules that use the parameters, until the first step; or it is given to
    :meth:`bind`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: factors by which the mean of gradients and the mean of their squares fade.
        eps: is added to the root of the mean of squares, so that nothing is divided by zero.
        weight_decay: share of the weights, times ``lr``, that each step takes away; with the rule ``"path"`` of path
            values.
        amsgrad: whether to divide by the largest mean of squares so far.
        maximize: whether to maximise the loss.
        foreach: whether torch's own step, where it is used, groups tensors.
        fused: whether torch's own step, where it is used, is its fused one.
        {options}

    Raises:
        TypeError: if an option is unknown.
        ValueError: if an option is out of range.

    Example::

        optimizer = ECAdamW(model.parameters(), lr=3e-3)
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        rule: RuleName = "unit",
        refresh_interval: RefreshInterval = "auto",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        check: Check = "gradient",
        implementation: Implementation = "auto",
        followers: Given | None = None,
    ) -> None:
        check_params(type(self).__name__, "ec_adamw", params, lr)
        base = AdamW(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, fused=fused)
        super().__init__(
            base,
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            check=check,
            implementation=implementation,
            followers=followers,
        )


@_documented
class ECMuon(EquivalentClassOptimizer):
    """Muon for matrices and AdamW for everything else, in the equivalent-class space.

    The scaling group is found by the callback :class:`~lightning_ecopt.EquivalentClassOptimization` if the Trainer has
    one; otherwise from the calls of modules that use the parameters, until the first step; or it is given to
    :meth:`bind`. The base optimizer is :class:`~lightning_ecopt.MuonAdamW`, which says what is whose.

    Args:
        params: parameters or parameter groups; groups may say ``use_muon``.
        lr: learning rate, of Muon and AdamW.
        weight_decay: share of the weights, times ``lr``, that each step takes away; with the rule ``"path"`` of path
            values.
        momentum: factor by which Muon's mean of gradients fades.
        nesterov: whether Muon looks ahead along the momentum.
        ns_coefficients: of the polynomial that Muon applies to singular values.
        ns_steps: how often it does.
        adjust_lr_fn: how Muon's rate depends on the shape of a matrix: ``"match_rms_adamw"``, by which rates that suit
            AdamW suit Muon, or ``"original"``.
        adamw_lr: learning rate of AdamW's groups that have none of their own; by default ``lr``.
        betas: factors by which AdamW's mean of gradients and its mean of their squares fade.
        eps: is added to the root of AdamW's mean of squares; and the least norm that Muon divides a matrix by.
        amsgrad: whether AdamW divides by the largest mean of squares so far.
        foreach: whether AdamW groups tensors.
        fused: whether AdamW takes torch's fused step.
        {options}

    Raises:
        RuntimeError: if torch has no Muon, as before 2.9.
        TypeError: if an option is unknown.
        ValueError: if an option is out of range.

    Example::

        optimizer = ECMuon([{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}], lr=3e-3)
    """

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLR = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        rule: RuleName = "unit",
        refresh_interval: RefreshInterval = "auto",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        check: Check = "gradient",
        implementation: Implementation = "auto",
        followers: Given | None = None,
    ) -> None:
        check_params(type(self).__name__, "ec_muon", params, lr)
        base = MuonAdamW(
            params,
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            ns_steps,
            adjust_lr_fn,
            adamw_lr,
            betas,
            eps,
            amsgrad,
            foreach,
            fused,
        )
        super().__init__(
            base,
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            check=check,
            implementation=implementation,
            followers=followers,
        )
