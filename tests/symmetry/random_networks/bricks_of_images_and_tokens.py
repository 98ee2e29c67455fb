"""Bricks for images and for tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.random_networks.descriptions import Brick, Site, activation, brick
from tests.symmetry.zoo.sequence.bricks import causal_mask
from tests.symmetry.zoo.sequence.llama import Rotary, apply_rotary
from tests.symmetry.zoo.tiny import Function

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
