"""Optimizers that are made of nothing but parameters and options, as configuration files have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_ecopt.optim.optimizer import EquivalentClassOptimizer


class ECSGD(EquivalentClassOptimizer):
    """SGD in the equivalent-class space.

    The scaling group is found by the callback :class:`~lightning_ecopt.EquivalentClassOptimization` if the Trainer has
    one; otherwise from the calls of modules that use the parameters, until the first step; or it is given to
    :meth:`bind`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; with the rule ``"unit"`` it is the relative length of a step.
        momentum: as in :class:`torch.optim.SGD`.
        dampening: as there.
        weight_decay: as there.
        nesterov: as there.
        maximize: as there.
        foreach: as there.
        fused: as there.
        **options: of :class:`~lightning_ecopt.EquivalentClassOptimizer`: ``rule``, ``refresh_interval`` and so on.

    Raises:
        TypeError: for options that there are not.
        ValueError: if an option is out of range.

    Example::

        optimizer = ECSGD(model.parameters(), lr=0.1, momentum=0.9)
        loss_function(model(x), y).backward()
        optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        base = SGD(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        super().__init__(base, None, **options)


class ECAdamW(EquivalentClassOptimizer):
    """AdamW in the equivalent-class space; see :class:`ECSGD`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: as in :class:`torch.optim.AdamW`.
        eps: as there.
        weight_decay: as there.
        amsgrad: as there.
        maximize: as there.
        foreach: as there.
        fused: as there.
        **options: of :class:`~lightning_ecopt.EquivalentClassOptimizer`.

    Raises:
        TypeError: for options that there are not.
        ValueError: if an option is out of range.

    Example::

        optimizer = ECAdamW(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        base = AdamW(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        super().__init__(base, None, **options)
