"""Base optimizers, some of them as users write them, and what they do in the equivalent-class space by definition.

The definitions run the plain base optimizer on tensors of their own: explicit path coordinates, or weights over the
scales of their rows. Of the package they use the balanced member of a class and the choice of a skeleton alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import MuonAdamW, scaling_group
from lightning_ecopt.steps.skeleton import choose_skeleton
from tests.optim.reference import Reference
from tests.optim.training import loss_of
from tests.paths.explicit import ExplicitPaths

Make = Callable[[Iterable[Any]], Optimizer]

FREE_START = 2.0


class Lion(Optimizer):
    """Steps by the sign of momentum (Chen et al., arXiv:2302.06675)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            first, second = options["betas"]
            for p in options["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - options["lr"] * options["weight_decay"])
                p.sub_(mean.lerp(p.grad, 1 - first).sign(), alpha=options["lr"])
                mean.lerp_(p.grad, 1 - second)


class Orthogonal(Optimizer):
    """Momentum whose singular values are all made one, matrix by matrix; other tensors are divided by their length."""

    def __init__(self, params: Any, lr: float, mu: float = 0.8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "mu": mu, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(options["mu"]).add_(p.grad)
                if p.ndim == 2:
                    left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                    direction = left @ right
                else:
                    direction = momentum / momentum.norm()
                p.mul_(1 - options["lr"] * options["weight_decay"]).sub_(direction, alpha=options["lr"])


class UsersSGD(Optimizer):
    """Written in five minutes; knows no state."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if p.grad is not None:
                    p -= options["lr"] * p.grad


class Lamb(Optimizer):
    """Adam with steps as long as the whole tensor (You et al., arXiv:1904.00962)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            first, second = options["betas"]
            for p in options["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - first)
                square = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad**2, 1 - second)
                update = mean / (square.sqrt() + 1e-8) + options["weight_decay"] * p
                p.sub_(update * (p.norm() / update.norm()), alpha=options["lr"])


class ScheduleFree(Optimizer):
    """SGD between an average of weights and where steps lead (Defazio et al., arXiv:2405.15682)."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            options["taken"] += 1
            share, beta, lr = 1 / options["taken"], options["beta"], options["lr"]
            for p in options["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, share).sub_(p.grad, alpha=lr * (1 - beta * (1 - share)))
                z.sub_(p.grad, alpha=lr)

    def _lerp_to_z(self, factor: Callable[[float], float]) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], factor(options["beta"]))

    def eval(self) -> None:
        """From the weights of training to their average."""
        self._lerp_to_z(lambda beta: 1 - 1 / beta)

    def train(self) -> None:
        """Back to the weights of training."""
        self._lerp_to_z(lambda beta: 1 - beta)


@dataclass(frozen=True)
class Base:
    """A base optimizer.

    Args:
        make: it, for parameters.
        powers: by entry of its state, by which power of what makes weights larger it would be divided; entries that are
            not of the form of the weights are left out.
        matrices: whether it takes matrices alone.
        whole: numbers of the parameters of which its steps are made as a whole, if ``make`` is given a list.
    """

    make: Make
    powers: Mapping[str, int] = field(default_factory=dict)
    matrices: bool = False
    whole: tuple[int, ...] = ()


ADAM = {"exp_avg": 1, "exp_avg_sq": 2}
BASES: dict[str, Base] = {
    "sgd": Base(lambda params: optim.SGD(params, lr=0.05, weight_decay=0.01)),
    "nesterov": Base(
        lambda params: optim.SGD(params, lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.01),
        {"momentum_buffer": 1},
    ),
    "adam": Base(lambda params: optim.Adam(params, lr=0.01, weight_decay=0.01), ADAM),
    "adamw": Base(
        lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True), {**ADAM, "max_exp_avg_sq": 2}
    ),
    "nadam": Base(lambda params: optim.NAdam(params, lr=0.01, weight_decay=0.01), ADAM),
    "nadam_decoupled": Base(
        lambda params: optim.NAdam(params, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True), ADAM
    ),
    "radam": Base(lambda params: optim.RAdam(params, lr=0.1, weight_decay=0.01), ADAM),
    "adamax": Base(lambda params: optim.Adamax(params, lr=0.01, weight_decay=0.01), {"exp_avg": 1, "exp_inf": 1}),
    "adagrad": Base(lambda params: optim.Adagrad(params, lr=0.02, weight_decay=0.01), {"sum": 2}),
    "adagrad_initial": Base(lambda params: optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1), {"sum": 2}),
    "adadelta": Base(
        lambda params: optim.Adadelta(params, lr=2.0, rho=0.8, weight_decay=0.01), {"square_avg": 2, "acc_delta": 0}
    ),
    "rmsprop": Base(lambda params: optim.RMSprop(params, lr=0.003, weight_decay=0.01), {"square_avg": 2}),
    "rmsprop_centered": Base(
        lambda params: optim.RMSprop(params, lr=0.002, momentum=0.7, centered=True),
        {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    ),
    "rprop": Base(lambda params: optim.Rprop(params, lr=0.005), {"prev": 1, "step_size": 0}),
    "asgd": Base(lambda params: optim.ASGD(params, lr=0.05, lambd=0.01, t0=2, weight_decay=0.01), {"ax": -1}),
    "adafactor": Base(lambda params: optim.Adafactor(params, lr=0.05, weight_decay=0.01), {"variance": 2}),
    "lion": Base(lambda params: Lion(params, lr=0.005, weight_decay=0.1), {"exp_avg": 1}),
    "orthogonal": Base(lambda params: Orthogonal(params, lr=0.02, weight_decay=0.1), {"momentum": 1}),
    "users_sgd": Base(lambda params: UsersSGD(params, lr=0.05)),
    "lamb": Base(lambda params: Lamb(params, lr=0.01, weight_decay=0.01), ADAM),
    "schedule_free": Base(lambda params: ScheduleFree(params, lr=0.1), {"z": -1}),
}
if hasattr(optim, "Muon"):
    BASES["muon"] = Base(
        lambda params: optim.Muon(params, lr=0.02), {"momentum_buffer": 1}, matrices=True, whole=(0, 1, 2)
    )
    BASES["muon_adamw"] = Base(
        lambda params: MuonAdamW(params, lr=0.02, weight_decay=0.1), {"momentum_buffer": 1, **ADAM}, whole=(0, 2)
    )

#: SGD and Adam with the options that their formulas have, which the tests of the rules write out.
WITH_FORMULAS: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, lr=0.05),
    "decay": lambda params: optim.SGD(params, lr=0.05, weight_decay=1e-2),
    "momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda params: optim.SGD(params, lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-3),
    "dampening": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, dampening=0.4, weight_decay=1e-3),
    "adam": lambda params: optim.Adam(params, lr=0.01),
    "adam_l2": lambda params: optim.Adam(params, lr=0.01, weight_decay=0.03, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.3),
    "amsgrad": lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.3, amsgrad=True, betas=(0.8, 0.9)),
}
if hasattr(optim, "Muon"):
    WITH_FORMULAS["muon_adamw"] = lambda params: MuonAdamW(params, lr=0.02, weight_decay=0.3)


def entries_of(base: Base, optimizer: Optimizer, p: Tensor) -> dict[str, tuple[int, Tensor]]:
    """The power and the value of the entries of a state that go with the weights."""
    held = optimizer.state.get(p, {})
    return {
        entry: (power, held[entry])
        for entry, power in base.powers.items()
        if entry in held and held[entry].shape == p.shape
    }


class Definition:
    """A base optimizer in the equivalent-class space, by definition.

    Args:
        base: the optimizer.
        module: the network, in float64; it is copied.
        x: inputs to trace it with.
    """

    def __init__(self, base: Base, module: nn.Module, x: Tensor) -> None:
        self.base = base
        self.module = copy.deepcopy(module)
        self.group = scaling_group(self.module, x)
        self.parameters = dict(self.module.named_parameters())
        self.moved = {name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        self.optimizer = base.make(list(self.moved.values()))
        self.taken = 0

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def gradients(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Of the mean of the losses of some batches."""
        losses = [loss_of(self.module, x, y) for x, y in batches]
        found = torch.autograd.grad(torch.stack(losses).mean(), list(self.parameters.values()))
        return dict(zip(self.parameters, found, strict=True))

    def balance(self, gradients: dict[str, Tensor]) -> None:
        """To the balanced member, with gradients and what the base holds of weights."""
        factors = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        self.group.rescale_(factors, self.group.balance_())
        for name, factor in factors.items():
            if name in gradients:
                gradients[name] /= factor
            if self.taken:
                for power, value in entries_of(self.base, self.optimizer, self.moved[name]).values():
                    value /= factor**power

    def step(self, gradients: Mapping[str, Tensor], *, refresh: bool) -> None:
        """One step for the gradients of some of the weights, after a refresh if it is due."""
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        if refresh:
            self.refresh(gradients)
        self.move(gradients)
        self.taken += 1

    def refresh(self, gradients: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def move(self, gradients: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def allocate(self) -> None:
        """Where the base optimizer's tensors are, in weights."""
        raise NotImplementedError


class PathDefinition(Definition):
    """The base optimizer on the leaf tensors of explicit path coordinates, with gradients by autograd."""

    paths: ExplicitPaths

    def refresh(self, gradients: dict[str, Tensor]) -> None:
        with torch.no_grad():
            if self.taken:
                beta = torch.stack(self.paths._beta(self.moved))
                for name, v in self.moved.items():
                    for power, value in entries_of(self.base, self.optimizer, v).values():
                        value *= beta[self.paths.into[name]] ** power
                self._restart(self.weights())
            self.balance(gradients)
            weights = self.weights()
            skeleton = choose_skeleton(self.group.couplings, weights, self.group.alive())
            self.paths = ExplicitPaths(self.group, skeleton, weights, free_start=FREE_START)
            for name, v in self.moved.items():
                v.copy_(self.paths.v[name])
            if self.taken:
                self._restart(self.moved)

    def _restart(self, points: Mapping[str, Tensor]) -> None:
        """What is held at skeleton weights is given up: averages of weights are where the weights are."""
        for name, index in {*self.paths.fixed.values(), *self.paths.out.values()}:
            for entry, (power, value) in entries_of(self.base, self.optimizer, self.moved[name]).items():
                if power == -1:
                    value[index] = points[name][index]
                elif entry != "step_size":
                    value[index] = 0.0

    def move(self, gradients: dict[str, Tensor]) -> None:
        weights = self.paths.weights(self.moved)
        along = torch.stack([(weights[name] * gradient).sum() for name, gradient in gradients.items()]).sum()
        pulled = torch.autograd.grad(along, list(self.moved.values()), materialize_grads=True)
        for (name, v), gradient in zip(self.moved.items(), pulled, strict=True):
            v.grad = gradient if name in gradients else None
        self.optimizer.step()
        self.allocate()

    def allocate(self) -> None:
        with torch.no_grad():
            for name, weight in self.paths.weights(self.moved).items():
                self.parameters[name].copy_(weight)


class UnitDefinition(Definition):
    """The base optimizer on weights divided by the scales of their rows, one row after the other."""

    def __init__(self, base: Base, module: nn.Module, x: Tensor) -> None:
        super().__init__(base, module, x)
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        self.rows = Reference(self.module, x, {**{name: name for name in layers}, layers[-1]: None})
        self.rows.whole = {list(self.parameters)[number] for number in self.base.whole}

    def refresh(self, gradients: dict[str, Tensor]) -> None:
        self.balance(gradients)
        if not self.taken:
            self.rows.magnitudes()

    def _scales(self, gradients: dict[str, Tensor]) -> list[float]:
        """Centres and clips the gradients; s of every row."""
        rows = self.rows
        for k, row in enumerate(rows.rows):
            if row.name not in gradients or row.name in rows.whole:
                continue
            g = gradients[row.name][row.index]
            if g.numel() > 1 and not row.added:
                g = g - 0.9 * g.mean()
            square = float(g.square().mean())
            rows.second[k] = 0.99 * rows.second[k] + 0.01 * square
            rows.seen[k] = 0.99 * rows.seen[k] + 0.01
            running = rows.second[k] / rows.seen[k]
            gradients[row.name][row.index] = g * (math.sqrt(running / square) if square > running else 1.0)
        if not isinstance(self.optimizer, optim.SGD | optim.ASGD):
            return [rows.own_scale(k) for k in range(len(rows.rows))]
        deviations = [math.sqrt(second / max(seen, 0.01)) for second, seen in zip(rows.second, rows.seen, strict=True)]
        relative = [(rho * deviation) ** 2 for rho, deviation in zip(rows.rho, deviations, strict=True)]
        faint = 1e-5 * math.sqrt(sum(relative) / len(relative))
        factor = {
            id(p): rows.momentum_factor({"momentum": 0.0, "dampening": 0.0, **options})
            for options in self.optimizer.param_groups
            for p in options["params"]
        }
        return [
            factor[id(self.moved[row.name])] * rho / max(deviation, faint / rho)
            for row, rho, deviation in zip(rows.rows, rows.rho, deviations, strict=True)
        ]

    @torch.no_grad()
    def _to_rows(self, scales: list[float], tensors: Mapping[str, Tensor]) -> None:
        """Divide tensors, and averages of weights, by the scales of the rows."""
        for row, scale in zip(self.rows.rows, scales, strict=True):
            tensors[row.name][row.index] /= scale
            for power, value in entries_of(self.base, self.optimizer, self.moved[row.name]).values():
                if power == -1:
                    value[row.index] /= scale

    def move(self, gradients: dict[str, Tensor]) -> None:
        scales = self._scales(gradients)
        with torch.no_grad():
            for name, u in self.moved.items():
                u.copy_(self.parameters[name])
                u.grad = gradients.get(name)
            self._to_rows(scales, self.moved)
            self.optimizer.step()
            self._to_rows([1 / scale for scale in scales], self.moved)
        self.allocate()

    @torch.no_grad()
    def allocate(self) -> None:
        for name, u in self.moved.items():
            self.parameters[name].copy_(u)


DEFINITIONS: dict[str, type[Definition]] = {"path": PathDefinition, "unit": UnitDefinition}
