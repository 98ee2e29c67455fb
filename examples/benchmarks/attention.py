"""Transformers of the accuracy benchmark: decoders of text and a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv:2104.09864): ``[..., T, D]``, pairs of features turned by their position.

    Pair k of token t is turned by the angle ``t * 10000 ** (-2 k / D)``.
    """
    tokens, features = x.shape[-2:]
    frequency = torch.arange(0, features, 2, device=x.device) * (-math.log(10000) / features)
    angle = torch.arange(tokens, device=x.device)[:, None] * frequency.exp()
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with one matrix each for queries, keys, values and outputs."""

    def __init__(self, width: int, heads: int, bias: bool, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, heads, T, D]
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` for SwiGLU (Shazeer, arXiv:2002.05202).

    SwiGLU has two thirds of the hidden features, so that both have about as many weights.
    """

    def __init__(self, width: int, kind: str, bias: bool) -> None:
        super().__init__()
        hidden = 8 * width // 3 // 8 * 8 if kind == "swiglu" else 4 * width
        self.kind = kind
        self.gate = nn.Linear(width, hidden, bias=bias) if kind == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)) if self.kind == "gelu" else F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, norm: str, feed_forward: str, causal: bool, rotary: bool) -> None:
        super().__init__()
        bias = norm == "layer"
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.attention = Attention(width, heads, bias, causal, rotary)
        self.feed_forward = FeedForward(width, feed_forward, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Decoder(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, outputs]``; see :func:`decoder`."""

    def __init__(self, outputs: int, width: int, blocks: list[Block], norm: str, context: int | None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(outputs, width)
        self.positions = None if context is None else nn.Embedding(context, width)
        self.blocks = nn.Sequential(*blocks)
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class VisionTransformer(nn.Module):
    """Images ``[B, C, S, S]`` to logits ``[B, outputs]``, by the mean over patches; see :func:`vit`."""

    def __init__(self, channels: int, outputs: int, width: int, blocks: list[Block], patch: int, patches: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, width))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def decoder(
    width: int,
    depth: int,
    heads: int,
    context: int,
    norm: str = "layer",
    feed_forward: str = "gelu",
    positions: str = "learned",
    init: str = "default",
    outputs: int = 65,
) -> nn.Module:
    """A decoder-only transformer with norms in front; with LayerNorm its layers have biases, with RMSNorm none.

    Args:
        width: features of a token.
        depth: number of blocks.
        heads: attention heads in a block.
        context: tokens in a window.
        norm: ``layer`` or ``rms``.
        feed_forward: ``gelu``, ``swiglu`` or ``relu2`` (the square of ReLU).
        positions: ``learned``, or ``rotary`` (in queries and keys).
        init: ``default`` (torch's; embeddings N(0, 1)), or ``gpt2`` (all matrices N(0, 0.02^2), zero biases).
        outputs: size of the vocabulary.

    Raises:
        ValueError: for another name.
    """
    known = {
        "norm": (norm, tuple(NORMS)),
        "feed_forward": (feed_forward, ("gelu", "swiglu", "relu2")),
        "positions": (positions, ("learned", "rotary")),
        "init": (init, ("default", "gpt2")),
    }
    _check(known)
    rotary = positions == "rotary"
    blocks = [Block(width, heads, norm, feed_forward, causal=True, rotary=rotary) for _ in range(depth)]
    net = Decoder(outputs, width, blocks, norm, None if rotary else context)
    if init == "gpt2":
        _gpt2_(net)
    return net


def vit(
    channels: int,
    size: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    init: str = "default",
    outputs: int = 10,
) -> nn.Module:
    """A vision transformer (Dosovitskiy et al., arXiv:2010.11929): LayerNorm, GELU, mean over patches, no class token.

    Args:
        channels: of the images.
        size: width and height of the images, in pixels.
        patch: width and height of a patch, in pixels.
        width: features of a patch.
        depth: number of blocks.
        heads: attention heads in a block.
        init: ``default`` (torch's) or ``gpt2`` (all matrices N(0, 0.02^2), zero biases).
        outputs: number of classes.

    Raises:
        ValueError: for another name, or a size that is no multiple of ``patch``.
    """
    _check({"init": (init, ("default", "gpt2"))})
    if size % patch:
        raise ValueError(f"size must be a multiple of patch, got {size} and {patch}")
    blocks = [Block(width, heads, "layer", "gelu", causal=False, rotary=False) for _ in range(depth)]
    net = VisionTransformer(channels, outputs, width, blocks, patch, (size // patch) ** 2)
    if init == "gpt2":
        _gpt2_(net)
    return net


def _check(known: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for option, (value, names) in known.items():
        if value not in names:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, names))}, got {value!r}")


def _gpt2_(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
