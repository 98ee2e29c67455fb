"""The rule "unit": against its formulas in plain loops, over whole runs in a class, and where things go wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, plain_cnn
from tests.optim.training import (
    batches,
    distance,
    loss_of,
    only_refresh,
    problem,
    put_back,
    rescaled,
    same_bits,
    through_a_file,
    train,
    weights_of,
)

Make = Callable[[Iterable[Any]], Optimizer]

BASES: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.05),
    "decay": lambda params: SGD(params, lr=0.05, weight_decay=1e-2),
    "momentum": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda params: SGD(params, lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-3),
    "dampening": lambda params: SGD(params, lr=0.05, momentum=0.9, dampening=0.4, weight_decay=1e-3),
    "adam": lambda params: Adam(params, lr=0.01),
    "adam_l2": lambda params: Adam(params, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda params: AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True),
}


def unit(module: nn.Module, x: Tensor, base: str | Make, **wrapper: Any) -> EquivalentClassOptimizer:
    """A base optimizer with steps relative to units."""
    make = BASES[base] if isinstance(base, str) else base
    return EquivalentClassOptimizer(make(module.parameters()), scaling_group(module, x), rule="unit", **wrapper)


def data(shape: tuple[int, ...], outputs: int, *, regression: bool, size: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs that are not centred, as pixels, and targets that a random teacher has set."""
    x = torch.rand(size, *shape, dtype=torch.float64) + 0.3 * torch.randn(size, *shape, dtype=torch.float64)
    score = (x - x.mean(0)).flatten(1) @ torch.randn(x[0].numel(), outputs, dtype=torch.float64)
    return x, score / score.std() if regression else score.argmax(1)


def finite(module: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters())


def saved(optimizer: EquivalentClassOptimizer) -> dict[str, Tensor]:
    """What the rule saves."""
    state: dict[str, Tensor] = copy.deepcopy(optimizer.state_dict()["equivalent_class"])
    return state


# The class alone ------------------------------------------------------------------------------------------------------


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "mlp": (lambda: mlp(6, 8, 8, 3), (6,), 3, False),
    "prelu": (lambda: mlp(6, 8, 8, 3, activation=nn.PReLU), (6,), 3, True),
    "cnn": (plain_cnn, (1, 8, 8), 3, False),
    "residual": (ResidualMLP, (3,), 2, True),
    "resnet": (ResNet, (1, 6, 6), 3, False),
    "dense": (DenseNet, (1, 5, 5), 3, False),
}


@pytest.mark.parametrize(
    ("name", "base"),
    [("mlp", base) for base in ("sgd", "decay", "momentum", "dampening", "adam", "adam_l2", "adamw")]
    + [("prelu", "adam"), ("cnn", "nesterov"), ("cnn", "amsgrad"), ("residual", "momentum")]
    + [("dense", "momentum"), ("resnet", "amsgrad")],
)
def test_a_run_depends_on_the_class_alone(name: str, base: str) -> None:
    torch.manual_seed(3)
    build, shape, outputs, regression = NETWORKS[name]
    module = build().double()
    x, y = data(shape, outputs, regression=regression)
    other = rescaled(module, x)
    assert distance(module, other, x) < 1e-12
    hidden = [name for name, p in module.named_parameters() if p.ndim > 1 and "head" not in name]
    assert any(not torch.allclose(module.get_parameter(name), other.get_parameter(name), rtol=0.3) for name in hidden)
    start = copy.deepcopy(module)
    for one in (module, other):
        optimizer = unit(one, x, base, refresh_interval=17)
        losses = train(one, optimizer, x, y, range(104))
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
        # Between two refreshes the members need not be the same, but here both have gone on from one.
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-12
    assert distance(start, module, x) > 1e-2
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("base", ["momentum", "amsgrad"])
def test_a_run_that_is_rescaled_on_the_way_goes_on_as_if_it_were_not(base: str) -> None:
    torch.manual_seed(5)
    module = ResidualMLP().double()
    x, y = data((3,), 2, regression=True)
    other = copy.deepcopy(module)
    optimizers = unit(module, x, base), unit(other, x, base)
    for start in range(0, 30, 10):
        for one, optimizer in zip((module, other), optimizers, strict=True):
            train(one, optimizer, x, y, range(start, start + 10))
            optimizer.refresh()
        group = optimizers[1].group
        assert group is not None
        log_scale = torch.randn(group.num_units, dtype=torch.float64)
        group.act_(log_scale)
        # What the base holds are covectors, and squares of them.
        for power, entry in ((1, "momentum_buffer"), (1, "exp_avg"), (2, "exp_avg_sq"), (2, "max_exp_avg_sq")):
            tensors = {name: optimizers[1].state[p].get(entry) for name, p in other.named_parameters()}
            group.rescale_(tensors, log_scale, power=-power)
    for optimizer in optimizers:
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-10
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


class Stack(nn.Module):
    """Layers of any widths, each with or without a block around it that is skipped."""

    def __init__(self, widths: list[int], blocks: list[int], bias: bool, slope: float) -> None:
        super().__init__()
        self.slope = slope
        sizes = [3, *widths]
        self.layers = nn.ModuleList(nn.Linear(sizes[k], sizes[k + 1], bias=bias) for k in range(len(widths)))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(w, inner, bias=bias), nn.ReLU(), nn.Linear(inner, w, bias=bias))
            if inner
            else nn.Identity()
            for w, inner in zip(widths, blocks, strict=True)
        )
        self.head = nn.Linear(widths[-1], 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = F.leaky_relu(layer(x), self.slope)
            x = F.leaky_relu(x + block(x), self.slope)
        return self.head(x)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=3),
    bias=st.booleans(),
    slope=st.sampled_from([0.0, 0.2]),
    base=st.sampled_from(sorted(BASES)),
    refresh_interval=st.sampled_from([2, 5, None]),
)
def test_a_run_of_any_stack_depends_on_the_class_alone(
    seed: int, sizes: list[tuple[int, int]], bias: bool, slope: float, base: str, refresh_interval: int | None
) -> None:
    torch.manual_seed(seed)
    widths, blocks = [size for size, _ in sizes], [inner for _, inner in sizes]
    module = Stack(widths, blocks, bias, slope).double()
    x, y = data((3,), 2, regression=True)
    other = rescaled(module, x)
    start = copy.deepcopy(module)
    for one in (module, other):
        optimizer = unit(one, x, base, refresh_interval=refresh_interval)
        train(one, optimizer, x, y, range(12))
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-9
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert distance(start, module, x) > 1e-6


def test_staying_at_the_current_weights_is_not_invariant() -> None:
    module, x, y = problem(4, 6, 2)
    other = rescaled(module, x)
    for one in (module, other):
        train(one, unit(one, x, "sgd", representative="current"), x, y, range(20))
    assert distance(module, other, x) > 1e-3


class BiasedNorm(nn.Module):
    """A bias that a batch norm takes out again: its gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw"])
def test_a_gradient_that_is_rounding_alone_moves_nothing(base: str) -> None:
    torch.manual_seed(0)
    module = BiasedNorm().double()
    x, y = data((1, 6, 6), 3, regression=False)
    other = rescaled(module, x)
    before = module.conv.bias.detach().clone()
    for one in (module, other):
        plain = BASES[base](one.parameters())
        for options in plain.param_groups:
            options["weight_decay"] = 0.0
        train(one, EquivalentClassOptimizer(plain, scaling_group(one, x), rule="unit"), x, y, range(32))
    assert distance(module, other, x) < 1e-8
    torch.testing.assert_close(module.conv.bias.detach(), before, rtol=0, atol=1e-6)


# The formulas, in loops -----------------------------------------------------------------------------------------------


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


class Reference:
    """Takes the steps of the rule "unit" as its documentation has them, one row after the other.

    Only the balanced member is the package's.
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
        self.rho: list[float] = []  # from the first refresh on
        self.mean = math.nan
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
            self.magnitudes()

    def magnitudes(self) -> None:
        """rho of all rows."""
        squares = [float(self.parameters[row.name].detach()[row.index].square().sum()) for row in self.rows]
        sizes = [self.parameters[row.name][row.index].numel() for row in self.rows]
        proper = [k for k, row in enumerate(self.rows) if sizes[k] > 1 and not row.added]
        self.mean = math.sqrt(sum(squares[k] for k in proper) / sum(sizes[k] for k in proper))
        mean_norm = math.sqrt(sum(squares[k] for k in proper) / len(proper))

        def bounded(own: float, usual: float) -> float:
            return max(own, 0.1 * usual) if own > 0 else usual

        for k, row in enumerate(self.rows):
            if k in proper:
                self.rho.append(bounded(math.sqrt(squares[k] / sizes[k]), self.mean))
            elif not row.added:
                self.rho.append(0.1 * bounded(math.sqrt(squares[k]), mean_norm))
            elif row.unit is None:
                self.rho.append(0.1 * mean_norm)
            else:
                into = [j for j, one in enumerate(self.rows) if one.unit == row.unit and not one.added]
                self.rho.append(0.1 * bounded(math.sqrt(sum(squares[j] for j in into)), mean_norm))

    def step(self, base: Optimizer, options: Mapping[str, dict[str, Any]]) -> None:
        """One step with the options of each parameter."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.state[name]["step"] += 1
        gradients: dict[int, Tensor] = {}
        for k, row in enumerate(self.rows):
            gradient = self.parameters[row.name].grad
            if gradient is None:
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
                momentum, dampening = chosen["momentum"], chosen["dampening"]
                rate = (1 - momentum) / (1 - dampening) if momentum else 1.0
                s = rate * rho / max(math.sqrt(v), faint / rho)
                direction = self._sgd(g + chosen["weight_decay"] * w / s, row, chosen, state)
            else:
                s = rho / self.mean
                if isinstance(base, AdamW):
                    w *= 1 - chosen["lr"] * chosen["weight_decay"]
                else:
                    g += chosen["weight_decay"] * w / s
                direction = self._adam(g, row, chosen, state)
            with torch.no_grad():
                p[row.index] = w - chosen["lr"] * s * direction

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


class Norms(nn.Module):
    """Batch norms, one with a skip around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        return self.head(F.relu(x + self.norm2(self.conv(x))).mean((2, 3)))


class Map(nn.Module):
    """Adds numbers of its own to every place of every channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.1 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def convolutions(groups: int, *, transposed: bool, kernel: int = 2, outputs: int = 4) -> nn.Sequential:
    """A hidden convolution of the given kind."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.LeakyReLU(0.1),
        kind(4, outputs, kernel, groups=groups),
        nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(outputs, 2),
    )


IN_A_ROW = {"0": "a", "2": "b", "6": None}
EXAMPLES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, str | None]]] = {
    "mlp": (lambda: mlp(4, 6, 5, 3), (4,), 3, {"0": "a", "2": "b", "4": None}),
    "one_input": (lambda: mlp(1, 5, 1, 2), (1,), 2, {"0": "a", "2": "b", "4": None}),
    "no_bias": (lambda: mlp(4, 6, 3, bias=False), (4,), 3, {"0": "a", "2": None}),
    "slope": (lambda: mlp(4, 6, 3, activation=nn.PReLU), (4,), 3, {"0": "a", "1": None, "2": None}),
    "cnn": (plain_cnn, (1, 8, 8), 3, {"0": "a", "3": "b", "7": None}),
    "residual": (ResidualMLP, (3,), 2, {"stem": "a", "up": "b", "down": "a", "head": None}),
    "dense": (DenseNet, (1, 5, 5), 3, {"stem": "a", "one": "b", "two": "c", "head": None}),
    "norms": (Norms, (1, 5, 5), 2, {"stem": None, "norm1": "a", "conv": None, "norm2": "a", "head": None}),
    "map": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), Map(3, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), mlp(3, 2)),
        (1, 3, 3),
        2,
        {"0": "a", "1": "a", "5.0": None},
    ),
    "grouped": (lambda: convolutions(2, transposed=False), (2, 5, 5), 2, IN_A_ROW),
    "depthwise": (lambda: convolutions(4, transposed=False, outputs=8), (2, 5, 5), 2, IN_A_ROW),
    "transposed": (lambda: convolutions(1, transposed=True, outputs=3), (2, 5, 5), 2, IN_A_ROW),
    "grouped_transposed": (lambda: convolutions(2, transposed=True, outputs=6), (2, 5, 5), 2, IN_A_ROW),
    "grouped_transposed_pointwise": (lambda: convolutions(2, transposed=True, kernel=1), (2, 5, 5), 2, IN_A_ROW),
    "depthwise_transposed": (lambda: convolutions(4, transposed=True, outputs=8), (2, 5, 5), 2, IN_A_ROW),
}
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def agree(module: nn.Module, optimizer: EquivalentClassOptimizer, reference: Reference) -> None:
    """Weights and what the base optimizer keeps are those of the reference."""
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, reference.parameters[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: n + m)
        for entry in POWERS:
            held, expected = optimizer.state[p].get(entry), reference.state[name].get(entry)
            assert (held is None) == (expected is None), (name, entry)
            if held is not None:
                scale = float(expected.abs().max())
                torch.testing.assert_close(
                    held, expected, rtol=1e-11, atol=1e-13 * scale, msg=lambda m, n=name, e=entry: f"{e} of {n}: {m}"
                )


def run_both(
    module: nn.Module,
    optimizer: EquivalentClassOptimizer,
    reference: Reference,
    x: Tensor,
    y: Tensor,
    steps: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train both and compare them after every step; ``after`` is called with the number of the step."""
    names = {id(p): name for name, p in module.named_parameters()}
    for step in range(steps):
        for one in (module, reference.module):
            one.zero_grad()
            # A batch in three is of another size, so that some gradients are clipped.
            (loss_of(one, *batches(x, y, step)) * (4.0 if step % 3 == 2 else 1.0)).backward()
        if step % (optimizer.refresh_interval or steps) == 0:
            reference.refresh()
        options = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        reference.step(optimizer.optimizer, options)
        optimizer.step()
        agree(module, optimizer, reference)
        after(step)


def example(name: str) -> tuple[nn.Module, Tensor, Tensor, Reference]:
    """A network in general position, data, and the reference that starts with a copy."""
    torch.manual_seed(1)
    build, shape, outputs, streams = EXAMPLES[name]
    module = build().double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1 + 0.3 * torch.randn_like(p))
            if name == "norms" and p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    x, y = data(shape, outputs, regression=True, size=32)
    return module, x, y, Reference(copy.deepcopy(module), x, streams)


@pytest.mark.parametrize(
    ("name", "base"),
    [("mlp", base) for base in BASES if base != "nesterov"]
    + [(name, "nesterov") for name in EXAMPLES]
    + [(name, "amsgrad") for name in ("one_input", "slope", "norms", "transposed", "grouped_transposed")],
)
def test_steps_are_those_of_the_formulas(name: str, base: str) -> None:
    module, x, y, reference = example(name)
    optimizer = unit(module, x, base, refresh_interval=3)
    run_both(module, optimizer, reference, x, y, 7)
    assert optimizer.statistics().dormant_units == 0


def test_some_gradients_of_the_comparison_are_clipped() -> None:
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, "sgd", refresh_interval=None)
    run_both(module, optimizer, reference, x, y, 10)
    assert 0.1 < optimizer.statistics().clipped < 0.6


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_small_rows_have_a_floor(base: str) -> None:
    module, x, y, reference = example("mlp")
    with torch.no_grad():
        for one in (module, reference.module):
            one[2].weight[1] *= 1e-3  # far below the others, also when it is balanced
            one[2].bias[1] *= 1e-3
            one[4].weight[:, 1] *= 1e-3
            one[4].weight[2] *= 1e-3
    run_both(module, unit(module, x, base, refresh_interval=4), reference, x, y, 6)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_rows_of_zeros_take_the_steps_of_the_mean(base: str) -> None:
    module, x, y, reference = example("residual")
    with torch.no_grad():
        for one in (module, reference.module):
            for p in one.down.parameters():
                p.zero_()
    run_both(module, unit(module, x, base, refresh_interval=4), reference, x, y, 6)
    assert bool((module.down.weight != 0).all())


def test_rows_keep_the_steps_that_they_had_at_the_start() -> None:
    """However much their weights have grown or shrunk since, also in a checkpoint."""
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "momentum", refresh_interval=3)
    train(module, optimizer, x, y, range(1))
    before = saved(optimizer)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
    train(module, optimizer, x, y, range(1, 8))
    other = unit(module, x, "momentum", refresh_interval=3)
    other.load_state_dict(optimizer.state_dict())
    train(module, other, x, y, range(8, 12))
    for one in (optimizer, other):
        assert torch.equal(saved(one)["rho"], before["rho"])
        assert torch.equal(saved(one)["reference"], before["reference"])


def test_small_gains_have_a_floor() -> None:
    module, x, y, reference = example("norms")
    with torch.no_grad():
        for one in (module, reference.module):
            one.norm1.weight[0] = 1e-3
            one.norm2.weight[0] = -1e-4
            one.norm1.bias[0] = one.norm2.bias[0] = 1e-3
    run_both(module, unit(module, x, "momentum", refresh_interval=4), reference, x, y, 6)


def test_parameter_groups_have_rates_and_momentum_of_their_own() -> None:
    module, x, y, reference = example("mlp")

    def make(_: Iterable[nn.Parameter]) -> Optimizer:
        return SGD(
            [
                {"params": [*module[0].parameters()], "lr": 0.02, "momentum": 0.0, "weight_decay": 0.1},
                {"params": [module[2].weight, module[4].bias], "momentum": 0.5, "nesterov": True},
                {"params": [module[4].weight, module[2].bias], "dampening": 0.3},
            ],
            lr=0.05,
            momentum=0.9,
        )

    run_both(module, unit(module, x, make, refresh_interval=4), reference, x, y, 7)


def test_a_schedule_may_change_rate_and_momentum() -> None:
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, "nesterov", refresh_interval=7)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, base_momentum=0.5)
    seen = set()

    def advance(step: int) -> None:
        scheduler.step()
        seen.add(optimizer.param_groups[0]["momentum"])

    run_both(module, optimizer, reference, x, y, 10, advance)
    assert len(seen) == 10


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    base=st.sampled_from(sorted(BASES)),
    refresh_interval=st.sampled_from([1, 3, None]),
)
def test_steps_of_any_perceptron_are_those_of_the_formulas(
    seed: int, widths: list[int], outputs: int, bias: bool, base: str, refresh_interval: int | None
) -> None:
    torch.manual_seed(seed)
    widths[0] = max(widths[0], 2)  # some row has more than one element
    module = mlp(*widths, outputs, bias=bias, activation=nn.LeakyReLU).double()
    x, y = data((widths[0],), outputs, regression=True, size=32)
    last = 2 * (len(widths) - 1)
    streams = {str(k): str(k) if k < last else None for k in range(0, last + 1, 2)}
    reference = Reference(copy.deepcopy(module), x, streams)
    run_both(module, unit(module, x, base, refresh_interval=refresh_interval), reference, x, y, 6)


# What the learning rate is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "lr"), [(2, 0.1), (4, 1e-3), (7, 0.03), (20, 0.1), (64, 1e-3)])
def test_the_rate_of_sgd_is_the_relative_length_of_a_step(width: int, lr: float) -> None:
    torch.manual_seed(0)
    module = mlp(5, width, width, 3, activation=nn.LeakyReLU).double()
    x, y = data((5,), 3, regression=True)
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    train(module, unit(module, x, lambda params: SGD(params, lr=lr)), x, 1e3 * y, range(1))
    for name, p in module.named_parameters():
        if name.endswith("weight"):
            before = start.get_parameter(name)
            ratio = (p - before).norm(dim=1) / before.norm(dim=1)
            torch.testing.assert_close(ratio, torch.full_like(ratio, lr), rtol=1e-11, atol=0)
        else:  # a tenth of the norm of the weights into the same unit, or of the mean norm
            weight = start.get_parameter(name.replace("bias", "weight"))
            rows = [q.square().sum(1) for q in start.parameters() if q.ndim == 2]
            norm = torch.cat(rows).mean().sqrt() if name.startswith("4") else weight.norm(dim=1)
            moved = (p - start.get_parameter(name)).abs()
            torch.testing.assert_close(moved, (0.1 * lr * norm).expand_as(moved), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.8, 0.6)])
def test_under_a_constant_gradient_the_rate_is_the_length_whatever_the_momentum(
    momentum: float, dampening: float
) -> None:
    module, x, _ = problem(5, 6, 3)
    gradients = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    optimizer = unit(module, x, lambda params: SGD(params, lr=1e-3, momentum=momentum, dampening=dampening))
    only_refresh(optimizer)
    magnitude = module[0].weight.detach().norm(dim=1)
    for _ in range(240):
        before = module[0].weight.detach().clone()
        for name, p in module.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step()
    moved = (module[0].weight.detach() - before).norm(dim=1)
    torch.testing.assert_close(moved, 1e-3 * magnitude, rtol=1e-9, atol=0)


@pytest.mark.parametrize("base", ["sgd", "momentum", "amsgrad"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_the_loss_does_not_matter(base: str, factor: float) -> None:
    module, x, y = problem(4, 6, 5, 3)
    other = copy.deepcopy(module)
    pair = []
    for one in (module, other):
        plain = BASES[base](one.parameters())
        for options in plain.param_groups:
            options["weight_decay"] = 0.0
            if "eps" in options:
                options["eps"] = 1e-40
        pair.append(EquivalentClassOptimizer(plain, scaling_group(one, x), rule="unit", refresh_interval=7))
    for step in range(20):
        for one, optimizer, times in zip((module, other), pair, (1.0, factor), strict=True):
            optimizer.zero_grad()
            (times * loss_of(one, *batches(x, y, step))).backward()
            optimizer.step()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_maximizing_is_minimizing_the_opposite() -> None:
    for make in (SGD, AdamW):
        module, x, y = problem(4, 6, 5, 3)
        other = copy.deepcopy(module)
        first = unit(module, x, lambda params, make=make: make(params, lr=0.02), refresh_interval=5)
        second = unit(other, x, lambda params, make=make: make(params, lr=0.02, maximize=True), refresh_interval=5)
        for step in range(12):
            for one, optimizer, sign in ((module, first, 1), (other, second, -1)):
                optimizer.zero_grad()
                (sign * loss_of(one, *batches(x, y, step))).backward()
                optimizer.step()
        assert same_bits(module, other)


# What belongs to the user and to the base -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["momentum", "amsgrad"])
def test_gradients_are_the_users_again_after_a_step(base: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base)
    train(module, optimizer, x, y, range(3))
    optimizer.zero_grad()
    loss_of(module, x, y).backward()
    tensors = {name: p.grad for name, p in module.named_parameters()}
    values = {name: gradient.clone() for name, gradient in tensors.items() if gradient is not None}
    optimizer.step()
    for name, p in module.named_parameters():
        assert p.grad is tensors[name]
        assert torch.equal(p.grad, values[name])


KINDS: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: AdamW(params, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_base_goes_on_from_a_saved_state(kind: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, KINDS[kind])
    train(module, optimizer, x, y, range(5))
    plain = KINDS[kind](module.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in module.parameters():
        assert plain.state[p].keys() == optimizer.state[p].keys()
        for entry, value in plain.state[p].items():
            assert torch.equal(value, optimizer.state[p][entry])
    losses = train(module, plain, x, y, range(5, 45))
    assert sum(losses[-4:]) < sum(losses[:4])


def test_the_saved_momentum_of_one_gradient_is_that_gradient_centred() -> None:
    module, x, y = problem(4, 6, 5, 3)
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    loss_of(start, *batches(x, y, 0)).backward()
    optimizer = unit(module, x, lambda params: SGD(params, lr=0.05, momentum=0.9))
    train(module, optimizer, x, y, range(1))
    plain = SGD(module.parameters(), lr=0.05, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    for name, p in module.named_parameters():
        g = start.get_parameter(name).grad
        expected = g - 0.9 * g.mean(1, keepdim=True) if g.ndim == 2 else g
        torch.testing.assert_close(plain.state[p]["momentum_buffer"], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_plain_base_is_taken_over(kind: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    plain = KINDS[kind](module.parameters())
    train(module, plain, x, y, range(5))
    before = weights_of(module)
    optimizer = unit(module, x, KINDS[kind])
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    only_refresh(optimizer)
    for entry, power in POWERS.items():
        for name, p in module.named_parameters():
            if entry in plain.state[p]:
                expected = plain.state[p][entry] * (before[name] / p.detach()) ** power
                torch.testing.assert_close(optimizer.state[p][entry], expected, rtol=1e-9, atol=1e-15)
    losses = train(module, optimizer, x, y, range(5, 45))
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [("path", "unit"), ("unit", "path")])
def test_a_checkpoint_of_the_other_rule_starts_anew(kind: str, first: str, second: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = EquivalentClassOptimizer(KINDS[kind](module.parameters()), scaling_group(module, x), rule=first)
    train(module, optimizer, x, y, range(5))
    state = through_a_file(optimizer.state_dict())
    assert state["equivalent_class"]["rule"] == first
    twin = copy.deepcopy(module)
    other = EquivalentClassOptimizer(KINDS[kind](twin.parameters()), scaling_group(twin, x), rule=second)
    other.load_state_dict(copy.deepcopy(state))  # a torch optimizer goes on with the tensors that it is given
    losses = train(twin, other, x, y, range(5, 35))
    assert finite(twin)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert other.state_dict()["equivalent_class"]["rule"] == second

    # As if the plain base had been saved.
    third = EquivalentClassOptimizer(KINDS[kind](module.parameters()), scaling_group(module, x), rule=second)
    third.load_state_dict({key: value for key, value in state.items() if key != "equivalent_class"})
    assert train(module, third, x, y, range(5, 35)) == losses
    assert same_bits(module, twin)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "stop"), [("momentum", stop) for stop in (0, 1, 6, 7, 8)] + [("amsgrad", 1), ("amsgrad", 7)]
)
def test_a_resumed_run_has_the_same_bits(base: str, stop: int) -> None:
    def fresh() -> tuple[nn.Module, EquivalentClassOptimizer]:
        torch.manual_seed(1)
        module = ResidualMLP()
        return module, unit(module, x, base, refresh_interval=7)

    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    reference, optimizer = fresh()
    losses = train(reference, optimizer, x, y, range(15))

    module, optimizer = fresh()
    assert train(module, optimizer, x, y, range(stop)) == losses[:stop]
    state = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    train(module, optimizer, x, y, range(stop, 15))  # goes on after it was saved
    assert same_bits(module, reference)

    again, optimizer = fresh()
    again.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(again, optimizer, x, y, range(stop, 15)) == losses[stop:]
    assert same_bits(again, reference)


def test_a_saved_state_does_not_move_on_with_the_run() -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "sgd")
    train(module, optimizer, x, y, range(3))
    state = optimizer.state_dict()["equivalent_class"]
    frozen = copy.deepcopy(state)
    train(module, optimizer, x, y, range(3, 6))
    for key in ("rho", "reference", "second", "weight"):
        assert torch.equal(state[key], frozen[key])
    assert not torch.equal(saved(optimizer)["second"], frozen["second"])


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 7, 3), "made with 6 units, this network has 7"),
        ((4, 6, 2), r"made with 18 rows of weights, this optimizer has 16: load it into the network"),
    ],
)
def test_a_checkpoint_of_a_network_with_other_rows_is_an_error(widths: tuple[int, ...], message: str) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = unit(module, x, "sgd")
    train(module, optimizer, x, y, range(2))
    other, x, y = problem(*widths)
    wrapped = unit(other, x, "sgd")

    def load_and_go_on() -> None:
        wrapped.load_state_dict(through_a_file(optimizer.state_dict()))
        train(other, wrapped, x, y, range(1))

    with pytest.raises(ValueError, match=message):
        load_and_go_on()


# Where things go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_zero_residual_branch_learns(base: str) -> None:
    torch.manual_seed(0)
    module = ResidualMLP().double()
    nn.init.zeros_(module.down.weight)
    nn.init.zeros_(module.down.bias)
    x, y = data((3,), 2, regression=True)
    optimizer = unit(module, x, base, refresh_interval=10)
    losses = train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 5
    assert bool((module.down.weight != 0).any())
    losses += train(module, optimizer, x, y, range(1, 80))
    assert optimizer.statistics().dormant_units == 0
    assert finite(module)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_zero_last_layer_learns(base: str) -> None:
    torch.manual_seed(0)
    module = mlp(6, 8, 8, 3).double()
    nn.init.zeros_(module[4].weight)
    nn.init.zeros_(module[4].bias)
    x, y = data((6,), 3, regression=False)
    optimizer = unit(module, x, base, refresh_interval=20)
    losses = train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().clipped == 0
    assert optimizer.statistics().dormant_units == 16
    losses += train(module, optimizer, x, y, range(1, 80))
    assert optimizer.statistics().dormant_units == 0
    assert finite(module)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("base", ["sgd", "momentum", "amsgrad"])
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_without_a_gradient_is_left_alone(base: str, early: bool) -> None:
    """Also when it had gradients before."""
    module, x, y, reference = example("mlp")
    optimizer = unit(module, x, base)
    if not early:
        run_both(module, optimizer, reference, x, y, 3)
    else:
        only_refresh(optimizer)
        reference.refresh()
    names = {id(p): name for name, p in module.named_parameters()}
    before, rule = weights_of(module), saved(optimizer)
    for step in range(3, 6):
        for one in (module, reference.module):
            one.zero_grad()
            loss_of(one, *batches(x, y, step)).backward()
            one[2].weight.grad = None
            one[0].bias.grad = None
        options = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        reference.step(optimizer.optimizer, options)
        optimizer.step()
        agree(module, optimizer, reference)
    now = saved(optimizer)
    biases_first = sorted(names.values(), key=lambda name: "weight" in name)
    counts = dict(zip(biases_first, torch.arange(6 + 5 + 3 + 6 + 5 + 3).split([6, 5, 3, 6, 5, 3]), strict=True))
    for name, rows in counts.items():
        still = name in ("2.weight", "0.bias")
        for key in ("second", "weight"):
            assert torch.equal(now[key][rows], rule[key][rows]) == still, name
        assert torch.equal(module.get_parameter(name), before[name]) == still, name


def test_no_moments_move_where_gradients_are_missing_whatever_another_optimizer_trains() -> None:
    module, x, y = problem(4, 6, 5, 3)
    group = scaling_group(module, x)
    own = [*module[0].parameters(), module[2].weight]
    first = EquivalentClassOptimizer(SGD(own, lr=0.05), group, rule="unit")
    train(module, first, x, y, range(3))
    before = saved(first)
    module.zero_grad()
    loss_of(module, *batches(x, y, 3)).backward()
    module[2].weight.grad = None
    first.step()  # the other parameters have gradients, but are not among its own
    after = saved(first)
    missing = slice(12, 17)
    assert torch.equal(after["second"][missing], before["second"][missing])
    assert torch.equal(after["weight"][missing], before["weight"][missing])
    assert not torch.equal(after["second"][:12], before["second"][:12])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_spoils_its_own_row_for_one_step(base: str, bad: float, first: bool) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base, refresh_interval=None)
    before = train(module, optimizer, x, y, range(0 if first else 8))
    good = copy.deepcopy((module.state_dict(), optimizer.optimizer.state_dict()))
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 8)).backward()
    module[2].weight.grad[1, 2] = bad
    optimizer.step()
    assert not bool(module[2].weight[1, 2].isfinite())
    others = [p for p in module.parameters() if p is not module[2].weight]
    assert all(bool(p.isfinite().all()) for p in others)
    assert bool(module[2].weight[[0, 2, 3, 4]].isfinite().all())
    for key in ("second", "weight", "rho"):
        assert bool(saved(optimizer)[key].isfinite().all()), key
    assert int((saved(optimizer)["weight"] == 0).sum()) == first  # the row has taken no note of it

    for step in range(9, 12):  # other parameters, while that one is spoilt
        for p in module.parameters():
            p.grad = torch.randn_like(p) * 0.01
        module[2].weight.grad[1] = math.nan
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in others), step

    module.load_state_dict(good[0])
    optimizer.optimizer.load_state_dict(good[1])
    losses = train(module, optimizer, x, y, range(8, 48))
    assert finite(module)
    assert sum(losses[-4:]) < sum(before[:4] or losses[:4])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refresh_at_a_weight_that_is_not_finite_spoils_no_other_parameter(base: str, bad: float) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base, refresh_interval=None)
    train(module, optimizer, x, y, range(8))
    good = copy.deepcopy((module.state_dict(), optimizer.optimizer.state_dict()))
    with torch.no_grad():
        module[2].weight[1, 2] = bad
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 0.01
    optimizer.refresh()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for name, p in module.named_parameters() if name != "2.weight")

    module.load_state_dict(good[0])
    optimizer.optimizer.load_state_dict(good[1])
    train(module, optimizer, x, y, range(8, 12))
    assert finite(module)
    optimizer.refresh()
    losses = train(module, optimizer, x, y, range(8, 48))
    assert finite(module)
    assert sum(losses[-4:]) < sum(losses[:4])


class Failing(SGD):
    """Fails when told so."""

    fail = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.fail:
            raise MemoryError("no room for the momentum")
        return super().step(closure)


def test_a_step_that_fails_leaves_everything_as_it_was() -> None:
    module, x, y = problem(4, 6, 5, 3)
    base = Failing(module.parameters(), lr=0.05, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule="unit")
    train(module, optimizer, x, y, range(3))
    before, rule = weights_of(module), saved(optimizer)
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 3)).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    base.fail = True
    with pytest.raises(MemoryError):
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-15, atol=0)
        assert put_back(p.grad, gradients[name])
    for key in ("rho", "reference", "second", "weight"):
        assert torch.equal(saved(optimizer)[key], rule[key])
    base.fail = False
    optimizer.step()
    assert not torch.equal(saved(optimizer)["second"], rule["second"])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_without_gradients_stays_finite_and_where_it_is(base: str, dtype: torch.dtype) -> None:
    module, x, y = problem(4, 6, 5, 3, dtype=dtype)
    make: Make = (
        (lambda params: SGD(params, lr=0.05, momentum=0.9))
        if base == "momentum"
        else (lambda params: AdamW(params, lr=0.01, weight_decay=0.0))
    )
    optimizer = unit(module, x, make, refresh_interval=None)
    only_refresh(optimizer)
    before = module[0].weight[2].detach().clone()
    alive = torch.arange(6) != 2
    hooks = [
        module[0].weight.register_hook(lambda g: g * alive[:, None]),
        module[0].bias.register_hook(lambda g: g * alive),
    ]
    train(module, optimizer, x, y, range(100))
    torch.testing.assert_close(module[0].weight[2].detach(), before, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert finite(module)
    assert all(bool(value.isfinite().all()) for value in optimizer.state[module[0].weight].values())
    for hook in hooks:
        hook.remove()
    # It comes to life, and is not thrown out of the network by it.
    train(module, optimizer, x, y, range(100, 101))
    moved = float((module[0].weight[2].detach() - before).norm() / before.norm())
    assert 0 < moved <= (0.0051 if base == "momentum" else 0.1)
    train(module, optimizer, x, y, range(101, 110))
    assert finite(module)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_a_unit_that_comes_to_life_moves_by_the_rate_at_most(weight_decay: float, size: float) -> None:
    """However small its gradient is, and whatever weight decay has left in its momentum; and by less if it is faint."""
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(
        module, x, lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=weight_decay), refresh_interval=None
    )
    only_refresh(optimizer)
    factor = torch.ones(6, 1, dtype=torch.float64)
    factor[2] = 0.0
    module[0].weight.register_hook(lambda g: g * factor)
    train(module, optimizer, x, y, range(30))
    before = module[0].weight[2].detach().clone()
    factor[2] = size
    train(module, optimizer, x, y, range(30, 31))
    moved = float((module[0].weight[2].detach() - before).norm() / before.norm())
    assert moved < 0.0051 + 0.05 * weight_decay * 10
    if size == 1.0:
        assert moved > 0.001
    elif not weight_decay:
        assert moved < 0.001


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-8, 0.0])
@pytest.mark.parametrize("source", ["plain", "path", "zero layer"])
def test_momentum_from_before_the_first_step_throws_no_unit_out_of_the_network(source: str, size: float) -> None:
    """When a row has but a small gradient at its first step, or none."""
    module, x, y = problem(4, 6, 5, 3)
    make: Make = lambda params: SGD(params, lr=0.02, momentum=0.9)  # noqa: E731
    if source == "plain":
        before: Optimizer = make(module.parameters())
    elif source == "path":
        before = EquivalentClassOptimizer(make(module.parameters()), scaling_group(module, x), rule="path")
    else:
        with torch.no_grad():
            module[4].weight.zero_()
        before = unit(module, x, make, refresh_interval=None)
    train(module, before, x, y, range(20))
    optimizer = unit(module, x, make, refresh_interval=None)
    optimizer.load_state_dict(before.state_dict())
    only_refresh(optimizer)
    weights = weights_of(module)
    optimizer.zero_grad()
    loss_of(module, *batches(x, y, 20)).backward()
    module[2].weight.grad[1] *= size
    optimizer.step()
    moved = (module[2].weight.detach() - weights["2.weight"])[1].norm() / weights["2.weight"][1].norm()
    assert float(moved) < 0.1  # five times the rate


class Gain(nn.Module):
    """Parameters without an axis, and of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 3, activation=nn.PReLU)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.net(x) + self.shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_an_axis_take_a_tenth_of_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Gain().to(dtype)
    x, y = data((4,), 3, regression=True)
    x, y = x.to(dtype), y.to(dtype)
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    optimizer = unit(module, x, lambda params: SGD(params, lr=0.05))
    losses = train(module, optimizer, x, y, range(1))
    # The gain makes one unit of all outputs, so that the rows that lead into them count as one.
    hidden, outputs = (p.detach().square() for p in start.parameters() if p.ndim == 2)
    squares = torch.cat([hidden.sum(1), outputs.sum()[None]])
    floor = 0.1 * float(squares.mean().sqrt())
    for name, length in (("gain", None), ("net.1.weight", None), ("shift", 10 * floor)):
        before, now = start.get_parameter(name).detach(), module.get_parameter(name).detach()
        expected = max(abs(float(before)), floor) if length is None else length
        assert abs(float(now - before)) == pytest.approx(0.005 * expected, rel=1e3 * torch.finfo(dtype).eps)
    losses += train(module, optimizer, x, y, range(1, 64))
    assert finite(module)
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_train(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = mlp(4, 16, 16, 3)
    x = torch.randn(64, 4)
    y = 0.3 * torch.randn(64, 3) + x[:, :3]
    module, x, y = module.to(dtype), x.to(dtype), y.to(dtype)
    losses = train(module, unit(module, x, "momentum", refresh_interval=20), x, y, range(64))
    assert finite(module)
    assert all(p.dtype == dtype for p in module.parameters())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_two_optimizers_of_one_module_train_what_is_theirs() -> None:
    module, x, y = problem(4, 6, 5, 7, 3)
    group = scaling_group(module, x)
    parts = [*module[0].parameters(), *module[2].parameters()], [*module[4].parameters(), *module[6].parameters()]
    first = EquivalentClassOptimizer(SGD(parts[0], lr=0.05, momentum=0.9), group, rule="unit", refresh_interval=5)
    second = EquivalentClassOptimizer(AdamW(parts[1], lr=0.01), group, rule="unit", refresh_interval=7)
    # One after the other as they come: each leaves the parameters and gradients of the other alone but for balancing.
    losses = []
    for step in range(64):
        module.zero_grad()
        loss = loss_of(module, *batches(x, y, step))
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer, others in ((first, parts[1]), (second, parts[0])):
            before = [(p.detach().clone(), p.grad.clone()) for p in others]
            optimizer.step()
            for p, (weight, gradient) in zip(others, before, strict=True):
                assert torch.equal(p, weight)
                assert torch.equal(p.grad, gradient)
    assert finite(module)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert len(saved(first)["rho"]) == 6 + 6 + 5 + 5
    assert len(saved(second)["rho"]) == 7 + 7 + 3 + 3


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("late", [False, True])
def test_frozen_parameters_stay(base: str, late: bool) -> None:
    module, x, y = problem(4, 6, 5, 7, 3)
    if late:
        optimizer = unit(module, x, base, refresh_interval=50)
        train(module, optimizer, x, y, range(4))
        module[2].requires_grad_(False)
    else:
        module[2].requires_grad_(False)
        optimizer = unit(
            module, x, lambda params: BASES[base]([p for p in params if p.requires_grad]), refresh_interval=5
        )
    before = weights_of(module)
    losses = train(module, optimizer, x, y, range(4, 44))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("2."), name
    assert finite(module)
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_group_whose_rate_is_zero_stays() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = unit(
        module,
        x,
        lambda params: SGD([{"params": module[0].parameters(), "lr": 0.0}, {"params": module[2].parameters()}], lr=0.1),
    )
    only_refresh(optimizer)
    before = weights_of(module)
    train(module, optimizer, x, y, range(10))
    for name, p in module.named_parameters():
        assert torch.allclose(p, before[name], rtol=1e-14, atol=0) == name.startswith("0."), name


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 0.9, "dampening": 1.0}])
def test_momentum_without_an_average_leaves_the_weights_finite(options: dict[str, float]) -> None:
    """SGD takes them; there is no mean of gradients then."""
    module, x, y = problem(4, 6, 3)
    optimizer = unit(module, x, lambda params: SGD(params, lr=1e-3, **options))
    train(module, optimizer, x, y, range(4))
    assert finite(module)


# Statistics -----------------------------------------------------------------------------------------------------------


def constant_gradients(module: nn.Module, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_clipped_under_constant_gradients(dtype: torch.dtype) -> None:
    module, x, _ = problem(4, 6, 5, 3, dtype=dtype)
    scaling_group(module, x).balance_()  # so that the first refresh changes no gradient
    optimizer = unit(module, x, "sgd")
    assert optimizer.statistics() is None
    for _ in range(20):
        constant_gradients(module)
        optimizer.step()
        assert optimizer.statistics().clipped == 0.0
    assert optimizer.statistics().dormant_units == 0


def test_the_clipped_share_is_that_of_rows_and_steps() -> None:
    module, x, _ = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "sgd", refresh_interval=None)
    for factor in (4.0, 2.0, 1.0, 10.0):  # at first each is less than the mean so far
        constant_gradients(module, factor)
        optimizer.step()
    assert optimizer.statistics().clipped == pytest.approx(1 / 4)
    constant_gradients(module, 100.0)
    module[2].weight.grad *= 1e-6
    optimizer.step()
    rows, small = 6 + 6 + 5 + 5 + 3 + 3, 5
    assert optimizer.statistics().clipped == pytest.approx((2 * rows - small) / (5 * rows))
    optimizer.refresh()  # the running means go on, and so does the count
    constant_gradients(module, 1e-3)
    optimizer.step()
    assert optimizer.statistics().clipped == pytest.approx((2 * rows - small) / (6 * rows))


def test_the_clipped_share_of_a_run_is_a_share() -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "momentum", refresh_interval=30)
    for step in range(40):
        train(module, optimizer, x, y, range(step, step + 1))
        assert 0.0 <= optimizer.statistics().clipped <= 1.0
    assert optimizer.statistics().clipped > 0.0


def test_dormant_units_are_counted() -> None:
    module, x, y = problem(4, 6, 5, 3)
    with torch.no_grad():
        module[2].weight[:, :2] = 0
    optimizer = unit(module, x, "sgd")
    train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 2
    optimizer.refresh()  # the gradient has brought them to life
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().dormant_units == 0
