"""Odd layers, and weights that are computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.networks import mlp
from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.tiny import Function

# Layers ---------------------------------------------------------------------------------------------------------------


def _maxout() -> Function:
    def forward(m: Function, x: Tensor) -> Tensor:
        x = m.one(x).view(-1, 4, 2).max(dim=-1).values
        x = m.two(x).view(len(x), 3, 2).sort(dim=-1)[0].flatten(1)  # group sort
        return m.head(x)

    return Function(forward, one=nn.Linear(3, 8), two=nn.Linear(4, 6), head=nn.Linear(6, 2))


def _bilinear() -> Function:
    def forward(m: Function, a: Tensor, b: Tensor) -> Tensor:
        return m.head(F.relu(m.join(F.relu(m.left(a)), F.relu(m.right(b)))))

    parts = {"left": nn.Linear(2, 3), "right": nn.Linear(3, 4), "join": nn.Bilinear(3, 4, 3), "head": nn.Linear(3, 2)}
    return Function(forward, **parts)


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, gate in self.layers:
            t = torch.sigmoid(gate(x))
            x = t * F.relu(layer(x)) + (1 - t) * x
        return self.head(x)


def _crelu() -> Function:
    def crelu(x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], dim=1)

    def forward(m: Function, x: Tensor) -> Tensor:
        return m.head(crelu(m.two(crelu(m.one(x)))))

    return Function(forward, one=nn.Linear(3, 3), two=nn.Linear(6, 2), head=nn.Linear(4, 2))


def _polynomial() -> Function:
    def forward(m: Function, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x)).square()
        x = m.a(x) * m.b(x) * m.c(x)
        return m.head(m.cube(x).pow(3))

    linear = nn.Linear
    parts = {"stem": linear(2, 4), "a": linear(4, 3), "b": linear(4, 3), "c": linear(4, 3)}
    return Function(forward, **parts, cube=linear(3, 2), head=linear(2, 2))


class HyperNetwork(nn.Module):
    """The weights of two layers, made from a description of the task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        self.layers = nn.Linear(3, 4 * 3 + 4 + 2 * 4)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        one, bias, two = self.layers(self.body(task)).split([12, 4, 8], dim=1)
        x = F.relu(torch.baddbmm(bias.unsqueeze(2), one.view(-1, 4, 3), x))
        return torch.bmm(two.view(-1, 2, 4), x)


class Film(nn.Module):
    """A condition scales and shifts the features of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = mlp(2, 3, 8)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4, affine=False), nn.Linear(4, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        x = F.relu(gamma * self.norm(self.conv(x)) + beta)
        return self.head(x.mean((2, 3)))


def _rbf() -> Function:
    def forward(m: Function, x: Tensor) -> Tensor:
        distance = (m.embed(x).unsqueeze(1) - m.centres).pow(2).sum(-1)
        return m.head(torch.exp(-m.width * distance))

    return Function(forward, embed=mlp(3, 4, 2), centres=torch.zeros(5, 2), width=torch.zeros(5), head=nn.Linear(5, 2))


class KanLayer(nn.Module):
    """Every edge has a function of its own: a sum of hats, times a scale, and a smooth unit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.scale = nn.Parameter(torch.zeros(outputs, inputs)), nn.Parameter(torch.zeros(outputs, inputs))
        self.spline = nn.Parameter(torch.zeros(outputs, inputs, 4))
        self.register_buffer("grid", torch.linspace(-3, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        hats = F.relu(1 - (x.unsqueeze(-1) - self.grid).abs() / 2)
        spline = (self.spline * self.scale.unsqueeze(-1)).flatten(1)
        return F.linear(F.silu(x), self.base) + F.linear(hats.flatten(1), spline)


class CosineClassifier(nn.Module):
    """Cosines between features and weights, neither of them divided by a norm below one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 4, 2)
        self.weight, self.scale = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        # Random weights and features have norms on both sides of one.
        features, weight = F.normalize(self.body(x), eps=1.0), F.normalize(self.weight, dim=1, eps=1.0)
        return self.scale * F.linear(features, weight)


class ReZero(nn.Module):
    """Residual blocks that begin as the identity, one of them with a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([mlp(4, 5, 4), mlp(4, 3, 4)])
        self.gains = nn.ParameterList([torch.zeros(()), torch.zeros(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, gain in zip(self.blocks, self.gains, strict=True):
            x = x + gain * block(x)
        return self.head(F.relu(x))


class Dueling(nn.Module):
    """A value and advantages over their mean; an actor with a width of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.value, self.advantage, self.actor = mlp(4, 3, 1), mlp(4, 4, 3), nn.Linear(4, 2)
        self.log_deviation = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        value, advantage = self.value(h), self.advantage(h)
        quality = value + advantage - advantage.mean(dim=1, keepdim=True)
        mean = self.actor(h)
        return quality, torch.tanh(mean), self.log_deviation.exp().expand_as(mean)


def _ensemble() -> Function:
    def forward(m: Function, x: Tensor) -> Tensor:
        h = F.relu(torch.baddbmm(m.b1, x.expand(3, -1, -1), m.w1))
        h = F.relu(torch.einsum("ebi,eio->ebo", h, m.w2) + m.b2)
        return torch.baddbmm(m.b3, h, m.w3).mean(0)

    shapes = {"w1": (3, 2, 3), "b1": (3, 1, 3), "w2": (3, 3, 2), "b2": (3, 1, 2), "w3": (3, 2, 2), "b3": (3, 1, 2)}
    return Function(forward, **{name: torch.zeros(shape) for name, shape in shapes.items()})


class BatchEnsembleLinear(nn.Module):
    """One weight for all members, and for each of them a gain for every input and output, and a bias."""

    def __init__(self, inputs: int, outputs: int, members: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.r, self.s = nn.Parameter(torch.zeros(members, 1, inputs)), nn.Parameter(torch.zeros(members, 1, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.r, self.weight) * self.s + self.bias


# Weights that are computed --------------------------------------------------------------------------------------------


class Absolute(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def _monotone() -> nn.Sequential:
    net = mlp(3, 4, 3, 1)
    for layer in net[::2]:
        parametrize.register_parametrization(layer, "weight", Absolute())
    return net


def _spectral() -> nn.Sequential:
    one, two = (parametrizations.spectral_norm(nn.Linear(*sizes)) for sizes in ((3, 4), (4, 3)))
    return nn.Sequential(one, nn.LeakyReLU(0.2), two, nn.LeakyReLU(0.2), nn.Linear(3, 1))


def _weight_normalised() -> nn.Sequential:
    one, two = (parametrizations.weight_norm(nn.Linear(*sizes)) for sizes in ((3, 4), (4, 5)))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), nn.Linear(5, 2))


def _weight_normalised_conv() -> nn.Sequential:
    one, two = (parametrizations.weight_norm(nn.Conv1d(*sizes)) for sizes in ((2, 4, 2), (4, 3, 2)))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), nn.Flatten(), nn.Linear(9, 2))


class StandardizedConv2d(nn.Conv2d):
    """Every filter has mean zero and variance one before a gain of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1], 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = self.gain * weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def _pruned() -> nn.Sequential:
    net = mlp(4, 5, 4, 2)
    for layer in net[::2]:
        rows, columns = (torch.arange(size) for size in layer.weight.shape)
        prune.custom_from_mask(layer, "weight", (rows[:, None] + columns) % 3 != 0)
    return net


class NoisyLinear(nn.Module):
    """Weights with noise of a learnt size, some of them dropped."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        self.weight_noise, self.bias_noise = nn.Parameter(self.weight.clone()), nn.Parameter(self.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        source, target = (torch.randn(size, dtype=x.dtype) for size in (x.shape[1], len(self.bias)))
        source, target = (noise.sign() * noise.abs().sqrt() for noise in (source, target))
        weight = F.dropout(self.weight + self.weight_noise * torch.outer(target, source), 0.2, self.training)
        return F.linear(x, weight, self.bias + self.bias_noise * target)


def _layers(layer: Callable[[int, int], nn.Module], *widths: int) -> list[nn.Module]:
    """A list of such layers, each with a rectifier behind it."""
    return [part for inputs, outputs in pairwise(widths) for part in (layer(inputs, outputs), nn.ReLU())]


LAYERS: list[Case] = [
    # One scale for all that compete.
    Case("maxout and group sort", _maxout, ((12, 3),), 4 + 3),
    Case(
        "bilinear",
        _bilinear,
        ((12, 2), (12, 3)),
        3 + 4 + 3,
        good_for=Use.PATHS | Use.PRODUCTS | Use.SHARDS | Use.FOUR_SHARDS | Use.FAST,
    ),
    Case("highway", Highway, ((12, 3),), 4),
    Case("concatenated relu", _crelu, ((12, 3),), 3 + 2, good_for=Use.PATHS),
    # Squares, three factors of one product, cubes.
    Case("polynomial", _polynomial, ((12, 2),), 4 + 3 * 3 + 2, good_for=Use.PATHS | Use.PRODUCTS),
    # Hidden features of the network that makes the weights, and of the one that has them.
    Case("hypernetwork", HyperNetwork, ((8, 2), (8, 3, 4)), 3 + 4, good_for=Use.PATHS),
    # Each channel before and after the gain.
    Case("feature-wise modulation", Film, ((8, 1, 3, 3), (8, 2)), 3 + 4, good_for=Use.PATHS),
    # All axes of the embedding with all centres, against the widths.
    Case("radial basis functions", _rbf, ((12, 3),), 4 + 1),
    # Every edge: the spline against its scale.
    Case(
        "kan", lambda: nn.Sequential(KanLayer(2, 3), KanLayer(3, 2)), ((20, 2),), 2 * 3 + 3 * 2, good_for=Use.PRODUCTS
    ),
    Case("cosine classifier", CosineClassifier, ((12, 3),), 4),
    # The stream, both blocks, and for each gain what it is multiplied with.
    Case("residual gains", ReZero, ((12, 3),), 4 + 5 + 3 + 1 + 4, good_for=Use.PATHS),
    Case("dueling heads and an actor", Dueling, ((12, 3),), 4 + 3 + 4),
    Case("stacked ensemble", _ensemble, ((10, 2),), 3 * (3 + 2), good_for=Use.PATHS),
    # Every member has hidden features of its own. In both layers columns of the weight go against the gains of the
    # inputs, rows against those of the outputs, and each member's gains against each other; but all columns and rows
    # together are the same as all gains together.
    Case(
        "batch ensemble",
        lambda: nn.Sequential(*_layers(BatchEnsembleLinear, 2, 3), BatchEnsembleLinear(3, 2)),
        ((2, 10, 2),),
        2 * 3 + (2 + 3 + 2 - 1) + (3 + 2 + 2 - 1),
        good_for=Use.PATHS | Use.PRODUCTS | Use.FAST,
    ),
    Case("non-negative weights", _monotone, ((12, 3),), 4 + 3, good_for=Use.PATHS),
    # Either matrix as a whole, for it is divided by its own norm.
    Case("spectral norm", _spectral, ((12, 3),), 2, good_for=Use.PATHS),
    # Rows of the directions, divided by their own norms; the second layer's output, and the first one's as a whole.
    Case("weight norm", _weight_normalised, ((12, 3),), 4 + 5 + 5 + 1, good_for=Use.PATHS | Use.PRODUCTS | Use.FAST),
    Case(
        "weight norm of convolutions",
        _weight_normalised_conv,
        ((8, 2, 5),),
        4 + 3 + 3 + 1,
        good_for=Use.PATHS | Use.SHARDS | Use.FOUR_SHARDS,
    ),
    Case(
        "weight standardisation",
        lambda: nn.Sequential(
            StandardizedConv2d(1, 4, 2),
            nn.ReLU(),
            StandardizedConv2d(4, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3, 2),
        ),
        ((8, 1, 3, 3),),
        1 + 3,  # of the first layer's output only the common scale passes through the second one's filters
        good_for=Use.PATHS | Use.PRODUCTS,
    ),
    Case("pruned", _pruned, ((12, 4),), 5 + 4, good_for=Use.PATHS),
    Case(
        "noisy weights",
        lambda: nn.Sequential(*_layers(NoisyLinear, 3, 4, 3), nn.Linear(3, 2)),
        ((12, 3),),
        4 + 3,
    ),
]
