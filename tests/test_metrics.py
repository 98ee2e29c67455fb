"""Path norms against paths written out, imbalance against squares written out, distances that ignore scales."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_map_only
from torchmetrics import MetricCollection

from lightning_ecopt import ScalingGroup, scaling_group
from lightning_ecopt.metrics import EquivalentClassDistance, PathNorm, UnitImbalance
from tests.lightning_integration.modules import Classifier, fit, quiet, same, weights
from tests.networks import ResidualMLP, ResNet, mlp, norm_cnn, plain_cnn
from tests.symmetry.helpers import copies, directions, draw_, flat_output
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import SHARED, TINY

CASES = [*SHARED, *TINY, *ZOO]
RESCALED = [case for case in CASES if case.units]
#: The others have a softmax, a sigmoid, a norm of activations or the like.
COVERED = """
ResidualMLP; ResNet; DenseNet; mlp; plain_cnn; norm_cnn; prelu mlp; residual mlp; unequal widths; no biases; one wide;
leaky relu; no activation; conv, batch norm; linear, batch norm; batch norm without gains; conv1d; conv2d; conv3d;
adaptive average; adaptive maximum; grouped conv; depthwise conv; transposed conv; grouped transposed conv;
flattened image; concatenation; resnet; option A; siamese, concatenated; siamese, subtracted; written by hand;
relu in place;
relu by clamp; channel gains; frozen weight; frozen layer; frozen weight, free bias; frozen first layer; frozen bias;
frozen grouped conv; skip from the input; layer of its own output; LeNet; AlexNet; VGG with batch norm;
network in network; CoordConv; ResNet, basic blocks; ResNet, bottlenecks; ResNeXt; pre-activation ResNet; DenseNet-BC;
SqueezeNet; Inception; Xception; MobileNetV1; ShuffleNetV2; U-Net, bilinear; U-Net, transposed;
fully convolutional network; DeepLab; feature pyramid; ESPCN; temporal convolutions; rnn with relu;
recurrent cell with relu; deep sets; n-gram; tied embedding; word language model; tied autoencoder;
siamese, absolute difference; triplet with a learnt metric; two towers; point net; operator network; euler steps;
factorisation machine and network; bilinear; concatenated relu; polynomial; hypernetwork; feature-wise modulation;
residual gains; stacked ensemble; batch ensemble; non-negative weights; spectral norm; weight norm;
weight norm of convolutions; weight standardisation; pruned
"""
NAMES = {name.strip() for name in COVERED.split(";")}
with_paths = pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda case: case.name)
powers = pytest.mark.parametrize("p", [1, 2, 1.5])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def prepared(case: Case, generator: torch.Generator) -> tuple[nn.Module, tuple[Any, ...]]:
    module = case.build()
    draw_(module, generator)
    return module, case.inputs(generator)


def path_norm(model: nn.Module, inputs: Any, p: float = 1, **options: Any) -> float:
    metric = PathNorm(p)
    metric.update(model, inputs, **options)
    return float(metric.compute())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def imbalance(group: ScalingGroup) -> float:
    metric = UnitImbalance()
    metric.update(group)
    return float(metric.compute())


def distance(model: nn.Module, reference: nn.Module, group: ScalingGroup, relative: bool = False) -> float:
    metric = EquivalentClassDistance(relative)
    metric.update(model, reference, group)
    return float(metric.compute())


def rescaled(module: nn.Module, group: ScalingGroup, generator: torch.Generator, size: float = 1.0) -> nn.Module:
    """Another member of the class of a module, in a module of its own."""
    other = copy.deepcopy(module)
    scale = size * torch.randn(group.num_units, generator=generator, dtype=torch.float64)
    own = dict(other.named_parameters())
    with torch.no_grad():
        group.rescale_({name: own[name] for name in group.parameters}, scale)
    return other


class Computed(nn.Module):
    """What a function does with its inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


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
P = torch.tensor([[[[0, 0, 3], [1, 2, 2]]] * 3])
M = (torch.arange(36).reshape(6, 6) * 7 % 5) > 1


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


# What path norms are good for -----------------------------------------------------------------------------------------


def test_the_list_of_networks_with_paths_is_right(generator: torch.Generator) -> None:
    assert {case.name for case in CASES} >= NAMES
    others = [case for case in CASES if case.name not in NAMES]
    for case in others[::6]:
        with pytest.raises(ValueError, match=r"PathNorm does not cover|has shape"):
            path_norm(*prepared(case, generator))


@with_paths
def test_the_path_norm_depends_on_the_class_alone(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    module.eval()
    group = scaling_group(module, *inputs)
    before = [path_norm(module, inputs, p) for p in (1, 2)]
    assert all(map(math.isfinite, before))
    group.act_(torch.randn(group.num_units, generator=generator, dtype=torch.float64))
    assert [path_norm(module, inputs, p) for p in (1, 2)] == pytest.approx(before, rel=1e-11)
    group.balance_()
    assert [path_norm(module, inputs, p) for p in (1, 2)] == pytest.approx(before, rel=1e-11)


@with_paths
def test_the_l1_path_norm_bounds_the_outputs(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    module.eval()
    bound = path_norm(module, inputs)
    for _ in range(5):
        drawn = tree_map_only(Tensor, lambda t: t.sign() if t.is_floating_point() else t, case.inputs(generator))
        outputs = flat_output(module(*drawn)).detach()
        assert float(outputs.abs().sum()) / len(drawn[0]) <= bound


# How path norms are used ----------------------------------------------------------------------------------------------


def test_neither_values_nor_the_number_of_samples_matter() -> None:
    net = norm_cnn()
    expected = path_norm(net, torch.zeros(1, 1, 8, 8))
    assert path_norm(net, 100 * torch.randn(7, 1, 8, 8)) == pytest.approx(expected, rel=1e-12)
    assert path_norm(net, torch.full((3, 1, 8, 8), math.nan)) == pytest.approx(expected, rel=1e-12)
    merged = Computed(lambda x: net(x).reshape(-1, 1))
    assert path_norm(merged, torch.zeros(4, 1, 8, 8)) == pytest.approx(expected, rel=1e-12)
    alone = mlp(3, 4, 2)
    assert path_norm(alone, torch.zeros(3), samples=1) == pytest.approx(path_norm(alone, torch.zeros(1, 3)), rel=1e-12)


def test_inputs_are_given_as_an_example_input_array_is() -> None:
    net = Computed(lambda a, b: a + 2 * b)
    a, b = torch.zeros(1, 2), torch.zeros(1, 2)
    assert path_norm(net, (a, b)) == 6.0

    class Named(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + 2 * b, "first": a}

    assert path_norm(Named(), {"a": a, "b": b}) == 8.0
    with pytest.raises(ValueError, match="the inputs hold no tensor"):
        path_norm(net, ())
    with pytest.raises(ValueError, match="samples must be a positive number, got 0"):
        path_norm(net, (a, b), samples=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_path_norms_are_exact_whatever_the_type_of_the_weights(dtype: torch.dtype) -> None:
    net = nn.Sequential(plain_cnn(), nn.PReLU(), nn.Linear(3, 2)).to(dtype)
    exact = copy.deepcopy(net).double()
    inputs = torch.zeros(1, 1, 8, 8)
    for p in (1, 2):
        expected = path_norm(exact, inputs.double(), p)
        assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)
        with torch.autocast("cpu", torch.bfloat16):
            assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)
        with torch.inference_mode():
            assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)


def test_scripted_and_compiled_networks_have_the_same_path_norm() -> None:
    net, inputs = mlp(3, 4, 4, 2), torch.zeros(2, 3)
    expected = path_norm(net, inputs)
    assert path_norm(torch.jit.script(net), inputs) == pytest.approx(expected, rel=1e-12)
    compiled = torch.compile(net, backend="eager")
    assert path_norm(compiled, inputs) == pytest.approx(expected, rel=1e-12)
    compiled(inputs)
    assert path_norm(compiled, inputs) == pytest.approx(expected, rel=1e-12)


def test_changes_in_place_are_followed() -> None:
    linear = nn.Linear(3, 3).double()

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.full((len(x), 5), 0.5, dtype=x.dtype)
            y[:, 1:4] = linear(x)
            y[:, :1] += 2
            columns = y[:, 2:]
            columns.mul_(-3).relu_()
            out = torch.empty(len(x), 2, dtype=x.dtype)
            torch.mm(y, torch.ones(5, 2, dtype=x.dtype), out=out)
            return out.detach_()

    weight = torch.cat([linear.weight, linear.bias[:, None]], 1)
    rows = [weight[0], 3 * weight[1], 3 * weight[2], torch.tensor([2.0, 0.5, 3 * 0.5])]
    expected = 2 * float(torch.cat(rows).abs().sum())
    assert path_norm(InPlace(), zeros(2, 3)) == pytest.approx(expected, rel=1e-12)


def test_a_norm_that_is_too_large_is_infinite_and_its_logarithm_need_not_be() -> None:
    net = mlp(2, 2, 1, bias=False).double()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.fill_(1e60)
    logarithm = PathNorm(p=2, log=True)
    logarithm.update(net, zeros(1, 2))
    assert float(logarithm.compute()) == pytest.approx(math.log(2e120), rel=1e-12)
    with torch.no_grad():
        net[0].weight.fill_(1e160)
    assert path_norm(net, zeros(1, 2), 2) == math.inf
    with torch.no_grad():
        net[0].weight.fill_(math.nan)
    assert math.isnan(path_norm(net, zeros(1, 2)))


@pytest.mark.parametrize("p", [0.5, 0, -1, math.inf, math.nan])
def test_an_exponent_without_a_norm_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p must be a real number from 1 on, got"):
        PathNorm(p)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "sigmoid": (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), r"'sigmoid' in module '1' \(Sigmoid\): it has no paths"),
    "attention": (nn.TransformerDecoderLayer(4, 2, 8), r"softmax' in module 'self_attn' \(Multihead"),
    "softmax": (nn.Softmax(1), "'_softmax' in Softmax"),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "'native_layer_norm' in module '1'"),
    "no running statistics": (nn.BatchNorm1d(4, track_running_stats=False), "it normalises by statistics of the batch"),
    "relu6": (nn.ReLU6(), "it has a bound other than zero"),
    "square root": (Computed(lambda x: x**0.5), "its exponent is no positive integer"),
    "division by an activation": (Computed(lambda x: 1 / x), "'reciprocal'"),
    "comparison": (Computed(lambda x: torch.where(x > 0, x, 0.1 * x)), "'gt' in Computed"),
    "control flow": (Computed(lambda x: x if x.sum() else -x), "'is_nonzero'|'_local_scalar_dense'"),
    "positions of maxima": (Computed(lambda x: x[:, x.max(1)[1]]), "positions of maxima, which depend on the data"),
    "integers": (Computed(lambda x: x.long().float()), "it makes other numbers of activations"),
    "bits": (Computed(lambda x: x.view(torch.int32)), "it takes real numbers for something else"),
    "random numbers": (Computed(lambda x: x * torch.rand(4)), r"'rand' .* put the model in evaluation mode"),
    "product over elements": (Computed(lambda x: x.scatter_reduce(1, P[0, 0, :1], x, "prod")), "it does not add"),
    "higher-order operator": (Computed(lambda x: torch.cond(M[0, 0], torch.sin, torch.cos, (x,))), "'cond' in Com"),
    "values outside torch": (Computed(lambda x: torch.from_numpy(x.numpy() * 2)), "no output of Computed is a real"),
    "no dependence": (Computed(lambda x: torch.ones(2)), "no output of Computed is a real number that depends on the"),
    "no axis of samples": (Computed(lambda x: x.flatten()[:3]), r"an output has shape \[3\], but .* \[2, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_paths_is_refused_by_name(name: str) -> None:
    module, message = REFUSED[name]
    inputs = (torch.zeros(1, 3, 4),) * 2 if name == "attention" else torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        path_norm(module, inputs)


def test_values_that_leave_torch_are_undefined() -> None:
    escaped = Computed(lambda x: x + torch.from_numpy(x.numpy() * 2))
    assert math.isnan(path_norm(escaped, torch.ones(1, 4)))


def test_a_network_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = mlp(3, 4, 2)
    group = scaling_group(net, torch.zeros(1, 3, device="meta"))
    with pytest.raises(RuntimeError, match="meta device"):
        path_norm(net, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="meta device"):
        imbalance(group)
    with pytest.raises(RuntimeError, match="meta device"):
        distance(net, mlp(3, 4, 2), group)


def test_a_default_device_is_kept_to() -> None:
    # A function of the network that makes a tensor must make it there; on the meta device it has no values.
    net = Computed(lambda x: x + torch.ones(3))
    with torch.device("meta"), pytest.raises(ValueError, match="on device meta"):
        path_norm(net, torch.zeros(1, 3, device="cpu"))


# Nothing changes ------------------------------------------------------------------------------------------------------


class Watchful(nn.Module):
    """Keeps statistics, counts its calls, draws random numbers, and looks whether its parameters are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ResNet(), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(3, 3)))
        self.head = nn.utils.weight_norm(nn.Linear(3, 2))
        self.position = nn.Parameter(torch.randn(4, 2))
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mean", torch.zeros(2))
        self.calls, self.history = 0, [torch.zeros(1)]
        self.expected: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: (id(tensor), tensor.detach().clone(), self.training) for name, tensor in tensors}

    def check(self, first: dict[str, Any]) -> None:
        for (name, one), two in zip(first.items(), self.state().values(), strict=True):
            assert one[::2] == two[::2], name
            assert torch.equal(one[1], two[1]), name

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.expected:
            with torch._C._DisableTorchDispatch():
                self.check(self.expected)
        x = self.head(self.body(x)) + self.norm(self.position).sum(0)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.history.append(self.mean)
        random.random()
        return x - self.mean


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_metric_changes_anything_even_meanwhile(training: bool) -> None:
    net = Watchful().train(training)
    inputs = torch.randn(2, 1, 8, 8, requires_grad=True)
    given = inputs.detach().clone()
    net(inputs).sum().backward()
    group = scaling_group(net, inputs)
    first, calls, history = net.state(), net.calls, list(net.history)
    gradients = [p.grad.clone() for p in net.parameters()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), net.head.weight
    net.expected = first
    values = [path_norm(net, inputs, p) for p in (1, 2, 1)]
    assert values[0] == values[2]
    net.expected = {}
    imbalance(group)
    distance(net, net, group)
    net.check(first)
    assert net.calls == calls
    assert list(map(id, net.history)) == list(map(id, history))
    assert same(gradients, [p.grad for p in net.parameters()])
    assert torch.equal(inputs, given)
    assert inputs.grad is not None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert net.head.weight is before[3]


# Imbalance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RESCALED[::4], ids=lambda case: case.name)
def test_imbalance_is_the_largest_ratio_of_what_grows_and_what_shrinks_with_a_unit(
    case: Case, generator: torch.Generator
) -> None:
    module, inputs = prepared(case, generator)
    group = scaling_group(module, *inputs)
    # Element by element: by which power of the unit each is multiplied.
    exponents = directions(group)
    exponents = exponents.where(exponents.abs() > 1e-9, 0.0)
    squares = torch.cat([p.detach().flatten() for p in group.parameters.values()]).square()
    ratio = (squares @ exponents.clamp(min=0)) / (squares @ -exponents.clamp(max=0))
    sides = ratio.isfinite() & (ratio > 0)
    assert torch.equal(sides, ~group.scale_invariant)
    largest = torch.maximum(ratio, 1 / ratio)[sides].amax().sqrt() if sides.any() else torch.ones(())
    actual = imbalance(group)
    if sides.all():
        assert actual == pytest.approx(float(largest), rel=1e-11)
    assert actual >= float(largest) * (1 - 1e-11)
    group.balance_()
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_unit_off_by_a_factor_is_off_balance_by_its_square(factor: float) -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    scale = torch.zeros(5, dtype=torch.float64)
    scale[2] = math.log(factor)
    group.act_(scale)
    assert imbalance(group) == pytest.approx(9.0, rel=1e-10)


def test_directions_of_normalised_weights_are_off_balance_by_their_length() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)
    direction = net[0].parametrizations.weight.original1
    with torch.no_grad():
        direction[1] *= 5
    assert imbalance(group) == pytest.approx(5.0, rel=1e-10)
    with torch.no_grad():
        direction[1] /= 50
    assert imbalance(group) == pytest.approx(10.0, rel=1e-10)


def test_dormant_units_are_left_out_and_undefined_elements_are_not() -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[0].weight[1] *= 100
    assert imbalance(group) == pytest.approx(1.0, abs=1e-10)
    with torch.no_grad():
        net[2].weight.zero_()
    assert imbalance(group) == 1.0
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    assert math.isnan(imbalance(group))


def test_a_network_without_units_is_balanced() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    assert imbalance(scaling_group(net, zeros(1, 2))) == 1.0


# Distance -------------------------------------------------------------------------------------------------------------


def built_again(case: Case, module: nn.Module) -> nn.Module:
    other = case.build()
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("case", RESCALED[1::5], ids=lambda case: case.name)
def test_the_distance_between_members_of_one_class_is_zero(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    group = scaling_group(module, *inputs)
    other = built_again(case, module)
    assert distance(module, other, group) == 0.0
    own = scaling_group(other, *inputs)
    own.act_(torch.randn(own.num_units, generator=generator, dtype=torch.float64))
    start, end = copies(group), copies(own)
    assert distance(module, other, group, relative=True) < 1e-10
    assert distance(other, module, own, relative=True) < 1e-10
    for name in start:
        assert torch.equal(group.parameters[name], start[name])
        assert torch.equal(own.parameters[name], end[name])


def test_the_distance_is_one_of_balanced_weights(generator: torch.Generator) -> None:
    net = ResidualMLP().double()
    group = scaling_group(net, zeros(1, 3))
    group.balance_()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)  # biases, too, which is a scale of no unit; the stem's side grows as the head's does
    own = scaling_group(other, zeros(1, 3))
    own.balance_()
    size = torch.cat([p.detach().flatten() for p in net.parameters()])
    moved = torch.cat([p.detach().flatten() for p in other.parameters()])
    expected = float((moved - size).norm())
    assert distance(rescaled(other, own, generator), net, group) == pytest.approx(expected, rel=1e-9)
    relative = distance(rescaled(other, own, generator), net, group, relative=True)
    assert relative == pytest.approx(expected / float(size.norm()), rel=1e-9)


def test_the_distance_is_a_metric_on_classes(generator: torch.Generator) -> None:
    nets = [ResidualMLP().double() for _ in range(3)]
    for net in nets:
        draw_(net, generator)
    group = scaling_group(nets[0], zeros(1, 3))
    apart = torch.tensor([[distance(one, two, group) for two in nets] for one in nets])
    torch.testing.assert_close(apart, apart.T, rtol=1e-12, atol=0.0)
    assert bool((apart.diagonal() == 0).all())
    assert float((apart + torch.eye(3)).min()) > 0.1
    through = apart[:, :, None] + apart[None]  # [from, through, to]
    assert bool((apart <= through.amin(1) + 1e-12).all())
    moved = [rescaled(net, group, generator) for net in nets]
    again = torch.tensor([[distance(one, two, group) for two in moved] for one in nets])
    torch.testing.assert_close(again, apart, rtol=1e-9, atol=1e-9)


def test_parameters_that_no_unit_rescales_and_that_are_frozen_count() -> None:
    net = mlp(3, 5, 2).double()
    net.offset = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    net[0].weight.requires_grad_(False)
    group = scaling_group(net, zeros(1, 3))
    assert "0.weight" not in group.parameters
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.offset.add_(torch.tensor([3.0, 0.0]))
        other[0].weight[0, 0] += 4.0
    assert distance(net, other, group) == pytest.approx(5.0, rel=1e-12)


def test_what_a_dormant_unit_makes_no_use_of_counts_as_zero(generator: torch.Generator) -> None:
    net = mlp(3, 5, 4, 2).double()
    draw_(net, generator)
    with torch.no_grad():
        net[2].weight[:, 1] = 0  # nothing leads out of one unit
        net[2].weight[3] = 0  # and nothing into another
        net[2].bias[3] = 0
    group = scaling_group(net, zeros(1, 3))
    assert int((~group.alive()).sum()) == 2
    other = rescaled(net, group, generator, 2.0)
    assert distance(net, other, group) < 1e-10
    used = copy.deepcopy(net)
    with torch.no_grad():
        used[0].weight[1] = 7
        used[4].weight[:, 3] = 7
    assert distance(net, used, group) < 1e-10
    with torch.no_grad():
        used[0].weight[0] *= 2
    assert distance(net, used, group) > 0.1


class Adapted(nn.Module):
    """Attention, whose scales are products, with an adapter of low rank that begins as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x) + self.up(self.down(x))
        return self.head(F.scaled_dot_product_attention(self.query(x), self.key(x), value))


def test_a_dormant_adapter_beside_attention_does_not_count(generator: torch.Generator) -> None:
    net = Adapted().double()
    group = scaling_group(net, zeros(1, 5, 3))
    assert not bool(group.monomials.simple.all())
    assert int((~group.alive()).sum()) == 2
    assert distance(net, rescaled(net, group, generator), group) < 1e-10
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.query.weight.add_(1.0)
    assert distance(net, other, group) > 0.1


def test_a_distance_of_nothing_is_zero_and_of_what_is_undefined_undefined() -> None:
    net = mlp(3, 5, 2).double()
    group = scaling_group(net, zeros(1, 3))
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan
    assert math.isnan(distance(broken, net, group))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert distance(net, copy.deepcopy(net), group, relative=True) == 0.0


def test_types_may_differ() -> None:
    net = mlp(3, 5, 2).bfloat16()
    group = scaling_group(net, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert distance(net, copy.deepcopy(net).double(), group) == 0.0
    assert imbalance(group) == pytest.approx(imbalance(scaling_group(net.double(), zeros(1, 3))), rel=1e-12)


def test_models_that_do_not_match_are_refused_with_what_differs() -> None:
    net, wide, deep = mlp(3, 5, 2), mlp(3, 6, 2), mlp(3, 5, 5, 2)
    group = scaling_group(net, zeros(1, 3))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[5, 3\] in the model and \[6, 3\] in the reference"):
        distance(net, wide, group)
    with pytest.raises(ValueError, match=r"'4.weight' is in the reference only"):
        distance(net, deep, group)
    with pytest.raises(ValueError, match=r"'4.weight' is in the model only"):
        distance(deep, net, group)
    around = nn.Sequential(net)
    with pytest.raises(
        ValueError, match=r"the group is not one of the models: '0.weight' is in the group only.*part of"
    ):
        distance(around, copy.deepcopy(around), group)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[5, 3\] in the group and \[6, 3\] in the models"):
        distance(wide, copy.deepcopy(wide), group)


# As torchmetrics metrics ----------------------------------------------------------------------------------------------


def all_metrics() -> MetricCollection:
    return MetricCollection(
        {
            "l1": PathNorm(1),
            "l2": PathNorm(2),
            "log": PathNorm(2, log=True),
            "imbalance": UnitImbalance(),
            "distance": EquivalentClassDistance(),
            "absolute": EquivalentClassDistance(relative=False),
        }
    )


def test_several_updates_are_averaged_until_a_reset() -> None:
    nets = [mlp(3, 4, 2).double() for _ in range(3)]
    values = [path_norm(net, zeros(1, 3)) for net in nets]
    metric = PathNorm(1)
    for net, value in zip(nets, values, strict=True):
        assert float(metric(net, zeros(1, 3))) == pytest.approx(value, rel=1e-15)
    assert float(metric.compute()) == pytest.approx(sum(values) / 3, rel=1e-14)
    metric.reset()
    metric.update(nets[1], zeros(1, 3))
    assert float(metric.compute()) == values[1]
    assert metric.compute().dtype is torch.float64


def test_a_collection_gives_each_metric_what_it_asks_for() -> None:
    net = mlp(3, 4, 2).double()
    # A single path: all norms are one, as the ratio is, and must not be taken for one metric.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight[0, 0] = net[2].weight[0, 0] = 1
    group = scaling_group(net, zeros(1, 3))
    reference = copy.deepcopy(net)
    with torch.no_grad():
        reference[2].weight[0, 0] = -1
    metrics = all_metrics()
    given = {"inputs": zeros(1, 3), "reference": reference, "group": group}
    metrics.update(model=net, **given)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {"l1": 1, "l2": 1, "log": 0, "imbalance": 1, "distance": 2**0.5, "absolute": 2}
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    metrics.reset()
    metrics.update(model=net, **given)
    values = {name: float(value) for name, value in metrics.compute().items()}
    norms = {f"l{p}": path_norm(net, zeros(1, 3), p) for p in (1, 2)}
    expected = {
        "log": math.log(norms["l2"]),
        "imbalance": imbalance(group),
        "distance": distance(net, reference, group, relative=True),
        "absolute": distance(net, reference, group),
    }
    assert values == pytest.approx({**norms, **expected}, rel=1e-12)
    assert len({round(value, 6) for value in values.values()}) == 6


def test_metrics_can_be_pickled_copied_moved_and_saved_with_a_module() -> None:
    net = mlp(3, 4, 2)
    given = {"model": net, "inputs": zeros(1, 3), "group": scaling_group(net, zeros(1, 3))}
    metrics = all_metrics()
    metrics.update(**given, reference=mlp(3, 4, 2))
    expected = metrics.compute()
    for other in (pickle.loads(pickle.dumps(metrics)), copy.deepcopy(metrics), metrics.clone(), metrics.to("cpu")):
        assert other.compute() == expected
    metrics.persistent(True)
    module = nn.ModuleDict({"net": net, "metrics": metrics})
    loaded = nn.ModuleDict({"net": mlp(3, 4, 2), "metrics": all_metrics()})
    loaded["metrics"].persistent(True)
    loaded.load_state_dict(module.state_dict())
    assert loaded["metrics"].compute() == expected
    assert list(module.parameters()) == list(net.parameters())
    half = copy.deepcopy(module).half()
    half["metrics"].reset()
    half["metrics"].update(**given, reference=net)
    assert half["metrics"]["l1"].compute() == expected["l1"]


class Monitored(Classifier):
    """A pipeline that logs all metrics, of its first call and at the end of every epoch."""

    def __init__(self, monitored: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.monitored = monitored
        self.group: ScalingGroup | None = None
        self.start = [copy.deepcopy(self.net)]  # in a list it is no submodule
        self.metrics = all_metrics()
        self.first: dict[str, Tensor] = {}

    def on_fit_start(self) -> None:
        dtype = next(self.parameters()).dtype
        self.start[0].to(dtype)
        self.group = scaling_group(self.net, torch.zeros(1, 64, dtype=dtype))

    def measure(self, images: Tensor) -> None:
        self.metrics.update(model=self.net, inputs=images, group=self.group, reference=self.start[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if self.monitored and not self.first:
            self.measure(batch[0])
            self.first = self.metrics.compute()
            self.metrics.reset()
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.monitored:
            self.measure(torch.zeros(1, 64, dtype=next(self.parameters()).dtype))
            self.log_dict(dict(self.metrics.items()))


@pytest.mark.parametrize("example", [None, torch.zeros(1, 64)], ids=["watched", "traced"])
def test_logged_next_to_the_callback_they_change_nothing(example: Tensor | None) -> None:
    runs = []
    for monitored in (False, True):
        seed_everything(3, verbose=False)
        module, callback = Monitored(monitored, example=example), quiet()
        run = fit(module, callback)
        runs.append((weights(module), callback.group.num_units, run.callback_metrics))
    assert runs[0][1] == runs[1][1] == 32
    assert same(runs[0][0], runs[1][0])
    logged = {name: float(value) for name, value in runs[1][2].items()}
    inputs = torch.zeros(1, 64)
    expected = {
        "l1": path_norm(module, inputs, 1),
        "l2": path_norm(module, inputs, 2),
        "log": math.log(path_norm(module, inputs, 2)),
        "imbalance": imbalance(module.group),
        "distance": distance(module.net, module.start[0], module.group, relative=True),
        "absolute": distance(module.net, module.start[0], module.group),
    }
    assert logged == pytest.approx(expected, rel=1e-6)
    assert expected["imbalance"] > 1.0001
    assert float(module.first["absolute"]) < 1e-4 < expected["distance"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_they_work_in_every_precision(precision: str) -> None:
    seed_everything(3, verbose=False)
    module = Monitored()
    run = fit(module, precision=precision, max_epochs=1, limit_train_batches=2)
    dtype = next(module.parameters()).dtype
    assert dtype is {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert float(run.callback_metrics["l1"]) == pytest.approx(path_norm(module.double(), torch.zeros(1, 64)), rel=1e-6)
    assert float(run.callback_metrics["imbalance"]) == pytest.approx(imbalance(module.group), rel=1e-6)
