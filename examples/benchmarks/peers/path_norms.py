"""Path norms: kappa, Path-SGD and PathCond, with p = 2.

*kappa* of an element is the derivative of the squared path norm

    gamma(w) = sum over paths P of  prod_{e in P} w_e^2,        kappa_e = d gamma / d(w_e^2),

the diagonal of the path kernel J^T J, where J is the Jacobian of the vector of path values. gamma is the sum of the
outputs that the network with every parameter squared has for an input of ones; paths start at inputs and at biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from lightning_ecopt import ScalingGroup, scaling_group

NORMALIZATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
NEWTON_STEPS = 200


class _PathSemantics(TorchFunctionMode):
    """Max pooling as a sum, since each of the elements that it sees is on a path; no dropout."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.max_pool2d or func is torch.max_pool2d:
            return _sum_pool2d(*args, **kwargs)
        if "max_pool" in name:
            raise ValueError(f"gamma has no sum in place of {name}: use nn.MaxPool2d or average pooling.")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _sum_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        raise ValueError(
            "gamma has no sum in place of a max pooling with dilation or with indices: use one without them."
        )
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, divisor_override=1)


def _refuse_normalization(module: nn.Module, method: str) -> None:
    for name, child in module.named_modules():
        if isinstance(child, NORMALIZATION):
            raise ValueError(
                f"{method} needs path norms, and they are not defined for the normalisation layer "
                f"{name or '(top level)'}, a {type(child).__name__}: use a network without normalisation layers."
            )


def path_kappa(module: nn.Module, example: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """kappa of every parameter, by one forward and one backward pass of one input.

    Activations must be the identity on non-negative numbers (ReLU, leaky ReLU and the like), and the outputs be those
    of the last layer (no softmax). Max pooling counts as a sum, as in Gonon et al., "A path-norm toolkit for modern
    networks", arXiv:2310.01225. Average pooling stays an average: its weights 1 / k are neither parameters nor
    squared, which on a plain network is one constant factor for all that is on its paths. Other maxima are left as
    they are.

    Args:
        module: the network.
        example: an input ``[batch, ...]``; only its shape matters.
        dtype: to compute in; by default that of the parameters.

    Returns:
        By parameter name, tensors of the parameters' shapes. Zero where no path of other non-zero elements passes.
        Rescaled weights w_e f_e have kappa_e / f_e^2.

    Raises:
        ValueError: if there is a max pooling other than a plain ``max_pool2d``.

    Example::

        kappa = path_kappa(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    """
    squares = {name: p.detach().to(dtype or p.dtype).square() for name, p in module.named_parameters()}
    like = next(iter(squares.values()))
    ones = torch.ones((1, *example.shape[1:]), dtype=like.dtype, device=like.device)
    with torch.enable_grad(), _PathSemantics():
        leaves = [square.requires_grad_() for square in squares.values()]
        gamma = functional_call(module, squares, (ones,)).sum()
    kappa = torch.autograd.grad(gamma, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(squares, kappa, strict=True))


class PathSGD(torch.optim.Optimizer):
    """Path-SGD with p = 2.

        w_e <- w_e - lr  c / kappa_e  dL/dw_e

    (Neyshabur, Salakhutdinov, Srebro, "Path-SGD: Path-Normalized Optimization in Deep Neural Networks",
    arXiv:1506.02617, where c = 1.) The step of a network rescaled by f is f times the step, so that training depends on
    the class alone. This holds with momentum and weight decay too, which are added after the division, to vectors
    that scale like the weights:

        d = c g / kappa + weight_decay w        b <- momentum b + d        w <- w - lr b

    With kappa = c this is ``torch.optim.SGD``. Where kappa is zero the quotient is taken as zero: no path of non-zero
    elements passes, and so the gradient is zero as well. (Slopes of ``nn.PReLU`` are on no path here, and stay.)

    kappa differs between networks by orders of magnitude: without a constant, so does the useful learning rate. By
    default the constant c makes the first step as long (in the l2 norm) as that of SGD, both taken at the balanced
    member of the class; taken at the weights as they are, c would depend on more than the class. A constant does not
    change the method.

    Args:
        module: the network, without normalisation layers; all its parameters that require a gradient are trained.
        example: an input ``[batch, ...]``; only its shape matters.
        lr: learning rate.
        momentum: factor of the momentum.
        weight_decay: factor of the weight decay.
        normalize: choose c at the first step with a gradient; otherwise c = 1. It is kept in ``state_dict()``.

    Raises:
        ValueError: if the module has a normalisation layer or a setting is negative.

    Example::

        optimizer = PathSGD(model, x, lr=0.1)
    """

    def __init__(
        self,
        module: nn.Module,
        example: Tensor,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        normalize: bool = True,
    ) -> None:
        _refuse_normalization(module, "Path-SGD")
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}: give a number from 0 on.")
        self._module = module
        self._example = example
        constant = None if normalize else 1.0
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "constant": constant}
        super().__init__([p for p in module.parameters() if p.requires_grad], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: a forward and a backward pass of one input, and a few passes over the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = self.param_groups[0]
        parameters = dict(self._module.named_parameters())
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        kappa = path_kappa(self._module, self._example)
        steps = {name: torch.where(kappa[name] > 0, g / kappa[name], 0.0) for name, g in gradients.items()}
        if settings["constant"] is None:
            settings["constant"] = self._constant(gradients, steps)
        for name, step in steps.items():
            parameter = parameters[name]
            step.mul_(1.0 if settings["constant"] is None else settings["constant"])
            if settings["weight_decay"]:
                step.add_(parameter, alpha=settings["weight_decay"])
            if settings["momentum"]:
                state = self.state[parameter]
                if "momentum_buffer" in state:
                    step = state["momentum_buffer"].mul_(settings["momentum"]).add_(step)
                state["momentum_buffer"] = step
            parameter.sub_(step, alpha=settings["lr"])
        return loss

    def _constant(self, gradients: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> float | None:
        """Length of the gradient over that of the quotients, both moved to the balanced member of the class."""
        group = scaling_group(self._module, self._example)
        before = [parameter.clone() for parameter in group.parameters.values()]
        log_scale = group.balance_()
        for parameter, old in zip(group.parameters.values(), before, strict=True):
            parameter.copy_(old)
        lengths = []
        for tensors, power in ((gradients, -1), (steps, 1)):
            moved = {name: tensor.clone() for name, tensor in tensors.items()}
            group.rescale_(moved, log_scale, power=power)
            lengths.append(float(torch.stack([tensor.norm() for tensor in moved.values()]).norm()) if moved else 0.0)
        return lengths[0] / lengths[1] if lengths[1] else None


@torch.no_grad()
def path_condition_(module: nn.Module, example: Tensor, group: ScalingGroup | None = None) -> Tensor:
    """Rescale the units of ``module`` in place so that the path kernel's diagonal is as level as can be.

    Over the log-scales s of the units, with f_e = s_into(e) - s_from(e) the logarithm of what element e is multiplied
    by (0 for what is held fixed), it minimises the convex function

        F(s) = p log( sum_e kappa_e exp(-2 f_e) ) + 2 sum_e f_e

    over the p trained elements with kappa_e > 0: biases too. kappa_e exp(-2 f_e) is the rescaled kappa, so that
    up to a constant F is p log(arithmetic mean / geometric mean of the rescaled kappa): the log-det divergence of
    their diagonal matrix, times its best constant, from the identity. (Lebeurrier, Vayer, Gribonval, "Path-conditioned
    training: a principled way to rescale ReLU neural networks", arXiv:2602.19799. Their published code runs at most 10
    sweeps over the units, with tolerance 0.01; here Newton steps go on to rounding. It counts elements with
    kappa_e = 0 in p as well, which makes no difference to a network where every element is on a path.)

    F has one minimum, and the network that it leads to depends on the class alone. Units without a path of non-zero
    elements are left alone. The system is dense, of the size of the number of units: for up to a few thousand.

    Args:
        module: the network, without normalisation layers; see :func:`path_kappa`.
        example: an input ``[batch, ...]``; only its shape matters.
        group: its scaling group; by default ``scaling_group(module, example)``.

    Returns:
        The log-scales ``[H]`` that were applied, in float64.

    Raises:
        ValueError: if the module has a normalisation layer, or its weights have a kappa that is not finite.
        RuntimeError: if the Newton steps do not end.

    Example::

        path_condition_(model, x)  # the same function
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    """
    _refuse_normalization(module, "PathCond")
    group = group or scaling_group(module, example)
    kappa = {name: value.cpu() for name, value in path_kappa(module, example, torch.float64).items()}
    size = group.num_units + 1
    mass, count = torch.zeros(2, size * size, dtype=torch.float64)
    for coupling in group.couplings:
        value = coupling.view(kappa[coupling.parameter])
        shape = torch.broadcast_shapes(coupling.incoming.shape, coupling.outgoing.shape)
        pair = (coupling.incoming % size * size + coupling.outgoing % size).reshape(-1)
        mass.index_add_(0, pair, value.sum_to_size(shape).reshape(-1))
        count.index_add_(0, pair, (value > 0).to(value).sum_to_size(shape).reshape(-1))
    if not bool(mass.isfinite().all()):
        raise ValueError("PathCond found a kappa that is not finite: check that all weights are finite and moderate.")
    scale = _level(mass.view(size, size), count.view(size, size), group.alive().cpu())
    group.act_(scale.to(next(iter(kappa.values())).device))
    return scale


def _level(mass: Tensor, count: Tensor, active: Tensor) -> Tensor:
    """The log-scales ``[H]`` that minimise F, given kappa and numbers of elements by unit: ``[into, from]``."""
    number = count.sum()
    padded = torch.zeros(len(mass), dtype=mass.dtype)
    moving = torch.nonzero(active).reshape(-1)

    def rescaled(scale: Tensor) -> Tensor:
        return mass * (2 * (scale - scale[:, None])).exp()

    def value(scale: Tensor) -> Tensor:
        return number * rescaled(scale).sum().log() + 2 * (count * (scale[:, None] - scale)).sum()

    for _ in range(NEWTON_STEPS if len(moving) else 0):
        share = rescaled(padded)
        share *= number / share.sum()
        surplus = share.sum(0) - share.sum(1)
        gradient = 2 * (surplus - count.sum(0) + count.sum(1))[moving]
        hessian = 4 * (torch.diag(share.sum(0) + share.sum(1)) - share - share.T - surplus.outer(surplus) / number)
        hessian = hessian[moving][:, moving]
        hessian.diagonal().add_(1e-14 * hessian.diagonal().max())
        step = torch.zeros_like(padded)
        step[moving] = -torch.linalg.solve(hessian, gradient)
        length = float(step.abs().max())
        step /= max(1.0, length)
        before = float(value(padded))
        while float(value(padded + step)) > before + 1e-13 * float(number):
            step /= 2
        padded = padded + step
        if length < 1e-9:
            return padded[:-1]
    if len(moving):
        raise RuntimeError(f"PathCond found no minimum in {NEWTON_STEPS} steps: call group.balance_() first.")
    return padded[:-1]
