"""Generative networks, several inputs, graphs, coordinates and recommendation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import mlp
from tests.symmetry.zoo.case import Case, Sample, Use
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


DATA: list[Case] = [
    # What leads into the code also leads out of it, so its scale is fixed; the decoder's hidden features undo what the
    # encoder's have done.
    Case("tied autoencoder", lambda: TiedAutoencoder(4, 4, 3), ((10, 4),), 4, good_for=Use.PATHS | Use.FAST),
    Case("convolutional autoencoder", _convolutional_autoencoder, ((2, 1, 8, 8),), 3 + 4 + 3),
    Case("variational autoencoder", VariationalAutoencoder, ((8, 5),), 4 + 3),
    Case("generator and discriminator", Adversaries, ((8, 2), (8, 3)), 4 + 5 + 4),
    Case("coupling flow", CouplingFlow, ((10, 4),), 4 * 3),
    Case("siamese, absolute difference", Siamese, ((8, 3), (8, 3)), 4 + 3, good_for=Use.PATHS),
    # Each axis of the embedding is squared and weighted.
    Case("triplet with a learnt metric", _triplet, ((20, 3),) * 3, 4 + 3, good_for=Use.PATHS),
    # Each axis of one tower against the same of the other, and both of them against the common scale.
    Case("two towers", TwoTowers, ((5, 3), (6, 2)), 4 + 5 + 3 + 1, good_for=Use.PATHS | Use.PRODUCTS | Use.FAST),
    # Channels, hidden features, axes of the embedding, trunk, head.
    Case("many inputs, many tasks", ManyTasks, (), 3 + 4 + 2 + 4 + 3, sample=_batch_of_many_tasks),
    Case("dense graph convolution", DenseGraphConvolution, ((6, 3), (6, 6)), 4),
    Case("graph convolution over edges", Sage, (), 4 + 3, sample=_graph(8, 16, 2), good_for=Use.FAST),
    Case("graph attention", GraphAttention, (), 4, sample=_graph(8, 16, 3)),
    # The state is the same in both rounds; behind it the hidden features of the message and the message itself.
    Case("message passing", MessagePassing, (), 3 + 4 + 3, sample=_graph(8, 16, 3, 2)),
    # Both sides of the second matrix, which is nothing but a product of the network's own making.
    Case("point net", PointNet, ((6, 3, 5),), 4 + 3 + 2 + 3 + 4, good_for=Use.PATHS),
    Case("radiance field", RadianceField, ((10, 2), (10, 2)), 4 + 4 + 4 + 3 + 3),
    Case("operator network", DeepONet, ((6, 4), (7, 1)), 4 + 4 + 3, good_for=Use.PATHS),
    Case("euler steps", EulerSteps, ((12, 2),), 3 + 4, good_for=Use.PATHS),
    # A pair's product is a sum over axes, all of which must scale alike: one scale for each of the three vectors.
    Case("dlrm", Dlrm, (), 4 + 3 + 4, sample=_fields(4, 5, 5, dense=3)),
    # User and item, each axis, in the product and in the network.
    Case("neural collaborative filtering", NeuralFactorization, (), 2 * 3 + 2 * 2 + 4, sample=_fields(4, 5)),
    # The pairs' products go to the output.
    Case("factorisation machine and network", DeepFactorization, (), 4, sample=_fields(3, 3, 3), good_for=Use.PATHS),
]
