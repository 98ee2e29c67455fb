"""Networks, bases and runs that the tests of the rule "unit" share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import DenseNet, ResidualMLP, mlp, plain_cnn
from tests.optim.bases import WITH_FORMULAS
from tests.optim.reference import Reference
from tests.optim.training import batches, loss_of

Make = Callable[[Iterable[Any]], Optimizer]


def unit(module: nn.Module, x: Tensor, base: str | Make, **wrapper: Any) -> EquivalentClassOptimizer:
    """A base optimizer with steps relative to units."""
    make = WITH_FORMULAS[base] if isinstance(base, str) else base
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
