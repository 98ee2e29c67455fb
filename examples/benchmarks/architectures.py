"""Architectures of real size, as their papers have them, with random weights and without dropout.

Each is one of :data:`ARCHITECTURES`; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def feed_forward(width: int, activation: nn.Module) -> list[nn.Module]:
    """The two linear layers of a transformer's block."""
    return [nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width)]


# ResNet-50 (He et al., arXiv:1512.03385; the stride is in the 3 x 3 convolutions, as everywhere by now) ---------------


def conv(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after)]


class Bottleneck(nn.Module):
    """Three convolutions around which the stream runs."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv(before, width, 1),
            nn.ReLU(inplace=True),
            *conv(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *conv(width, 4 * width, 1),
        )
        projects = stride != 1 or before != 4 * width
        self.shortcut = nn.Sequential(*conv(before, 4 * width, 1, stride)) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet50() -> nn.Module:
    """ResNet-50."""
    layers = [*conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for number in range(depth):
            layers.append(Bottleneck(before, width, 2 if stage > 0 and number == 0 else 1))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


# VGG-13 (Simonyan and Zisserman, arXiv:1409.1556) for small images ----------------------------------------------------


def vgg13() -> nn.Module:
    """VGG-13 for images of 32 x 32 pixels and 10 classes, with batch norm and one linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 128, 256, 512, 512):
        layers += [*conv(before, width, 3), nn.ReLU(inplace=True), *conv(width, width, 3), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


# ViT-B/16 (Dosovitskiy et al., arXiv:2010.11929) ----------------------------------------------------------------------


class SelfAttention(nn.MultiheadAttention):
    """Torch's attention of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class ViT(nn.Module):
    """A vision transformer for images of 224 x 224 pixels."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (224 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential()
        for _ in range(depth):
            self.blocks.append(Residual(nn.LayerNorm(width, 1e-6), SelfAttention(width, heads, batch_first=True)))
            self.blocks.append(Residual(nn.LayerNorm(width, 1e-6), *feed_forward(width, nn.GELU())))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


# Swin-T (Liu et al., arXiv:2103.14030) --------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Attention within windows of the image ``[N, S, S, C]``, with a bias by relative position.

    Args:
        width: channels C.
        heads: number of heads.
        size: height and width S of the image.
        window: those of a window.
        shift: by how much the windows are shifted.
    """

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        distance = place[:, None] - place[None] + window - 1
        self.distance: Tensor
        self.register_buffer("distance", distance[..., 0] * (2 * window - 1) + distance[..., 1])
        self.mask: Tensor | None
        self.register_buffer("mask", self.shifted_mask(size) if shift else None)

    def shifted_mask(self, size: int) -> Tensor:
        """Keeps apart what the shift brings together from two sides of the image, ``[windows, 1, T, T]``."""
        rows = torch.arange(size)
        part = (rows >= size - self.window).long() + (rows >= size - self.shift).long()
        parts = self.windows((3 * part[:, None] + part)[None, ..., None]).squeeze(-1)
        return -100.0 * (parts[:, None, :, None] != parts[:, None, None, :])

    def windows(self, x: Tensor) -> Tensor:
        """``[N, S, S, C]`` to ``[N * windows, T, C]``."""
        n, size, _, width = x.shape
        x = x.view(n, size // self.window, self.window, size // self.window, self.window, width)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, width)

    def image(self, x: Tensor, n: int, size: int) -> Tensor:
        """The inverse of :meth:`windows`."""
        x = x.view(n, size // self.window, size // self.window, self.window, self.window, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(n, size, size, -1)

    def forward(self, x: Tensor) -> Tensor:
        n, size, _, width = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = self.windows(x)
        count, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.distance.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)
        logits = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias
        if self.mask is not None:
            logits = (logits.view(n, -1, *logits.shape[1:]) + self.mask).view(logits.shape)
        x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width)
        x = self.image(self.projection(x), n, size)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class Merging(nn.Module):
    """Four neighbours become one, with twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """A Swin transformer for images of 224 x 224 pixels."""

    def __init__(
        self, width: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), heads: int = 3, window: int = 7
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(nn.LayerNorm(width))
        size = 56
        for stage, depth in enumerate(depths):
            if stage > 0:
                self.blocks.append(Merging(width))
                width, heads, size = 2 * width, 2 * heads, size // 2
            for number in range(depth):
                shift = window // 2 if number % 2 and size > window else 0
                attention = WindowAttention(width, heads, size, window, shift)
                self.blocks.append(Residual(nn.LayerNorm(width), attention))
                self.blocks.append(Residual(nn.LayerNorm(width), *feed_forward(width, nn.GELU())))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


# MLP-Mixer (Tolstikhin et al., arXiv:2105.01601) and gMLP (Liu et al., arXiv:2105.08050) -----------------------------


class OfTokens(nn.Module):
    """Applies modules along the tokens of ``[N, T, C]``, each channel by itself."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """A stack of blocks on the patches of an image of 224 x 224 pixels, then the mean of all."""

    def __init__(self, width: int, blocks: list[nn.Module], patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def mixer(width: int = 768, depth: int = 12, tokens: int = 196, inner: int = 384) -> nn.Module:
    """Mixer-B/16."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        of_tokens = OfTokens(nn.Linear(tokens, inner), nn.GELU(), nn.Linear(inner, tokens))
        blocks.append(Residual(nn.LayerNorm(width, 1e-6), of_tokens))
        blocks.append(Residual(nn.LayerNorm(width, 1e-6), *feed_forward(width, nn.GELU())))
    return Mixer(width, blocks)


class SpatialGate(nn.Module):
    """One half of the channels, times a linear map of the tokens of the other half."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width // 2, 1e-6)
        self.gate = OfTokens(nn.Linear(tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return first * self.gate(self.norm(second))


def gmlp(width: int = 256, depth: int = 30, tokens: int = 196) -> nn.Module:
    """gMLP-S/16."""
    inner = 6 * width
    blocks: list[nn.Module] = [
        Residual(
            nn.LayerNorm(width, 1e-6),
            nn.Linear(width, inner),
            nn.GELU(),
            SpatialGate(inner, tokens),
            nn.Linear(inner // 2, width),
        )
        for _ in range(depth)
    ]
    return Mixer(width, blocks)


# Halo attention (Vaswani et al., arXiv:2103.12731) --------------------------------------------------------------------


class HaloAttention(nn.Module):
    """Each block of pixels attends to itself and to a halo around it, with learned relative positions."""

    def __init__(self, width: int, heads: int = 4, block: int = 8, halo: int = 3) -> None:
        super().__init__()
        self.heads, self.channels, self.block, self.halo = heads, width // heads, block, halo
        self.window = block + 2 * halo
        self.q = nn.Conv2d(width, width, 1, bias=False)
        self.kv = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.rows, self.columns = (
            nn.Parameter(0.02 * torch.randn(2 * self.window - 1, self.channels)) for _ in range(2)
        )

    def relative(self, q: Tensor, table: Tensor) -> Tensor:
        """Products of queries ``[N, block, block, C]`` with a table, by key: ``[N, block, 1, block, window]``."""
        n, block, window = len(q), self.block, self.window
        x = (q.reshape(-1, self.channels) @ table.T).reshape(-1, block, 2 * window - 1)
        x = F.pad(F.pad(x, (0, 1)).flatten(1), (0, 2 * window - 1 - block))
        x = x.reshape(-1, block + 1, 2 * window - 1)[:, :block, window - 1 :]
        return x.reshape(n, block, 1, block, window)

    def forward(self, x: Tensor) -> Tensor:
        n, width, height, _ = x.shape
        side, block, window = height // self.block, self.block, self.window
        q = self.q(x).view(n * self.heads, self.channels, side, block, side, block)
        q = q.permute(0, 2, 4, 3, 5, 1).reshape(-1, block, block, self.channels)
        kv = F.pad(self.kv(x), 4 * (self.halo,)).unfold(2, window, block).unfold(3, window, block)
        kv = kv.reshape(n * self.heads, 2 * self.channels, side * side, window**2)
        k, v = kv.permute(0, 2, 3, 1).reshape(-1, window**2, 2 * self.channels).chunk(2, -1)
        of_columns = self.relative(q, self.columns).permute(0, 1, 3, 2, 4)
        of_rows = self.relative(q.transpose(1, 2), self.rows).permute(0, 3, 1, 4, 2)
        logits = q.reshape(-1, block**2, self.channels) @ k.transpose(1, 2) * self.channels**-0.5
        x = (logits + (of_rows + of_columns).reshape(logits.shape)).softmax(-1) @ v
        x = x.view(n, self.heads, side, side, block, block, self.channels)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(n, width, height, height)


def halonet(width: int = 64, depth: int = 3) -> nn.Module:
    """Residual blocks of halo attention on 64 x 64 pixels, as in the first stage of a HaloNet."""
    layers: list[nn.Module] = [*conv(3, width, 7, 2), nn.ReLU(), nn.AdaptiveMaxPool2d(64)]
    for _ in range(depth):
        body = [*conv(width, width, 1), nn.ReLU(), HaloAttention(width), nn.BatchNorm2d(width)]
        layers += [Residual(*body), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


# A residual network of many layers ------------------------------------------------------------------------------------


def residual(layers: int = 1000, width: int = 64) -> nn.Module:
    """Linear layers: one into the stream, two in each residual block, one out of it."""
    blocks = [Residual(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range((layers - 2) // 2)]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), *blocks, nn.Linear(width, width))


# GPT-2 small (Radford et al., 2019) -----------------------------------------------------------------------------------


class CausalAttention(nn.Module):
    """Attention to what came before, queries, keys and values from one layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(x.transpose(1, 2).flatten(2))


class GPT2(nn.Module):
    """A decoder with learned positions, whose last layer is the embedding."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, vocabulary: int = 50257, context: int = 1024
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            self.blocks.append(Residual(nn.LayerNorm(width), CausalAttention(width, heads)))
            self.blocks.append(Residual(nn.LayerNorm(width), *feed_forward(width, nn.GELU("tanh"))))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


# Llama, 7 billion parameters (Touvron et al., arXiv:2302.13971) -------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square norm, written out as Llama's code has it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: the halves of each head of ``[N, heads, T, C]`` are turned into one another."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates.repeat(2)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def llama(
    width: int = 4096, depth: int = 32, heads: int = 32, inner: int = 11008, vocabulary: int = 32000
) -> nn.Module:
    """A Llama decoder."""
    layers: list[nn.Module] = [nn.Embedding(vocabulary, width)]
    for _ in range(depth):
        layers.append(Residual(RMSNorm(width), RotaryAttention(width, heads)))
        layers.append(Residual(RMSNorm(width), SwiGLU(width, inner)))
    return nn.Sequential(*layers, RMSNorm(width), nn.Linear(width, vocabulary, bias=False))


# The list -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """An architecture with the input that it is traced with.

    Args:
        title: in the table.
        build: makes it.
        example: makes the input.
        target: seconds within which the project wants it traced, if it has a target.
        device: ``meta`` for weights without memory.
    """

    title: str
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    target: float | None
    device: str = "cpu"


def image() -> Tensor:
    """One image of 224 x 224 pixels."""
    return torch.randn(1, 3, 224, 224)


def tokens() -> Tensor:
    """One text of 16 tokens."""
    return torch.zeros(1, 16, dtype=torch.long)


ARCHITECTURES = {
    "resnet50": Architecture("ResNet-50", resnet50, image, 1.0),
    "vit-b16": Architecture("ViT-B/16", ViT, image, 1.0),
    "swin-t": Architecture("Swin-T", Swin, image, 2.0),
    "mixer-b16": Architecture("Mixer-B/16", mixer, image, 2.0),
    "gmlp-s16": Architecture("gMLP-S/16", gmlp, image, 2.0),
    "halonet": Architecture("halo attention, 3 blocks", halonet, image, 2.0),
    "residual-1000": Architecture("residual, 1000 layers", residual, lambda: torch.randn(1, 64), 10.0),
    "gpt2": Architecture("GPT-2", GPT2, tokens, None),
    "llama-7b": Architecture("Llama-7B, meta device", llama, tokens, 20.0, "meta"),
}
