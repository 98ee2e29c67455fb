"""Bricks for all kinds of data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.symmetry.random_networks.descriptions import HALVING, POINTWISE, Brick, Site, activation, brick, neurons
from tests.symmetry.zoo.tiny import Function


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
