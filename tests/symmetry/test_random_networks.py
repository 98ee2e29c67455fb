"""Networks put together at random from the bricks of real ones: exact action, one balanced member, nothing missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2, prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_ecopt.symmetry import scaling_group
from tests.symmetry.helpers import assert_complete, assert_same, copies, count_freedoms, draw_, evaluate, put_
from tests.symmetry.test_invariance import assert_same_weights, log_scales
from tests.symmetry.zoo.sequence import Rotary, apply_rotary, causal_mask
from tests.symmetry.zoo.tiny import Function

# Descriptions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brick:
    """One step of a random network; not every kind needs all of it."""

    kind: str
    width: int = 1
    activation: str = "relu"
    bias: bool = True


@dataclass(frozen=True)
class Network:
    """What a random network is made of.

    Args:
        data: what comes in: ``vectors``, ``images`` or ``tokens``.
        channels: of the input.
        entry: how inputs become the first activations.
        bricks: steps on data of this kind.
        reduction: how images and tokens become vectors.
        tail: further steps, on vectors.
        head: what is returned.
        frozen: numbers of parameters that require no gradient.
    """

    data: str
    channels: int
    entry: str = "plain"
    bricks: Sequence[Brick] = ()
    reduction: str = "mean"
    tail: Sequence[Brick] = ()
    head: str = "linear"
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """The place of a brick: the kind of data, and the shape of what comes in."""

    data: str
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """That of the channels."""
        return 2 if self.data == "tokens" else 1

    @property
    def width(self) -> int:
        return self.shape[self.axis]

    @property
    def length(self) -> int:
        """Number of positions."""
        return prod(self.shape[1:]) // self.width

    def layer(self, outputs: int, bias: bool = True) -> nn.Module:
        """A linear layer, or for images a convolution of single pixels."""
        if self.data == "images":
            return nn.Conv1d(self.width, outputs, 1, bias=bias)
        return nn.Linear(self.width, outputs, bias)

    def along(self, vector: Tensor) -> Tensor:
        """One number for each channel, such that it broadcasts."""
        return vector[:, None] if self.data == "images" else vector

    def wide(self, width: int) -> Site:
        """The same place with another number of channels."""
        return replace(self, shape=(*self.shape[: self.axis], width, *self.shape[self.axis + 1 :]))


Builder = Callable[[Site, Brick], nn.Module]
BUILDERS: dict[str, dict[str, Builder]] = {"vectors": {}, "images": {}, "tokens": {}}
EVERYWHERE = tuple(BUILDERS)


def brick(*data: str, name: str | None = None, **options: Any) -> Callable[[Callable[..., nn.Module]], Any]:
    """Register how a kind of brick is built, for these kinds of data; simple kinds come first."""

    def register(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        for kind in data or EVERYWHERE:
            BUILDERS[kind][name or function.__name__.replace("_", " ")] = partial(function, **options)
        return function

    return register


# Activations ----------------------------------------------------------------------------------------------------------

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x + 0),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "identity": lambda x: x,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0),
    "relu squared": lambda x: x.relu().square(),
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
HALVING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "glu": lambda a, b: a * b.sigmoid(),
    "reglu": lambda a, b: a * b.relu(),
    "bilinear": torch.mul,
    "geglu": lambda a, b: a * F.gelu(b),
    "maxout": torch.maximum,
}
ACTIVATIONS = (*POINTWISE, "prelu", "crelu", *HALVING)


def activation(site: Site, name: str) -> nn.Module:
    """An activation of what the place has."""
    axis = site.axis
    if name == "prelu" and axis == 1:
        return nn.PReLU(site.width)
    if name == "prelu":
        return Function(lambda m, x: torch.where(x > 0, x, site.along(m.slope) * x), slope=torch.zeros(site.width))
    if name == "crelu":
        return Function(lambda m, x: torch.cat([x.relu(), (-x).relu()], axis))
    if name in HALVING:
        return Function(lambda m, x: HALVING[name](*x.chunk(2, axis)))
    return Function(lambda m, x: POINTWISE[name](x))


def neurons(site: Site, spec: Brick) -> tuple[nn.Module, int]:
    """A layer and its activation, and how many channels they have."""
    before = spec.width * (2 if spec.activation in HALVING else 1)
    after = spec.width * (2 if spec.activation == "crelu" else 1)
    layer = site.layer(before, spec.bias)
    return nn.Sequential(layer, activation(site.wide(before), spec.activation)), after


# Bricks for all data --------------------------------------------------------------------------------------------------


@brick()
def layer(site: Site, spec: Brick) -> nn.Module:
    return neurons(site, spec)[0]


@brick(name="activation")
def bare_activation(site: Site, spec: Brick) -> nn.Module:
    odd = spec.activation in HALVING and site.width % 2
    return activation(site, "prelu" if odd else spec.activation)


@brick()
def residual(site: Site, spec: Brick) -> nn.Module:
    """A skip past two layers."""
    up, hidden = neurons(site, spec)
    return Function(lambda m, x: x + m.down(m.up(x)), up=up, down=site.wide(hidden).layer(site.width, spec.bias))


@brick()
def residual_with_projection(site: Site, spec: Brick) -> nn.Module:
    up, hidden = neurons(site, spec)
    down = site.wide(hidden).layer(spec.width)
    skip = site.layer(spec.width, bias=False)
    return Function(lambda m, x: F.relu(m.skip(x) + m.down(m.up(x))), up=up, down=down, skip=skip)


@brick()
def concatenation(site: Site, spec: Brick) -> nn.Module:
    """A dense block."""
    return Function(lambda m, x: torch.cat([x, m.new(x)], site.axis), new=neurons(site, spec)[0])


@brick()
def product(site: Site, spec: Brick) -> nn.Module:
    one, width = neurons(site, spec)
    return Function(lambda m, x: m.one(x) * m.two(x), one=one, two=site.layer(width))


@brick()
def quotient(site: Site, spec: Brick) -> nn.Module:
    """Divided by a mean of absolute values."""
    return Function(
        lambda m, x: m.one(x) / m.two(x).abs().mean(site.axis, keepdim=True),
        one=neurons(site, spec)[0],
        two=site.layer(3),
    )


@brick()
def damped(site: Site, spec: Brick) -> nn.Module:
    """Divided by something larger than one."""
    one, width = neurons(site, spec)
    return Function(lambda m, x: m.one(x) / (1 + m.two(x).relu()), one=one, two=site.layer(width))


@brick()
def gain(site: Site, spec: Brick) -> nn.Module:
    return Function(lambda m, x: x * site.along(m.gain), gain=torch.zeros(site.width))


@brick()
def scalar_gain(site: Site, spec: Brick) -> nn.Module:
    return Function(lambda m, x: m.gain * x, gain=torch.zeros(()))


@brick()
def rezero(site: Site, spec: Brick) -> nn.Module:
    """A branch with a scalar gain beside a skip."""
    up, hidden = neurons(site, spec)
    down = site.wide(hidden).layer(site.width)
    return Function(lambda m, x: x + m.gain * m.down(m.up(x)), up=up, down=down, gain=torch.zeros(1))


@brick()
def shift(site: Site, spec: Brick) -> nn.Module:
    return Function(lambda m, x: x + site.along(m.shift), shift=torch.zeros(site.width))


@brick()
def affine(site: Site, spec: Brick) -> nn.Module:
    parts = {name: torch.zeros(site.width) for name in ("gain", "shift")}
    return Function(lambda m, x: torch.addcmul(site.along(m.shift), x, site.along(m.gain)), **parts)


@brick()
def split(site: Site, spec: Brick) -> nn.Module:
    """Half of the channels pass by."""

    def forward(m: Function, x: Tensor) -> Tensor:
        kept, changed = x.split([site.width - part, part], site.axis)
        return torch.cat([m.new(changed), kept], site.axis)

    part = (site.width + 1) // 2
    return Function(forward, new=neurons(site.wide(part), spec)[0])


@brick()
def fewer_channels(site: Site, spec: Brick) -> nn.Module:
    """The first channels of a layer, or every second one.

    Of a layer, so that nothing else happens to the others before: it would count as happening.
    """
    if spec.bias:
        return Function(lambda m, x: m.new(x).narrow(site.axis, 0, spec.width).relu(), new=site.layer(spec.width + 1))
    return Function(
        lambda m, x: m.new(x).relu()[(slice(None),) * site.axis + (slice(None, None, 2),)], new=site.layer(3)
    )


@brick()
def reordered(site: Site, spec: Brick) -> nn.Module:
    """Some of the channels of a layer, in another order."""
    return Function(
        lambda m, x: m.new(x)[(slice(None),) * site.axis + ([2, 0, 2],)].relu(), new=site.layer(3, spec.bias)
    )


@brick()
def largest(site: Site, spec: Brick) -> nn.Module:
    """The two largest of the channels of a layer."""
    return Function(lambda m, x: m.new(x).topk(2, site.axis).values, new=site.layer(spec.width + 1, spec.bias))


@brick()
def modulus(site: Site, spec: Brick) -> nn.Module:
    """Of complex numbers."""
    layers = {"one": site.layer(spec.width), "two": site.layer(spec.width, spec.bias)}
    return Function(lambda m, x: (m.one(x).square() + m.two(x).square()).sqrt(), **layers)


@brick()
def divided_by_deviation(site: Site, spec: Brick) -> nn.Module:
    """By the standard deviation of the channels, without an epsilon."""
    return Function(lambda m, x: (y := m.new(x)) / y.std(site.axis, keepdim=True), new=site.layer(3))


@brick("vectors", "tokens")
def prototypes(site: Site, spec: Brick) -> nn.Module:
    """Squared distances from learned points."""
    points = torch.zeros(spec.width, site.width)
    return Function(lambda m, x: (x.unsqueeze(-2) - m.points).square().sum(-1), points=points)


@brick()
def more_channels(site: Site, spec: Brick) -> nn.Module:
    """Zeros on both sides, as in a shortcut without parameters."""
    behind = (0, 0) if site.data == "images" else ()
    return Function(
        lambda m, x: F.relu(F.pad(x, (*behind, spec.width, 1))) + m.new(x), new=site.layer(site.width + spec.width + 1)
    )


@brick()
def shuffle(site: Site, spec: Brick) -> nn.Module:
    """The channels of two groups take turns; an odd number is turned round."""

    def forward(m: Function, x: Tensor) -> Tensor:
        if site.width % 2:
            return x.flip(site.axis)
        before, after = x.shape[: site.axis], x.shape[site.axis + 1 :]
        return x.view(*before, 2, -1, *after).transpose(site.axis, site.axis + 1).reshape(x.shape)

    return Function(forward)


@brick()
def rolled(site: Site, spec: Brick) -> nn.Module:
    return Function(lambda m, x: x + m.new(x).roll(1, site.axis), new=site.layer(site.width))


@brick()
def grouped_channels(site: Site, spec: Brick) -> nn.Module:
    """The mean of pairs of channels, as a view."""

    def forward(m: Function, x: Tensor) -> Tensor:
        x = m.new(x)
        before, after = x.shape[: site.axis], x.shape[site.axis + 1 :]
        return x.reshape(*before, spec.width, 2, *after).mean(site.axis + 1)

    return Function(forward, new=site.layer(2 * spec.width, spec.bias))


@brick()
def twice(site: Site, spec: Brick) -> nn.Module:
    """The same layer in a row."""
    act = activation(site, spec.activation if spec.activation in POINTWISE else "relu")
    return Function(lambda m, x: m.act(m.same(m.act(m.same(x)))), same=site.layer(site.width, spec.bias), act=act)


@brick()
def residual_twice(site: Site, spec: Brick) -> nn.Module:
    """The same block in a row."""

    def forward(m: Function, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.down(m.up(x))
        return x

    up, hidden = neurons(site, spec)
    return Function(forward, up=up, down=site.wide(hidden).layer(site.width, spec.bias))


@brick()
def side_by_side(site: Site, spec: Brick) -> nn.Module:
    """The same layer on two data."""
    same = neurons(site, spec)[0]
    return Function(lambda m, x: torch.cat([m.same(x), m.same(-x)], site.axis), same=same)


@brick()
def joined_siblings(site: Site, spec: Brick) -> nn.Module:
    """The same layer on two data, whose product is taken."""
    same = neurons(site, spec)[0]
    return Function(lambda m, x: m.same(x) * m.same(x.flip(0)), same=same)


def channels_last(site: Site, x: Tensor) -> Tensor:
    """Swap the axes of an image; its own inverse."""
    return x.transpose(1, 2) if site.data == "images" else x


@brick()
def tied(site: Site, spec: Brick) -> nn.Module:
    """An autoencoder with one matrix."""

    def forward(m: Function, x: Tensor) -> Tensor:
        hidden = F.relu(channels_last(site, x) @ m.matrix + m.bias)
        return channels_last(site, hidden @ m.matrix.t())

    return Function(forward, matrix=torch.zeros(site.width, spec.width), bias=torch.zeros(spec.width))


@brick()
def low_rank(site: Site, spec: Brick) -> nn.Module:
    """A matrix and the product of two smaller ones, as in LoRA; the matrix may be frozen."""

    def forward(m: Function, x: Tensor) -> Tensor:
        return channels_last(site, F.relu(F.linear(channels_last(site, x), m.matrix + m.up @ m.down)))

    shapes = {"matrix": (spec.width, site.width), "up": (spec.width, 1), "down": (1, site.width)}
    result = Function(forward, **{name: torch.zeros(shape) for name, shape in shapes.items()})
    result.matrix.requires_grad_(spec.bias)
    return result


@brick()
def adapter(site: Site, spec: Brick) -> nn.Module:
    """LoRA as two layers beside one."""
    down, up = site.layer(1, bias=False), site.wide(1).layer(spec.width, bias=False)
    return Function(
        lambda m, x: F.relu(m.base(x) + 2 * m.up(m.down(x))), base=site.layer(spec.width, spec.bias), down=down, up=up
    )


@brick()
def normed_weight(site: Site, spec: Brick) -> nn.Module:
    """Of at least two channels: what is normed alone is a sign, whose derivative is nothing but rounding errors."""
    normed = parametrizations.weight_norm(site.wide(2).layer(spec.width, spec.bias))
    return nn.Sequential(site.layer(2), nn.LeakyReLU(0.2), normed, nn.ReLU())


@brick(name="absolute weight", change=torch.abs)
@brick(name="squared weight", change=torch.square)
@brick(name="scaled weight", change=lambda w: w * 0.5)
@brick(name="masked weight", change=lambda w: w * torch.ones_like(w).tril(w.shape[1] - 1 - (min(w.shape) > 1)))
@brick(name="centred weight", change=lambda w: w - w.mean(1, keepdim=True) / 2)
def computed_weight(site: Site, spec: Brick, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """No mask leaves out all of a channel: what would happen to it before would count as happening."""

    def forward(m: Function, x: Tensor) -> Tensor:
        return channels_last(site, F.linear(channels_last(site, x), change(m.matrix), m.bias).relu())

    return Function(forward, matrix=torch.zeros(spec.width, site.width), bias=torch.zeros(spec.width))


@brick()
def einsum(site: Site, spec: Brick) -> nn.Module:
    """Two heads, each with a matrix of its own, summed up."""

    def forward(m: Function, x: Tensor) -> Tensor:
        x = torch.einsum("...i,hio->...ho", channels_last(site, x), m.matrices)
        return channels_last(site, x.relu().sum(-2))

    return Function(forward, matrices=torch.zeros(2, site.width, spec.width))


@brick()
def bilinear_form(site: Site, spec: Brick) -> nn.Module:
    """Every output is a quadratic form of two layers."""
    pair = site.layer(2), site.layer(2)
    return Function(
        lambda m, x: channels_last(site, m.form(channels_last(site, m.one(x)).relu(), channels_last(site, m.two(x)))),
        one=pair[0],
        two=pair[1],
        form=nn.Bilinear(2, 2, min(2, spec.width), bias=spec.bias),
    )


@brick(name="sigmoid gate", gate=torch.sigmoid)
@brick(name="relu gate", gate=torch.relu)
def squeeze_and_excitation(site: Site, spec: Brick, gate: Callable[[Tensor], Tensor]) -> nn.Module:
    """Channels are multiplied by gates that are computed from their means."""
    positions = {"vectors": (), "images": (2,), "tokens": (1,)}[site.data]

    def forward(m: Function, x: Tensor) -> Tensor:
        squeezed = x.mean(positions, keepdim=True) if positions else x
        return x * gate(m.up(m.down(squeezed).relu()))

    return Function(forward, down=site.layer(spec.width), up=site.wide(spec.width).layer(site.width, spec.bias))


@brick()
def highway(site: Site, spec: Brick) -> nn.Module:
    def forward(m: Function, x: Tensor) -> Tensor:
        gate = m.gate(x).sigmoid()
        return gate * m.new(x).relu() + (1 - gate) * x

    return Function(forward, gate=site.layer(site.width), new=site.layer(site.width))


@brick()
def experts(site: Site, spec: Brick) -> nn.Module:
    """A soft mixture of two layers."""

    def forward(m: Function, x: Tensor) -> Tensor:
        gates = m.gate(x).softmax(site.axis).unsqueeze(site.axis)
        return (torch.stack([m.one(x), m.two(x)], site.axis + 1) * gates).sum(site.axis + 1)

    return Function(forward, one=neurons(site, spec)[0], two=neurons(site, spec)[0], gate=site.layer(2))


@brick()
def in_place(site: Site, spec: Brick) -> nn.Module:
    """Memory that is filled piece by piece, then changed."""

    def forward(m: Function, x: Tensor) -> Tensor:
        new = m.new(x)
        width = new.shape[site.axis]
        result = x.new_zeros(site.wide(site.width + width).shape)
        result.narrow(site.axis, 0, width).copy_(new)
        result.narrow(site.axis, width, site.width).add_(x)
        result.narrow(site.axis, 0, 1).mul_(m.gain)
        return F.leaky_relu_(result, 0.3)

    return Function(forward, new=site.layer(spec.width, spec.bias), gain=torch.zeros(1))


@brick()
def dropout(site: Site, spec: Brick) -> nn.Module:
    return nn.Dropout(0.2)


@brick()
def unit_length(site: Site, spec: Brick) -> nn.Module:
    """A layer whose outputs are divided by their norm."""
    axis = site.axis
    return Function(lambda m, x: (y := m.new(x)) / y.norm(dim=axis, keepdim=True), new=site.layer(spec.width + 1))


@brick()
def soft_channels(site: Site, spec: Brick) -> nn.Module:
    """A softmax over channels."""
    return Function(lambda m, x: m.new(x).softmax(site.axis), new=site.layer(spec.width + 1, bias=False))


@brick("vectors", "images")
def batch_norm(site: Site, spec: Brick) -> nn.Module:
    return nn.BatchNorm1d(site.width, eps=0.1, affine=spec.bias)


@brick()
def layer_norm(site: Site, spec: Brick) -> nn.Module:
    """Over the channels, after a layer that makes them at least two."""
    width = spec.width + 1
    norm = nn.LayerNorm(width, eps=0.1, elementwise_affine=spec.bias)
    return Function(
        lambda m, x: channels_last(site, m.norm(channels_last(site, m.new(x)))), new=site.layer(width), norm=norm
    )


@brick()
def rms_norm(site: Site, spec: Brick) -> nn.Module:
    """By hand or that of torch, with a gain."""
    if spec.bias:
        norm = nn.RMSNorm(site.width, eps=0.1)
        return Function(lambda m, x: channels_last(site, m.norm(channels_last(site, x))), norm=norm)
    return Function(
        lambda m, x: site.along(m.gain) * (x * torch.rsqrt(x.pow(2).mean(site.axis, keepdim=True) + 0.1)),
        gain=torch.zeros(site.width),
    )


@brick("vectors", "images")
def group_norm(site: Site, spec: Brick) -> nn.Module:
    norm = nn.GroupNorm(spec.width, 2 * spec.width, eps=0.1, affine=spec.bias)
    return nn.Sequential(site.layer(2 * spec.width, bias=False), norm)


# Bricks for images ----------------------------------------------------------------------------------------------------


@brick("images", name="convolution", kernel_size=3, padding=1)
@brick("images", name="narrowing convolution", kernel_size=2, padding=1, stride=2)
@brick("images", name="dilated convolution", kernel_size=2, padding=1, dilation=2)
@brick("images", name="reflected convolution", kernel_size=3, padding=1, padding_mode="reflect")
def convolution(site: Site, spec: Brick, **options: Any) -> nn.Module:
    conv = nn.Conv1d(site.width, spec.width, bias=spec.bias, **options)
    return nn.Sequential(conv, activation(site.wide(spec.width), "prelu" if spec.activation == "prelu" else "relu"))


@brick("images", name="transposed convolution", stride=1)
@brick("images", name="widening convolution", stride=2)
def transposed_convolution(site: Site, spec: Brick, stride: int) -> nn.Module:
    """Where it widens, each pixel is made by one element of the kernel: it is the bias that holds pixels together."""
    bias = spec.bias or stride > 1
    return nn.Sequential(nn.ConvTranspose1d(site.width, spec.width, 2, stride, 1, bias=bias), nn.ReLU())


@brick("images")
def depthwise_convolution(site: Site, spec: Brick) -> nn.Module:
    return nn.Conv1d(site.width, site.width, 3, padding=1, groups=site.width, bias=spec.bias)


@brick("images")
def grouped_convolution(site: Site, spec: Brick) -> nn.Module:
    """Two groups, between ordinary layers."""
    grouped = nn.Conv1d(4, 2 * spec.width, 2, groups=2, bias=spec.bias, padding=1)
    return nn.Sequential(site.layer(4), nn.ReLU(), grouped, activation(site.wide(2 * spec.width), "prelu"))


@brick("images")
def instance_norm(site: Site, spec: Brick) -> nn.Module:
    """With an activation, as the mean of what is normalised is zero, and so might be what depends on it."""
    return nn.Sequential(nn.InstanceNorm1d(site.width, eps=0.1, affine=spec.bias), activation(site, "prelu"))


@brick("images")
def max_pool(site: Site, spec: Brick) -> nn.Module:
    return nn.MaxPool1d(2, ceil_mode=spec.bias) if site.length > 3 else nn.MaxPool1d(3, 1, padding=1)


@brick("images")
def average_pool(site: Site, spec: Brick) -> nn.Module:
    return nn.AvgPool1d(2, padding=1, count_include_pad=spec.bias)


@brick("images")
def adaptive_pool(site: Site, spec: Brick) -> nn.Module:
    return nn.AdaptiveAvgPool1d(3) if spec.bias else nn.AdaptiveMaxPool1d(2)


@brick("images")
def upsampling(site: Site, spec: Brick) -> nn.Module:
    return nn.Upsample(scale_factor=1.5, mode="linear" if spec.bias else "nearest")


@brick("images")
def channels_to_pixels(site: Site, spec: Brick) -> nn.Module:
    """What a pixel shuffle does, in one dimension, and a convolution that sees all pixels of an image."""

    def forward(m: Function, x: Tensor) -> Tensor:
        x = m.new(x).view(len(x), spec.width, 2, -1).transpose(2, 3)
        return m.smooth(x.reshape(len(x), spec.width, -1)).relu()

    smooth = nn.Conv1d(spec.width, spec.width, 3, padding=1)
    return Function(forward, new=site.layer(2 * spec.width, spec.bias), smooth=smooth)


@brick("images", "tokens")
def mixing(site: Site, spec: Brick) -> nn.Module:
    """A skip past two layers across positions, as in the MLP-Mixer."""

    def forward(m: Function, x: Tensor) -> Tensor:
        y = x if site.data == "images" else x.transpose(1, 2)
        y = m.down(m.up(y).relu())
        return x + (y if site.data == "images" else y.transpose(1, 2))

    up, down = nn.Linear(site.length, spec.width, spec.bias), nn.Linear(spec.width, site.length, spec.bias)
    return Function(forward, up=up, down=down)


@brick("images", "tokens")
def position_bias(site: Site, spec: Brick) -> nn.Module:
    """One learned number for each channel of each position."""
    return Function(lambda m, x: x + m.positions, positions=torch.zeros(site.shape[1:]))


@brick("tokens")
def position_gain(site: Site, spec: Brick) -> nn.Module:
    """One gain for each position. (Not for images: convolutions hold pixels together, even where they see one each.)"""
    return Function(lambda m, x: x * m.gains, gains=torch.zeros(site.length, 1))


@brick("images", "tokens")
def without_an_end(site: Site, spec: Brick) -> nn.Module:
    """Leave out a position, unless there are few."""
    axis = 3 - site.axis
    return Function(lambda m, x: x.narrow(axis, 0, site.length - 1) if site.length > 2 else x)


@brick("images", "tokens")
def running_mean(site: Site, spec: Brick) -> nn.Module:
    """Of all positions before."""
    return Function(lambda m, x: m.new(x).relu().cumsum(3 - site.axis), new=site.layer(spec.width, spec.bias))


@brick("images", "tokens")
def global_context(site: Site, spec: Brick) -> nn.Module:
    """The mean over all positions is added to each of them."""
    return Function(lambda m, x: x + m.new(x.mean(3 - site.axis, keepdim=True)), new=site.layer(site.width, spec.bias))


# Bricks for tokens ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention of two heads with a skip, by hand or with the function of torch."""

    def __init__(self, width: int, head: int, bias: bool, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, head
        shared = 1 if kind == "grouped attention" else 2  # heads of keys and values
        self.query = nn.Linear(width, 2 * head, bias)
        self.key, self.value = nn.Linear(width, shared * head, bias), nn.Linear(width, shared * head, bias)
        self.output = nn.Linear(2 * head, width, bias)
        if kind == "rotary attention":
            self.rotary = Rotary(head)
        if kind == "attention with gains":
            self.query_gain, self.key_gain = nn.Parameter(torch.zeros(head)), nn.Parameter(torch.zeros(head))
            self.temperature = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], -1, self.head).transpose(1, 2) for part in self.parts)
        if self.kind == "rotary attention":
            q, k = apply_rotary(q, k, *self.rotary(x))
        if self.kind == "attention with gains":
            q, k = q * self.query_gain, k * self.key_gain
        if self.kind == "normed attention":
            q, k = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 0.1) for y in (q, k))
        mixed = self.mix(q, k, v, causal_mask(x) if "causal" in self.kind else None)
        return x + self.output(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.kind == "linear attention":
            q, k = q.relu(), k.relu()
            return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 0.1)
        if self.kind == "fused causal attention":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kind == "fused attention":
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(-1, -2) * self.head**-0.5
        if self.kind == "attention with gains":
            scores = scores * self.temperature
        if self.kind == "relu attention":
            return scores.relu() @ v
        return (scores if mask is None else scores + mask).softmax(-1) @ v


def _register_attention() -> None:
    plain = ("attention", "causal attention", "fused attention", "fused causal attention", "grouped attention")
    for kind in (*plain, "attention with gains", "normed attention", "relu attention", "linear attention"):
        brick("tokens", name=kind)(
            lambda site, spec, kind=kind: Attention(site.width, min(2, spec.width), spec.bias, kind)
        )
    brick("tokens", name="rotary attention")(lambda site, spec: Attention(site.width, 2, spec.bias, "rotary attention"))


_register_attention()


@brick("tokens")
def multihead_attention(site: Site, spec: Brick) -> nn.Module:
    """That of torch, on two channels for each of one or two heads."""
    attention = nn.MultiheadAttention(2, 1 if spec.bias else 2, batch_first=True)
    return Function(lambda m, x: m.attention(y := m.new(x), y, y)[0], new=site.layer(2), attention=attention)


@brick("tokens")
def class_token(site: Site, spec: Brick) -> nn.Module:
    """A learned token in front."""
    token = torch.zeros(1, 1, site.width)
    return Function(lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), token=token)


@brick("tokens", "vectors")
def recurrence(site: Site, spec: Brick) -> nn.Module:
    """A recurrent cell with ReLU; all of its states, or the last of three steps with one vector."""

    def forward(m: Function, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), spec.width)
        states = []
        for step in x.unbind(1) if site.data == "tokens" else [x, x, x]:
            state = F.relu(m.new(step) + m.old(state))
            states.append(state)
        return torch.stack(states, 1) if site.data == "tokens" else state

    return Function(forward, new=nn.Linear(site.width, spec.width), old=nn.Linear(spec.width, spec.width, spec.bias))


@brick("tokens")
def torch_recurrence(site: Site, spec: Brick) -> nn.Module:
    rnn = nn.RNN(site.width, spec.width, nonlinearity="relu", batch_first=True, bias=spec.bias)
    return Function(lambda m, x: m.rnn(x)[0], rnn=rnn)


# Beginning and end ----------------------------------------------------------------------------------------------------

SHAPES = {"vectors": (5,), "images": (4, 5), "tokens": (4, 3)}  # batch, positions
WORDS = 5
ENTRIES = {
    "vectors": ("plain", "added", "joined", "multiplied", "shared"),
    "images": ("plain", "added", "joined"),
    "tokens": ("plain", "added", "crossed", "embedded", "embedded with positions"),
}
REDUCTIONS = {
    "vectors": ("mean",),
    "images": ("mean", "flatten", "maximum"),
    "tokens": ("mean", "flatten", "last and mean", "query"),
}
HEADS = ("linear", "none", "two", "features", "dictionary", "tied")


def entry(site: Site, name: str, channels: int) -> nn.Module:
    """From the inputs to the first activations."""
    if name == "plain":
        return Function(lambda m, x: x)
    if name.startswith("embedded"):
        if name == "embedded":
            return nn.Embedding(WORDS, channels)
        return Function(
            lambda m, x: m.words(x) + m.positions(torch.arange(x.shape[1])),
            words=nn.Embedding(WORDS, channels),
            positions=nn.Embedding(site.length, channels),
        )
    if name == "crossed":
        parts = {part: site.layer(2) for part in ("query", "key", "value")}
        return Function(lambda m, a, b: F.scaled_dot_product_attention(0.2 * m.query(a), m.key(b), m.value(b)), **parts)
    layers = {"one": site.layer(2), "two": site.layer(2)}
    if name == "shared":
        return Function(lambda m, a, b: m.one(a).relu() - m.one(b).relu(), one=layers["one"])
    join = {"added": torch.add, "multiplied": torch.mul, "joined": lambda a, b: torch.cat([a, b], site.axis)}[name]
    return Function(lambda m, a, b: join(m.one(a).relu(), m.two(b)), **layers)


def reduction(site: Site, name: str) -> nn.Module:
    """From images or tokens to vectors."""
    axis = 3 - site.axis
    if name == "query":

        def forward(m: Function, x: Tensor) -> Tensor:
            return ((0.2 * x @ m.query).softmax(1).unsqueeze(1) @ x).squeeze(1)

        return Function(forward, query=torch.zeros(site.width))
    simple = {
        "mean": lambda m, x: x.mean(axis),
        "maximum": lambda m, x: x.amax(axis),
        "last and mean": lambda m, x: torch.cat([x[:, -1], x.mean(axis)], 1),
        "flatten": lambda m, x: x.flatten(1),
    }
    return Function(simple[name])


def head(width: int, name: str) -> nn.Module:
    """From vectors to what is returned."""
    if name == "none":
        return Function(lambda m, x: x)
    if name == "two":
        return Function(lambda m, x: (m.one(x), m.two(x.relu())), one=nn.Linear(width, 1), two=nn.Linear(width, 1))
    if name == "features":
        return Function(lambda m, x: (m.one(x), x[:, :1]), one=nn.Linear(width, 2))
    if name == "dictionary":
        return Function(lambda m, x: {"logits": m.one(x), "last": x[:, -1]}, one=nn.Linear(width, 2))
    if name == "tied":
        return Function(lambda m, x: F.linear(m.one(x), m.one.weight.t()), one=nn.Linear(width, 2))
    return nn.Linear(width, 2)


class Composed(nn.Module):
    """The network of a description, in float64.

    Between the bricks there are constant factors, powers of two, so that numbers stay of ordinary size however many
    products and squares there are; without them the count of freedoms would have no clear gap.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.steps, self.factors = nn.ModuleList(), []
        generator = torch.Generator().manual_seed(0)
        batch, *positions = SHAPES[network.data]
        shape = (
            (batch, *positions, network.channels) if network.data == "tokens" else (batch, network.channels, *positions)
        )
        self.site = Site(network.data, shape)
        x = self._add(entry(self.site, network.entry, network.channels), generator, *self.sample(generator, 4.0))
        for spec in network.bricks:
            site = Site(network.data, tuple(x.shape))
            x = self._add(BUILDERS[network.data][spec.kind](site, spec), generator, x)
        if network.data != "vectors":
            x = self._add(reduction(Site(network.data, tuple(x.shape)), network.reduction), generator, x)
        for spec in network.tail:
            x = self._add(BUILDERS["vectors"][spec.kind](Site("vectors", tuple(x.shape)), spec), generator, x)
        self._add(head(x.shape[1], network.head), generator, x)
        # The biases of keys do not matter, but frozen ones hold the keys, and so the queries, as far as anyone knows.
        parameters = [p for name, p in self.named_parameters() if not name.endswith("key.bias")]
        for number in network.frozen:
            if number < len(parameters):
                parameters[number].requires_grad_(False)

    @torch.no_grad()
    def _add(self, module: nn.Module, generator: torch.Generator, *inputs: Tensor) -> Tensor:
        """Append a step; returns what it makes of an example."""
        draw_(module.double(), generator)
        size = float(torch.stack([x.double().square().mean() for x in inputs]).mean().sqrt())
        exact = inputs[0].is_floating_point() and not 1.0 < size < 4.0 and size > 0
        self.factors.append(2.0 ** (1 - round(log2(size))) if exact else None)
        self.steps.append(module)
        return module.eval()(*self._scaled(inputs, self.factors[-1]))

    @staticmethod
    def _scaled(inputs: Sequence[Tensor], factor: float | None) -> list[Tensor]:
        return [x if factor is None else x * factor for x in inputs]

    def forward(self, *inputs: Tensor) -> Any:
        x: Any = inputs
        for step, factor in zip(self.steps, self.factors, strict=True):
            x = step(*self._scaled(x if isinstance(x, tuple) else (x,), factor))
        return x

    def sample(self, generator: torch.Generator, size: float) -> tuple[Tensor, ...]:
        """Inputs of one call."""
        if self.network.entry.startswith("embedded"):
            return (torch.randint(0, WORDS, self.site.shape[:2], generator=generator),)
        count = 1 if self.network.entry == "plain" else 2
        return tuple(
            size * torch.randn(self.site.shape, generator=generator, dtype=torch.float64) for _ in range(count)
        )


# Strategies -----------------------------------------------------------------------------------------------------------

OWN = {data: [kind for kind in kinds if kind not in BUILDERS["vectors"]] for data, kinds in BUILDERS.items()}


def bricks(data: str, most: int, least: int = 0) -> st.SearchStrategy[list[Brick]]:
    """A few bricks; those for this kind of data alone are as frequent as all others together."""
    kinds = st.sampled_from(list(BUILDERS[data]))
    kinds = kinds | st.sampled_from(OWN[data]) if OWN[data] else kinds
    one = st.builds(Brick, kinds, st.integers(1, 3), st.sampled_from(ACTIVATIONS), st.booleans())
    return st.lists(one, min_size=least, max_size=most)


def networks(data: str) -> st.SearchStrategy[Network]:
    described = st.builds(
        Network,
        data=st.just(data),
        channels=st.integers(1, 3),
        entry=st.sampled_from(ENTRIES[data]),
        bricks=bricks(data, 4, least=1),
        reduction=st.sampled_from(REDUCTIONS[data]),
        tail=st.just([]) if data == "vectors" else bricks("vectors", 1),
        head=st.sampled_from(HEADS),
        frozen=st.just(()) | st.tuples(st.integers(0, 9)),
    )
    return described.filter(fits)


def fits(network: Network) -> bool:
    """Small enough for a count, and something in it can be rescaled."""
    module = Composed(network)
    return 0 < sum(p.numel() for p in module.parameters() if p.requires_grad) <= 90


every_kind_of_data = pytest.mark.parametrize("data", EVERYWHERE)
seeds = st.integers(0, 1000)


def many(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )


# Tests ----------------------------------------------------------------------------------------------------------------


def assert_exact(network: Network, seed: int) -> None:
    """Acting and balancing change no output, and a class has one balanced member."""
    generator = torch.Generator().manual_seed(seed)
    module = Composed(network)
    draw_(module, generator)
    inputs = module.sample(generator, 1.0)
    group = scaling_group(module, *inputs)
    for training in (False, True):
        module.train(training)
        before = evaluate(module, inputs)
        group.act_(log_scales(group, generator))
        assert_same(evaluate(module, inputs), before)
    # Units that are not alive, if there are any, have no balanced scale, and are left alone.
    elsewhere = torch.where(group.alive(), log_scales(group, generator), 0.0)
    start = copies(group)
    group.balance_()
    assert_same(evaluate(module, inputs), before, 1e-9)
    balanced = copies(group)
    group.balance_()
    assert_same_weights(balanced, copies(group))
    put_(group, start)
    group.act_(elsewhere).balance_()
    assert_same_weights(balanced, copies(group))


def is_countable(module: Composed, seed: int) -> bool:
    """Whether the draws that the count makes are enough for it: half of them must tell as much as all.

    What is nearly always dead, behind a ReLU of a ReLU, takes part in too few of them. And where a soft function is
    saturated, derivatives are rounding errors; the count, which norms every row, would take them for numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    draw_(module, generator)
    module.sample(generator, 1.0)
    rows, living = count_freedoms(module, module.sample, generator)
    sizes = rows.abs().amax(1)
    if not bool(living.any()) or bool(((sizes > 0) & (sizes < 1e-12 * sizes.max())).any()):
        return False
    rows = rows[sizes > 0][:, living]
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows / rows.norm(dim=0)
    ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-9)) for part in (rows[: len(rows) // 2], rows)]
    return ranks[0] == ranks[1] and int((rows != 0).sum(0).min()) >= 20


@pytest.mark.parametrize(
    ("data", "kind"),
    [(data, kind) for data in EVERYWHERE for kind in (BUILDERS if data == "vectors" else OWN)[data]],
)
def test_every_brick(data: str, kind: str) -> None:
    network = Network(data, 2, bricks=[Brick("layer", 2), Brick(kind, 2)])
    assert_exact(network, 0)
    module = Composed(network)
    assert_complete(module, module.sample)


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(Network("vectors", 1, bricks=[Brick("layer"), Brick("split")]), id="a piece of no channels"),
        pytest.param(Network("vectors", 2, bricks=[Brick("more channels")]), id="zeros beside channels of one label"),
    ],
)
def test_networks_that_once_failed(network: Network) -> None:
    assert_exact(network, 0)
    module = Composed(network)
    assert_complete(module, module.sample)


@every_kind_of_data
@many(70)
@given(draw=st.data(), seed=seeds)
def test_random_networks_compute_the_same_after_acting_and_balancing(data: str, draw: st.DataObject, seed: int) -> None:
    assert_exact(draw.draw(networks(data), label="network"), seed)


@every_kind_of_data
@many(50)
@given(draw=st.data(), seed=seeds, training=st.booleans())
def test_random_networks_have_no_freedoms_but_those_found(
    data: str, draw: st.DataObject, seed: int, training: bool
) -> None:
    torch.manual_seed(seed)
    module = Composed(draw.draw(networks(data), label="network")).train(training)
    assume(is_countable(module, seed))
    assert_complete(module, module.sample, seed)
