"""The formulas of the unit rule, row by row, without vectors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import MuonAdamW, scaling_group
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one


@dataclass(frozen=True)
class Row:
    """The elements of one parameter that lead into one value; ``unit`` is None if that is held fixed."""

    name: str
    index: tuple[Any, ...]
    unit: tuple[str, int] | None
    added: bool


def rows_of(module: nn.Module, streams: Mapping[str, str | None]) -> list[Row]:
    """The rows of all layers. ``streams`` says, by layer, whose units its outputs are."""
    rows = []
    for name, stream in streams.items():
        layer = module.get_submodule(name)
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
            per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
            indices: list[tuple[Any, ...]] = [
                (slice(group * inputs, (group + 1) * inputs), channel)
                for group in range(layer.groups)
                for channel in range(per_group)
            ]
        else:
            indices = [(channel,) for channel in range(len(next(layer.parameters())))]
        for channel, index in enumerate(indices):
            into = None if stream is None else (stream, channel)
            if hasattr(layer, "weight"):
                rows.append(Row(f"{name}.weight", index, into, False))
            if getattr(layer, "bias", None) is not None:
                rows.append(Row(f"{name}.bias", (channel,), into, True))
    return rows


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The singular values of a matrix made about equal, in the precision in which torch's Muon does it."""
    a, b, c = coefficients
    x = matrix.bfloat16()
    x = x.T if len(x) > len(x.T) else x
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if len(matrix) > len(matrix.T) else x).to(matrix.dtype)


class Reference:
    """Takes the steps of the rule "unit" as its documentation has them, one row after the other.

    Only the balanced member, and the one where gains are one, are the package's.
    """

    def __init__(self, module: nn.Module, x: Tensor, streams: Mapping[str, str | None]) -> None:
        self.module, self.x = module, x
        self.rows = rows_of(module, streams)
        self.parameters = dict(module.named_parameters())
        covered = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in self.parameters.items()}
        for row in self.rows:
            covered[row.name][row.index] += 1
        assert all(bool((count == 1).all()) for count in covered.values())
        self.second = [0.0] * len(self.rows)  # running mean of |g|^2 / n
        self.seen = [0.0] * len(self.rows)  # sum of its weights
        self.rho: list[float] = []  # from the first refresh on, for SGD
        self.own: list[float] = []  # root mean squares
        self.mean = math.nan  # the rho of other bases
        self.longer: dict[str, float] = {}  # norm of a matrix, relative to where gains are one
        self.whole: set[str] = set()  # parameters of which the base's steps are made as a whole
        self.state: dict[str, dict[str, Any]] = {name: {"step": 0} for name in self.parameters}

    def refresh(self) -> None:
        """To the balanced member."""
        group = scaling_group(self.module, self.x)
        factors = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        group.rescale_(factors, group.balance_())
        for name, p in self.parameters.items():
            factor = factors[name]
            if p.grad is not None:
                p.grad /= factor
            for entry, power in (("momentum_buffer", 1), ("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2)):
                if entry in self.state[name]:
                    self.state[name][entry] /= factor**power
        if not self.rho:
            weights = {name: p.detach().clone() for name, p in self.parameters.items()}
            log_scale = scale_to_gains_of_one(group, group.alive())
            if log_scale is not None:
                group.rescale_(weights, log_scale)
            self.magnitudes(weights)

    def magnitudes(self, where_gains_are_one: Mapping[str, Tensor] | None = None) -> None:
        """rho of all rows; without gains the weights are those where gains are one."""
        squares = [float(self.parameters[row.name].detach()[row.index].square().sum()) for row in self.rows]
        where_gains_are_one = where_gains_are_one or {name: p.detach() for name, p in self.parameters.items()}
        there = [float(where_gains_are_one[row.name][row.index].square().sum()) for row in self.rows]
        sizes = [self.parameters[row.name][row.index].numel() for row in self.rows]
        proper = [k for k in range(len(self.rows)) if sizes[k] > 1 and squares[k] > 0]
        of_parameter: dict[str, list[int]] = {}
        for k in proper:
            of_parameter.setdefault(self.rows[k].name, []).append(k)

        def elements(own: list[int]) -> int:
            return sum(sizes[k] for k in own)

        def typical(squares: list[float], count: Callable[[list[int]], float]) -> float:
            logs = [0.5 * math.log(sum(squares[k] for k in own) / count(own)) for own in of_parameter.values()]
            return math.exp(statistics.median(logs)) if logs else 1.0

        self.mean, usual, usual_norm = typical(there, elements), typical(squares, elements), typical(squares, len)
        self.longer = {
            name: math.sqrt(sum(squares[k] for k in own) / sum(there[k] for k in own))
            for name, own in of_parameter.items()
        }

        def bounded(own: float, usual: float) -> float:
            return max(own, 0.1 * usual) if own > 0 else usual

        for k, row in enumerate(self.rows):
            self.own.append(math.sqrt(squares[k] / sizes[k]))
            if sizes[k] > 1:
                own = math.sqrt(squares[k] / sizes[k])
                self.rho.append(max(own, usual) if row.added else bounded(own, usual))
            elif not row.added:
                self.rho.append(0.1 * bounded(math.sqrt(squares[k]), usual_norm))
            elif row.unit is None:
                self.rho.append(0.1 * usual_norm)
            else:
                into = [j for j, one in enumerate(self.rows) if one.unit == row.unit and not one.added]
                self.rho.append(0.1 * bounded(math.sqrt(sum(squares[j] for j in into)), usual_norm))

    def own_scale(self, k: int) -> float:
        """s of a row whose step is not linear."""
        row, own = self.rows[k], self.own[k]
        if row.name in self.whole:
            return self.longer.get(row.name, 1.0)
        if self.parameters[row.name][row.index].numel() == 1 or own == 0:
            return 1.0
        return max(own / self.mean, 1.0 if row.added else 1 / 3)

    def momentum_factor(self, options: Mapping[str, Any]) -> float:
        """Momentum times this has the size of one gradient."""
        momentum, dampening = options["momentum"], options["dampening"]
        return ((1 - momentum) * (1 - momentum**2) ** 0.5) ** 0.5 / (1 - dampening) if momentum else 1.0

    def step(self, base: Optimizer, options: Mapping[str, dict[str, Any]]) -> None:
        """One step with the options of each parameter."""
        self.whole = {name for name, chosen in options.items() if chosen.get("use_muon")}
        for name, p in self.parameters.items():
            if p.grad is not None and name in self.whole:
                self._muon(name, options[name], self.state[name])
            elif p.grad is not None:
                self.state[name]["step"] += 1
        gradients: dict[int, Tensor] = {}
        for k, row in enumerate(self.rows):
            gradient = self.parameters[row.name].grad
            if gradient is None or row.name in self.whole:
                continue
            g = gradients[k] = gradient[row.index].clone()
            n = g.numel()
            if n > 1 and not row.added:
                g -= 0.9 * g.mean()
            square = float(g.square().sum()) / n
            self.second[k] = 0.99 * self.second[k] + 0.01 * square
            self.seen[k] = 0.99 * self.seen[k] + 0.01
            v = self.second[k] / self.seen[k]
            if square > v:
                g *= math.sqrt(v / square)
        relative = [
            rho**2 * second / seen if seen else 0.0
            for rho, second, seen in zip(self.rho, self.second, self.seen, strict=True)
        ]
        faint = 1e-5 * math.sqrt(sum(relative) / len(relative))
        for k, g in gradients.items():
            row = self.rows[k]
            p = self.parameters[row.name]
            chosen, state, rho = options[row.name], self.state[row.name], self.rho[k]
            w = p.detach()[row.index].clone()
            v = self.second[k] / self.seen[k]
            if isinstance(base, SGD):
                s = self.momentum_factor(chosen) * rho / max(math.sqrt(v), faint / rho)
                direction = self._sgd(g + chosen["weight_decay"] * w / s, row, chosen, state)
            else:
                s = self.own_scale(k)
                if isinstance(base, AdamW | MuonAdamW):
                    w *= 1 - chosen["lr"] * chosen["weight_decay"]
                else:
                    g += chosen["weight_decay"] * w / s
                direction = self._adam(g, row, chosen, state)
            with torch.no_grad():
                p[row.index] = w - chosen["lr"] * s * direction

    @torch.no_grad()
    def _muon(self, name: str, chosen: dict[str, Any], state: dict[str, Any]) -> None:
        """Muon's step in the whole matrix."""
        p = self.parameters[name]
        assert p.grad is not None
        rate, momentum = chosen["lr"], chosen["momentum"]
        mean = state.setdefault("momentum_buffer", torch.zeros_like(p))
        mean.copy_(momentum * mean + (1 - momentum) * p.grad)
        along = (1 - momentum) * p.grad + momentum * mean if chosen["nesterov"] else mean
        step = orthogonalised(along, chosen["ns_coefficients"], chosen["ns_steps"])
        step *= 0.2 * math.sqrt(max(p.shape)) * self.longer.get(name, 1.0)
        p.copy_((1 - rate * chosen["weight_decay"]) * p - rate * step)

    def _held(self, state: dict[str, Any], row: Row, entry: str) -> Tensor:
        if entry not in state:
            state[entry] = torch.zeros_like(self.parameters[row.name].detach())
        held: Tensor = state[entry]
        return held

    def _sgd(self, g: Tensor, row: Row, chosen: dict[str, Any], state: dict[str, Any]) -> Tensor:
        momentum = chosen["momentum"]
        if not momentum:
            return g
        buffer = self._held(state, row, "momentum_buffer")
        first = state["step"] == 1
        buffer[row.index] = g if first else momentum * buffer[row.index] + (1 - chosen["dampening"]) * g
        return g + momentum * buffer[row.index] if chosen["nesterov"] else buffer[row.index].clone()

    def _adam(self, g: Tensor, row: Row, chosen: dict[str, Any], state: dict[str, Any]) -> Tensor:
        (beta1, beta2), step = chosen["betas"], state["step"]
        mean, square = self._held(state, row, "exp_avg"), self._held(state, row, "exp_avg_sq")
        mean[row.index] = beta1 * mean[row.index] + (1 - beta1) * g
        square[row.index] = beta2 * square[row.index] + (1 - beta2) * g * g
        if chosen["amsgrad"]:
            largest = self._held(state, row, "max_exp_avg_sq")
            largest[row.index] = torch.maximum(largest[row.index], square[row.index])
            square = largest
        return (mean[row.index] / (1 - beta1**step)) / ((square[row.index] / (1 - beta2**step)).sqrt() + chosen["eps"])
