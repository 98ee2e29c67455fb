"""Path norms against paths written out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.metrics.cases import Computed, M, P, path_norm, zeros
from tests.networks import ResidualMLP, mlp
from tests.symmetry.helpers import draw_

powers = pytest.mark.parametrize("p", [1, 2, 1.5])

# Paths written out ----------------------------------------------------------------------------------------------------


Node = Any
START = "start of all paths"


class Paths:
    """A network as a graph, whose paths are followed one by one."""

    def __init__(self) -> None:
        self.edges: dict[Node, list[tuple[Node, float]]] = {START: []}

    def connect(self, source: Node, target: Node, weight: float) -> None:
        self.edges.setdefault(source, []).append((target, float(torch.as_tensor(weight).detach())))

    def inputs(self, *shape: int) -> list[Node]:
        nodes = [("input", *place) for place in product(*map(range, shape))]
        for node in nodes:
            self.connect(START, node, 1.0)
        return nodes

    def linear(self, layer: nn.Linear, sources: Sequence[Node], name: Any) -> list[Node]:
        nodes = [(name, number) for number in range(layer.out_features)]
        for row, target in enumerate(nodes):
            for column, source in enumerate(sources):
                self.connect(source, target, layer.weight[row, column])
            if layer.bias is not None:
                self.connect(START, target, layer.bias[row])
        return nodes

    def convolution(self, layer: nn.Conv2d, size: int, name: str, source: str) -> None:
        """From nodes (source, channel, row, column) of a square image."""
        (step, _), (padding, _) = layer.stride, layer.padding
        height = (size + 2 * padding - layer.kernel_size[0]) // step + 1
        for o, y, x in product(range(layer.out_channels), range(height), range(height)):
            for c, i, j in product(range(layer.in_channels), *map(range, layer.kernel_size)):
                row, column = y * step + i - padding, x * step + j - padding
                if 0 <= row < size and 0 <= column < size:
                    self.connect((source, c, row, column), (name, o, y, x), layer.weight[o, c, i, j])
            if layer.bias is not None:
                self.connect(START, (name, o, y, x), layer.bias[o])

    def products(self, node: Node = START, value: float = 1.0) -> Iterator[float]:
        """The product of weights along each path; it ends where no edge leads on."""
        if node not in self.edges:
            yield value
        for target, weight in self.edges.get(node, []):
            yield from self.products(target, value * weight)

    def norm(self, p: float) -> float:
        return math.fsum(abs(value) ** p for value in self.products()) ** (1 / p)


@powers
def test_the_path_norm_of_an_mlp_is_that_of_all_its_paths(p: float, generator: torch.Generator) -> None:
    net = mlp(3, 4, 3, 2).double()
    draw_(net, generator)
    paths = Paths()
    nodes = paths.inputs(3)
    for name, layer in enumerate(net[::2]):
        nodes = paths.linear(layer, nodes, name)
    assert len(list(paths.products())) == 3 * 4 * 3 * 2 + 4 * 3 * 2 + 3 * 2 + 2
    assert path_norm(net, zeros(1, 3), p) == pytest.approx(paths.norm(p), rel=1e-12)


@powers
def test_the_path_norm_of_a_residual_network_is_that_of_all_its_paths(p: float, generator: torch.Generator) -> None:
    net = ResidualMLP(2, 3, 2, 2).double()
    draw_(net, generator)
    paths = Paths()
    stream = paths.linear(net.stem, paths.inputs(2), "stem")
    block = paths.linear(net.down, paths.linear(net.up, stream, "up"), "down")
    joined = [("joined", number) for number in range(3)]
    for skip, inner, target in zip(stream, block, joined, strict=True):
        paths.connect(skip, target, 1.0)
        paths.connect(inner, target, 1.0)
    paths.linear(net.head, joined, "head")
    assert path_norm(net, zeros(4, 2), p) == pytest.approx(paths.norm(p), rel=1e-12)


@powers
def test_the_path_norm_of_a_convolutional_network_is_that_of_all_its_paths(
    p: float, generator: torch.Generator
) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(2),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(2, 2, 2, padding=1, bias=False),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).double()
    draw_(net, generator)
    paths = Paths()
    paths.inputs(1, 6, 6)
    paths.convolution(net[0], 6, "first", "input")
    norm = net[1]
    for c, y, x in product(range(2), range(3), range(3)):
        gain = norm.weight[c] / (norm.running_var[c] + norm.eps).sqrt()
        paths.connect(("first", c, y, x), ("norm", c, y, x), gain)
        paths.connect(START, ("norm", c, y, x), norm.bias[c] - norm.running_mean[c] * gain)
    for c, y, x, i, j in product(range(2), range(2), range(2), range(2), range(2)):
        paths.connect(("norm", c, y + i, x + j), ("pool", c, y, x), 1.0)
    paths.convolution(net[4], 2, "second", "pool")
    for c, y, x in product(range(2), range(2), range(2)):
        window = [(row, column) for row in (2 * y - 1, 2 * y, 2 * y + 1) for column in (2 * x - 1, 2 * x, 2 * x + 1)]
        window = [(row, column) for row, column in window if 0 <= row < 3 and 0 <= column < 3]
        for row, column in window:
            paths.connect(("second", c, row, column), ("average", c, y, x), 1 / len(window))
    paths.linear(net[7], [("average", *place) for place in product(range(2), repeat=3)], "head")
    for mode in (True, False):
        net.train(mode)
        assert path_norm(net, zeros(2, 1, 6, 6), p) == pytest.approx(paths.norm(p), rel=1e-12)


IMAGE = (1, 4, 5, 6)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "max pool": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "max pool, dilated": (nn.MaxPool2d((2, 3), (1, 2), (1, 0), dilation=(2, 1)), IMAGE),
    "max pool, 1d": (nn.MaxPool1d(2), (1, 2, 5)),
    "max pool, 3d": (nn.MaxPool3d(2, 1), (1, 1, 3, 3, 4)),
    "maxima": (Computed(lambda x: torch.maximum(x[:, :2], x[:, 2:]).amax((2, 3))), IMAGE),
    "maxima along axes": (Computed(lambda x: x.max(3)[0].flatten(1).max(1, keepdim=True)[0] + 1), IMAGE),
    "average pool": (nn.AvgPool2d(3, 2, 1), IMAGE),
    "average pool, last window cut": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 2, 6, 5)),
    "average pool, divisor": (nn.AvgPool2d((2, 3), divisor_override=5), IMAGE),
    "average pool, 1d": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), (1, 2, 6)),
    "average pool, 3d": (nn.AvgPool3d(2, ceil_mode=True), (1, 1, 3, 2, 5)),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((3, 4)), IMAGE),
    "adaptive average pool, 1d": (nn.AdaptiveAvgPool1d(3), (1, 2, 5)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d((3, 4)), IMAGE),
    "global average": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "mean": (Computed(lambda x: x.mean((0, 2), keepdim=True)), IMAGE),
    "mean of all": (Computed(lambda x: -x.mean()), IMAGE),
    "bilinear": (nn.Upsample(scale_factor=1.5, mode="bilinear"), IMAGE),
    "bilinear, aligned": (nn.Upsample((7, 3), mode="bilinear", align_corners=True), IMAGE),
    "bicubic": (nn.Upsample((9, 8), mode="bicubic"), IMAGE),
    "antialiased": (Computed(lambda x: F.interpolate(x, (3, 2), mode="bilinear", antialias=True)), IMAGE),
    "linear, 1d": (nn.Upsample(7, mode="linear"), (1, 2, 4)),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 1, 2, 3, 2)),
    "nearest": (nn.Upsample(scale_factor=2), IMAGE),
    "reflection": (nn.ReflectionPad2d(2), IMAGE),
    "pad with a constant": (nn.ConstantPad2d((1, 0, 2, 1), -3.0), (1, 1, 2, 2)),
    "shuffles": (nn.Sequential(nn.PixelShuffle(2), nn.ChannelShuffle(1), nn.PixelUnshuffle(2)), IMAGE),
    "patches": (nn.Unfold(2, stride=(1, 2)), (1, 2, 4, 5)),
    "from patches": (nn.Fold((3, 3), 2), (1, 8, 4)),
    "transposed convolution": (nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2), IMAGE),
    "grouped convolution": (nn.Conv2d(4, 6, 2, groups=2, padding="same", padding_mode="circular"), IMAGE),
    "convolution, 3d": (nn.Conv3d(1, 2, 2, dilation=2), (1, 1, 3, 3, 4)),
    "moving": (Computed(lambda x: x.roll(1, 2).flip(3).transpose(1, 2).reshape(1, -1).repeat(2, 1)[:, ::2]), IMAGE),
    "running sums": (Computed(lambda x: 2 * x.cumsum(1) + 0.25), IMAGE),
    "by scalars": (Computed(lambda x: 1 - torch.add(x[..., :3] / 4, -x[..., 3:], alpha=-3) * -0.5), IMAGE),
    "picked": (Computed(lambda x: x[:, [0, 2, 2]].index_select(2, torch.tensor([1, 1])).gather(3, P)), IMAGE),
    "repeated": (Computed(lambda x: torch.ops.aten.copy(torch.zeros_like(x), x[..., :1]).relu_()), IMAGE),
    "masked": (Computed(lambda x: torch.where(M, x, torch.tensor(2.0)).masked_fill(~M.T, 0.0)), (1, 6, 6)),
    "added at indices": (Computed(lambda x: x.new_zeros(1, 3).index_add(1, torch.tensor([0, 2, 2]), x)), (1, 3)),
    "scattered": (Computed(lambda x: x.new_zeros(1, 3).scatter_add(1, torch.tensor([[0, 0, 2]]), -2 * x)), (1, 3)),
}  # fmt: skip


@powers
@pytest.mark.parametrize("name", LAYERS)
def test_a_linear_layer_and_a_pool_have_the_norm_of_their_matrix(
    name: str, p: float, generator: torch.Generator
) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double()
    draw_(layer, generator)
    shift = layer(torch.zeros(shape, dtype=torch.float64))
    count = math.prod(shape)
    pixels = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    matrix = torch.stack([layer(pixel) for pixel in pixels]) - shift
    expected = (matrix.abs().pow(p).sum() + shift.abs().pow(p).sum()) ** (1 / p)
    assert path_norm(layer, zeros(*shape), p, samples=1) == pytest.approx(float(expected), rel=1e-12)


@powers
def test_activations_count_as_their_larger_slope(p: float) -> None:
    prelu = nn.PReLU(3).double()
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.5, -3.0, 2.0]))
    expected = (1 + 3**p + 2**p) ** (1 / p)
    assert path_norm(prelu, zeros(1, 3), p) == pytest.approx(expected, rel=1e-12)
    assert path_norm(nn.LeakyReLU(0.2), torch.zeros(1, 1), p) == 1.0
    assert path_norm(nn.LeakyReLU(-4.0), torch.zeros(1, 1), p) == pytest.approx(4.0, rel=1e-12)
    for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.Threshold(0, 0), nn.Dropout(0.9), nn.Dropout2d(0.5)):
        assert path_norm(layer, torch.zeros(1, 1, 1, 1), p) == 1.0


@powers
def test_a_path_through_a_product_is_one_through_each_factor(p: float, generator: torch.Generator) -> None:
    first, second = (nn.Linear(3, 4).double() for _ in range(2))
    join = nn.Bilinear(4, 4, 2).double()
    for layer in (first, second, join):
        draw_(layer, generator)
    one, two = (torch.cat([layer.weight, layer.bias[:, None]], 1) for layer in (first, second))  # [4, paths]
    gate = torch.einsum("ha,hb->hab", one, two)
    net = Computed(lambda x: first(x) * second(x))
    x = zeros(1, 3)
    assert path_norm(net, x, p) == pytest.approx(float(gate.norm(p)), rel=1e-12)
    assert path_norm(Computed(lambda x: F.relu(first(x)).square()), x, p) == pytest.approx(
        float(torch.einsum("ha,hb->hab", one, one).norm(p)), rel=1e-12
    )
    joined = torch.cat([torch.einsum("ohk,ha,kb->oab", join.weight, one, two).flatten(), join.bias])
    apart = torch.einsum("ohk,ha,kb->ohkab", join.weight, one, two).flatten()
    assert float(joined[:-2].norm(1)) < float(apart.norm(1))  # paths through different units are different paths
    expected = torch.cat([apart, join.bias]).norm(p)
    assert path_norm(Computed(lambda x: join(first(x), second(x))), x, p) == pytest.approx(float(expected), rel=1e-12)


@powers
def test_computed_weights_count_as_what_they_are(p: float, generator: torch.Generator) -> None:
    def check(net: nn.Sequential) -> None:
        plain = mlp(3, 4, 2).double()
        with torch.no_grad():
            for own, computed in zip(plain[::2], net[::2], strict=True):
                own.weight.copy_(computed.weight)
                own.bias.copy_(computed.bias)
        expected = path_norm(plain, zeros(1, 3), p)
        assert path_norm(net, zeros(1, 3), p) == pytest.approx(expected, rel=1e-12)

    nets = [mlp(3, 4, 2).double() for _ in range(4)]
    for net in nets:
        draw_(net, generator)
    for layer in nets[0][::2]:
        parametrizations.weight_norm(layer)
    for layer in nets[1][::2]:
        nn.utils.weight_norm(layer)
    for layer in nets[2][::2]:
        parametrizations.spectral_norm(layer)
    for layer in nets[3][::2]:
        prune.random_unstructured(layer, "weight", 0.4)
    nets[2].eval()  # in training the norm is estimated anew in every call
    for net in nets:
        check(net)


@powers
def test_the_paths_of_an_embedding_begin_at_the_rows_that_are_picked(p: float, generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    draw_(net, generator)
    picked = net[0].weight[[4, 1]].flatten()
    expected = torch.cat([(net[2].weight * picked).flatten(), net[2].bias]).norm(p)
    assert path_norm(net, torch.tensor([[4, 1]]), p) == pytest.approx(float(expected), rel=1e-12)
    one_hot = Computed(lambda tokens: net[1:](F.one_hot(tokens, 5).double() @ net[0].weight))
    assert path_norm(one_hot, torch.tensor([[4, 1]]), p) == pytest.approx(float(expected), rel=1e-12)
