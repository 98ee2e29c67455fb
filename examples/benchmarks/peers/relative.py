"""Steps relative to the weights: of a tensor (LAMB, LARS) or of a neuron (Nero)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Relative(torch.optim.Optimizer):
    """Calls :meth:`_step_of` for each parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _step_of(self, w: Tensor, g: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        raise NotImplementedError


class LAMB(_Relative):
    """LAMB (You et al., "Large Batch Optimization for Deep Learning", arXiv:1904.00962, algorithm 2).

    Of each tensor w with gradient g:

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w <- w - lr |w| / |r| r

    As in the authors' code the ratio |w| / |r| is 1 where a norm is zero, and for tensors of one axis (biases, gains),
    which have no weight decay either.

    Args:
        params: to train.
        lr: length of a step of a tensor, relative to the tensor.
        betas: of the two means.
        eps: added to the root.
        weight_decay: factor of the weight decay.

    Example::

        optimizer = LAMB(model.parameters(), lr=0.01)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _step_of(self, w: Tensor, g: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
        state["step"] += 1
        beta1, beta2 = options["betas"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(options["eps"])
        r = state["exp_avg"] / (1 - beta1 ** state["step"]) / root
        if w.ndim > 1:
            r.add_(w, alpha=options["weight_decay"])
        w.sub_(options["lr"] * _ratio(w, r) * r)


class LARS(_Relative):
    """LARS (You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, algorithm 1).

    Of each tensor w with gradient g:

        ratio = |w| / (|g| + weight_decay |w|)
        v <- momentum v + lr ratio (g + weight_decay w)        w <- w - v

    The paper's trust coefficient, a factor of the ratio and so of the rate, is 1: the rate is the length of a step
    relative to the tensor. The ratio is 1 where a norm is zero, and for tensors of one axis (biases, gains), which have
    no weight decay either.

    Args:
        params: to train.
        lr: length of a step of a tensor, relative to the tensor.
        momentum: factor of the momentum.
        weight_decay: factor of the weight decay.

    Example::

        optimizer = LARS(model.parameters(), lr=0.01)
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _step_of(self, w: Tensor, g: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        decay = options["weight_decay"] if w.ndim > 1 else 0.0
        ratio = 1.0 if w.ndim < 2 else _quotient(w.norm(), g.norm() + decay * w.norm())
        if not state:
            state["momentum_buffer"] = torch.zeros_like(w)
        state["momentum_buffer"].mul_(options["momentum"]).add_(options["lr"] * ratio * (g + decay * w))
        w.sub_(state["momentum_buffer"])


class Nero(_Relative):
    """Nero (Liu et al., "Learning by Turning: Neural Architecture Aware Optimisation", arXiv:2102.07227, algorithm 1).

    Of each neuron's incoming weights w (a row of a tensor) with gradient g:

        v <- beta v + (1 - beta) |g|^2
        w <- w - lr sigma / sqrt(v / (1 - beta^t)) g        w <- w - mean(w)        w <- w / |w|

    sigma is the mean norm of the tensor's rows at the start: 1, as the last two moves are made at the start, too, which
    changes the network. A bias or gain is a neuron of one weight, of which sigma is the mean magnitude, or 0.01 if all
    are zero; it is not constrained. A row without another mean than its only element stays unconstrained, too.

    Args:
        params: to train; they are projected at once.
        lr: angle of a step of a neuron.
        beta: of the mean.

    Example::

        optimizer = Nero(model.parameters(), lr=0.01)
    """

    def __init__(self, params: Iterable[Any], lr: float, beta: float = 0.999) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        for group in self.param_groups:
            for parameter in group["params"]:
                _project_(parameter)
                scale = float(_row_norms(parameter.detach()).mean())
                self.state[parameter] = {"step": 0, "scale": scale or 0.01}

    def _step_of(self, w: Tensor, g: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(_row_norms(g))
        state["step"] += 1
        beta = options["beta"]
        state["exp_avg_sq"].mul_(beta).add_(_row_norms(g).square(), alpha=1 - beta)
        root = (state["exp_avg_sq"] / (1 - beta ** state["step"])).sqrt_()
        w.sub_(options["lr"] * state["scale"] * torch.where(root > 0, g / root, 0.0))
        _project_(w)


def _ratio(w: Tensor, r: Tensor) -> Tensor | float:
    return _quotient(w.norm(), r.norm()) if w.ndim > 1 else 1.0


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """1 where one of the two is zero."""
    return torch.where((above > 0) & (below > 0), above / below, 1.0)


def _row_norms(x: Tensor) -> Tensor:
    """Norms of the rows ``[N, 1, ...]``; of a tensor of one axis, magnitudes ``[N]``."""
    return x.abs() if x.ndim < 2 else x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def _project_(w: Tensor) -> None:
    """Rows of zero mean and unit norm."""
    if w.ndim < 2 or w[0].numel() < 2:
        return
    rows = w.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    w.copy_((rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)).view_as(w))
