"""Generative, graph, recommendation, implicit and reparametrised networks, and layers that few others use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.networks import mlp
from tests.symmetry.zoo.case import Case, Sample
from tests.symmetry.zoo.tiny import Function

# Generative -----------------------------------------------------------------------------------------------------------


class TiedAutoencoder(nn.Module):
    """The decoder has biases of its own, and the encoder's weights."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(widths)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(width)) for width in reversed(widths[:-1])])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = F.relu(layer(x))
        for layer, bias in zip(reversed(self.encoder), self.biases, strict=True):
            x = F.linear(F.relu(x), layer.weight.t(), bias)
        return x


def _convolutional_autoencoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 2, stride=2),
        nn.Sigmoid(),
    )


class VariationalAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(4, 2), nn.Linear(4, 2)
        self.decoder = mlp(2, 3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        deviation = torch.exp(0.5 * log_variance)
        return self.decoder(mean + deviation * torch.randn_like(deviation)), mean, log_variance


class Adversaries(nn.Module):
    """A generator and a discriminator that sees what is real and what is generated."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.LeakyReLU(0.2), nn.Linear(4, 3), nn.Tanh()
        )
        self.discriminator = mlp(3, 5, 4, 1, activation=nn.LeakyReLU)

    def forward(self, noise: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(self.generator(noise)), self.discriminator(real)


class CouplingFlow(nn.Module):
    """Real-valued non-volume-preserving flow: one half of the numbers scales and shifts the other, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList([mlp(2, 3, 2) for _ in range(2)])
        self.shifts = nn.ModuleList([mlp(2, 3, 2) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_determinant = x.new_zeros(len(x))
        a, b = x.chunk(2, dim=1)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            log_scale = torch.tanh(scale(a))
            b = b * log_scale.exp() + shift(a)
            log_determinant = log_determinant + log_scale.sum(1)
            a, b = b, a
        return torch.cat([a, b], dim=1), log_determinant


# Several inputs -------------------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """Are the two alike, and of which class is each."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU())
        self.alike, self.classes = nn.Linear(3, 1), nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        a, b = self.twin(a), self.twin(b)
        return self.alike(torch.abs(a - b)), (self.classes(a), self.classes(b))


def _triplet() -> Function:
    def forward(m: Function, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        anchor, positive, negative = m.net(anchor), m.net(positive), m.net(negative)
        near, far = ((anchor - other).pow(2) @ m.metric for other in (positive, negative))
        return F.relu(near - far + 1.0)

    # The bias of the embedding would cancel.
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    return Function(forward, net=net, metric=torch.zeros(3))


class TwoTowers(nn.Module):
    """All users against all items."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = mlp(3, 4, 3), mlp(2, 5, 3)
        self.scale, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.scale * (F.relu(self.user(users)) @ F.relu(self.item(items)).t()) + self.bias


class ManyTasks(nn.Module):
    """An image, numbers and a category in; a class, a value and its uncertainty out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        self.category = nn.Embedding(5, 2)
        self.trunk = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({"class": nn.Linear(4, 3), "value": mlp(4, 3, 2)})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        parts = [self.image(batch["image"]), self.numbers(batch["numbers"]), self.category(batch["category"])]
        h = self.trunk(torch.cat(parts, dim=-1))
        value, uncertainty = self.heads["value"](h).unbind(-1)
        return {"class": self.heads["class"](h), "value": {"mean": value, "variance": F.softplus(uncertainty)}}


def _batch_of_many_tasks(generator: torch.Generator, size: float) -> tuple[dict[str, Tensor]]:
    image, numbers = (
        size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 1, 4, 4), (8, 2))
    )
    return ({"image": image, "numbers": numbers, "category": torch.randint(5, (8,), generator=generator)},)


# Graphs and points ----------------------------------------------------------------------------------------------------


def _graph(nodes: int, edges: int, *features: int) -> Sample:
    """Features of nodes, edges from any node to any, and, if asked for, features of edges."""

    def sample(generator: torch.Generator, size: float) -> tuple[Tensor, ...]:
        x, *more = (
            size * torch.randn(count, width, generator=generator, dtype=torch.float64)
            for count, width in zip((nodes, edges), features, strict=False)
        )
        return (x, torch.randint(nodes, (2, edges), generator=generator), *more)

    return sample


class DenseGraphConvolution(nn.Module):
    """The normalised adjacency matrix times features times weights, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        adjacency = (weights + weights.t() > 0).to(x) + torch.eye(len(x)).to(x)
        root = adjacency.sum(1).rsqrt().diag()
        adjacency = root @ adjacency @ root
        x = F.relu(adjacency @ self.one(x))
        x = x + F.relu(torch.einsum("ij,jk->ik", adjacency, self.two(x)))
        return self.head(x)


class SageLayer(nn.Module):
    """The node itself and the mean of its neighbours."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        total = torch.zeros_like(x).index_add_(0, target, x[source])
        degree = torch.zeros(len(x), dtype=x.dtype).index_add_(0, target, torch.ones(len(target), dtype=x.dtype))
        return self.own(x) + self.neighbours(total / degree.clamp(min=1).unsqueeze(1))


class Sage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SageLayer(2, 4), SageLayer(4, 3)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x, edges))
        return self.head(x)


class GraphAttention(nn.Module):
    """Two heads, whose weights are a softmax over the edges that lead into a node."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 4, bias=False)
        self.source, self.target = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.project(x).view(-1, 2, 2)  # nodes, heads, channels
        score = (h * self.source).sum(-1)[source] + (h * self.target).sum(-1)[target]
        score = F.leaky_relu(score, 0.2)
        index = target.unsqueeze(-1).expand_as(score)
        top = score.new_zeros(len(x), 2).scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        weight = (score - top[target]).exp()
        total = torch.zeros_like(top).scatter_add(0, index, weight)
        weight = weight / (total[target] + 0.1)
        h = torch.zeros_like(h).index_add(0, target, weight.unsqueeze(-1) * h[source])
        return self.head(F.relu(h.flatten(1) + self.bias))


class MessagePassing(nn.Module):
    """Messages along edges that have features, summed over two graphs in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.message, self.update, self.head = mlp(8, 4, 3), nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        for _ in range(2):
            message = self.message(torch.cat([x[edges[0]], x[edges[1]], features], dim=1))
            index = edges[1].view(-1, 1).expand_as(message)
            total = x.new_zeros(x.shape).scatter_add_(0, index, message)
            degree = torch.bincount(edges[1], minlength=len(x)).clamp_(min=1)
            x = F.relu(self.update(torch.cat([x, total / degree.unsqueeze(1)], dim=1)))
        graphs = torch.arange(len(x)) % 2
        return self.head(x.new_zeros(2, 3).scatter_add_(0, graphs.unsqueeze(1).expand(-1, 3), x))


class PointNet(nn.Module):
    """Points are rotated by a matrix that a network of its own finds, and another one for their features."""

    def __init__(self) -> None:
        super().__init__()
        self.align, self.align_head = nn.Conv1d(3, 4, 1), nn.Linear(4, 9)
        self.features, self.mix, self.mix_head = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 2, 1), nn.Linear(2, 9)
        self.wide, self.norm, self.head = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.align_head(F.relu(self.align(x)).max(dim=2)[0]).view(-1, 3, 3) + torch.eye(3).to(x)
        x = torch.bmm(x.transpose(2, 1), turn).transpose(2, 1)
        x = F.relu(self.features(x))
        mix = self.mix_head(torch.max(F.relu(self.mix(x)), 2, keepdim=True)[0].view(-1, 2)).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), mix).transpose(2, 1)
        x = F.relu(self.norm(self.wide(x)))
        return self.head(x.amax(2))


# Coordinates ----------------------------------------------------------------------------------------------------------


class RadianceField(nn.Module):
    """Density and colour of a point seen from a direction; waves of the position enter twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(12, 4)])
        self.density, self.feature = nn.Linear(4, 1), nn.Linear(4, 3)
        self.colour = mlp(5, 3, 3)

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        waves = torch.cat([f(2.0**k * position) for k in range(2) for f in (torch.sin, torch.cos)], dim=-1)
        h = waves
        for number, layer in enumerate(self.trunk):
            h = F.relu(layer(h))
            if number == 1:
                h = torch.cat([waves, h], dim=-1)
        colour = torch.sigmoid(self.colour(torch.cat([self.feature(h), direction], dim=-1)))
        return torch.cat([colour, F.relu(self.density(h))], dim=-1)


class DeepONet(nn.Module):
    """What a branch makes of a function's values, times what a trunk makes of a place."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(4, 4, 3), nn.Sequential(*mlp(1, 4, 3), nn.ReLU())
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, values: Tensor, places: Tensor) -> Tensor:
        return torch.einsum("bk,nk->bn", self.branch(values), self.trunk(places)) + self.bias


class EulerSteps(nn.Module):
    """A neural differential equation: the same layers at every time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(2, 3), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for t in torch.linspace(0, 1, 4)[:-1]:
            time = torch.full_like(z[:, :1], float(t))
            z = z + self.down(F.relu(self.up(torch.cat([z, time], 1)))) / 3
        return self.head(z)


# Recommendation -------------------------------------------------------------------------------------------------------


def _fields(*sizes: int, dense: int = 0) -> Sample:
    """Numbers, if asked for, and then one index for each field."""

    def sample(generator: torch.Generator, size: float) -> tuple[Tensor, ...]:
        numbers = [size * torch.randn(12, dense, generator=generator, dtype=torch.float64)] if dense else []
        return (*numbers, torch.stack([torch.randint(n, (12,), generator=generator) for n in sizes], 1))

    return sample


class Dlrm(nn.Module):
    """The dot products of all pairs among the embeddings and what the numbers become."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
        self.embeddings = nn.ModuleList([nn.Embedding(4, 2), nn.EmbeddingBag(5, 2, mode="sum")])
        self.top = mlp(5, 4, 1)

    def forward(self, numbers: Tensor, fields: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = [dense, self.embeddings[0](fields[:, 0]), self.embeddings[1](fields[:, 1:])]
        together = torch.stack(vectors, dim=1)
        products = torch.bmm(together, together.transpose(1, 2))
        row, column = torch.tril_indices(3, 3, offset=-1)
        return self.top(torch.cat([dense, products[:, row, column]], dim=1))


class NeuralFactorization(nn.Module):
    """Neural collaborative filtering: a product of embeddings beside a network on others."""

    def __init__(self) -> None:
        super().__init__()
        self.product_user, self.product_item = nn.Embedding(4, 3), nn.Embedding(5, 3)
        self.deep_user, self.deep_item = nn.Embedding(4, 2), nn.Embedding(5, 2)
        self.deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(7, 1)

    def forward(self, fields: Tensor) -> Tensor:
        user, item = fields.unbind(1)
        product = self.product_user(user) * self.product_item(item)
        deep = self.deep(torch.cat([self.deep_user(user), self.deep_item(item)], dim=-1))
        return torch.sigmoid(self.head(torch.cat([product, deep], dim=-1))).squeeze(-1)


class DeepFactorization(nn.Module):
    """DeepFM: a factorisation machine and a network share the embeddings of three fields."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Embedding(9, 1), nn.Embedding(9, 2)
        self.deep = mlp(6, 4, 1)
        self.register_buffer("offsets", torch.tensor([0, 3, 6]))

    def forward(self, fields: Tensor) -> Tensor:
        fields = fields + self.offsets
        e = self.embedding(fields)
        pairs = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        return self.linear(fields).sum(1) + pairs + self.deep(e.flatten(1))


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


ASSORTED: list[Case] = [
    # What leads into the code also leads out of it, so its scale is fixed; the decoder's hidden features undo what the
    # encoder's have done.
    Case("tied autoencoder", lambda: TiedAutoencoder(4, 4, 3), ((10, 4),), 4),
    Case("convolutional autoencoder", _convolutional_autoencoder, ((2, 1, 8, 8),), 3 + 4 + 3),
    Case("variational autoencoder", VariationalAutoencoder, ((8, 5),), 4 + 3),
    Case("generator and discriminator", Adversaries, ((8, 2), (8, 3)), 4 + 5 + 4),
    Case("coupling flow", CouplingFlow, ((10, 4),), 4 * 3),
    Case("siamese, absolute difference", Siamese, ((8, 3), (8, 3)), 4 + 3),
    # Each axis of the embedding is squared and weighted.
    Case("triplet with a learnt metric", _triplet, ((20, 3),) * 3, 4 + 3),
    # Each axis of one tower against the same of the other, and both of them against the common scale.
    Case("two towers", TwoTowers, ((5, 3), (6, 2)), 4 + 5 + 3 + 1),
    # Channels, hidden features, axes of the embedding, trunk, head.
    Case("many inputs, many tasks", ManyTasks, (), 3 + 4 + 2 + 4 + 3, sample=_batch_of_many_tasks),
    Case("dense graph convolution", DenseGraphConvolution, ((6, 3), (6, 6)), 4),
    Case("graph convolution over edges", Sage, (), 4 + 3, sample=_graph(8, 16, 2)),
    Case("graph attention", GraphAttention, (), 4, sample=_graph(8, 16, 3)),
    # The state is the same in both rounds; behind it the hidden features of the message and the message itself.
    Case("message passing", MessagePassing, (), 3 + 4 + 3, sample=_graph(8, 16, 3, 2)),
    # Both sides of the second matrix, which is nothing but a product of the network's own making.
    Case("point net", PointNet, ((6, 3, 5),), 4 + 3 + 2 + 3 + 4),
    Case("radiance field", RadianceField, ((10, 2), (10, 2)), 4 + 4 + 4 + 3 + 3),
    Case("operator network", DeepONet, ((6, 4), (7, 1)), 4 + 4 + 3),
    Case("euler steps", EulerSteps, ((12, 2),), 3 + 4),
    # A pair's product is a sum over axes, all of which must scale alike: one scale for each of the three vectors.
    Case("dlrm", Dlrm, (), 4 + 3 + 4, sample=_fields(4, 5, 5, dense=3)),
    # User and item, each axis, in the product and in the network.
    Case("neural collaborative filtering", NeuralFactorization, (), 2 * 3 + 2 * 2 + 4, sample=_fields(4, 5)),
    # The pairs' products go to the output.
    Case("factorisation machine and network", DeepFactorization, (), 4, sample=_fields(3, 3, 3)),
    # One scale for all that compete.
    Case("maxout and group sort", _maxout, ((12, 3),), 4 + 3),
    Case("bilinear", _bilinear, ((12, 2), (12, 3)), 3 + 4 + 3),
    Case("highway", Highway, ((12, 3),), 4),
    Case("concatenated relu", _crelu, ((12, 3),), 3 + 2),
    # Squares, three factors of one product, cubes.
    Case("polynomial", _polynomial, ((12, 2),), 4 + 3 * 3 + 2),
    # Hidden features of the network that makes the weights, and of the one that has them.
    Case("hypernetwork", HyperNetwork, ((8, 2), (8, 3, 4)), 3 + 4),
    # Each channel before and after the gain.
    Case("feature-wise modulation", Film, ((8, 1, 3, 3), (8, 2)), 3 + 4),
    # All axes of the embedding with all centres, against the widths.
    Case("radial basis functions", _rbf, ((12, 3),), 4 + 1),
    # Every edge: the spline against its scale.
    Case("kan", lambda: nn.Sequential(KanLayer(2, 3), KanLayer(3, 2)), ((20, 2),), 2 * 3 + 3 * 2),
    Case("cosine classifier", CosineClassifier, ((12, 3),), 4),
    # The stream, both blocks, and for each gain what it is multiplied with.
    Case("residual gains", ReZero, ((12, 3),), 4 + 5 + 3 + 1 + 4),
    Case("dueling heads and an actor", Dueling, ((12, 3),), 4 + 3 + 4),
    Case("stacked ensemble", _ensemble, ((10, 2),), 3 * (3 + 2)),
    # Every member has hidden features of its own. In both layers columns of the weight go against the gains of the
    # inputs, rows against those of the outputs, and each member's gains against each other; but all columns and rows
    # together are the same as all gains together.
    Case(
        "batch ensemble",
        lambda: nn.Sequential(*_layers(BatchEnsembleLinear, 2, 3), BatchEnsembleLinear(3, 2)),
        ((2, 10, 2),),
        2 * 3 + (2 + 3 + 2 - 1) + (3 + 2 + 2 - 1),
    ),
    Case("non-negative weights", _monotone, ((12, 3),), 4 + 3),
    # Either matrix as a whole, for it is divided by its own norm.
    Case("spectral norm", _spectral, ((12, 3),), 2),
    # Rows of the directions, divided by their own norms; the second layer's output, and the first one's as a whole.
    Case("weight norm", _weight_normalised, ((12, 3),), 4 + 5 + 5 + 1),
    Case("weight norm of convolutions", _weight_normalised_conv, ((8, 2, 5),), 4 + 3 + 3 + 1),
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
    ),
    Case("pruned", _pruned, ((12, 4),), 5 + 4),
    Case(
        "noisy weights",
        lambda: nn.Sequential(*_layers(NoisyLinear, 3, 4, 3), nn.Linear(3, 2)),
        ((12, 3),),
        4 + 3,
    ),
]
