"""Two small decoders, and how their layers are split over the ranks of a mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

WORDS, WIDTH, HEADS, LENGTH = 12, 16, 4, 6


def rotated(x: Tensor) -> Tensor:
    """Rotary embeddings of ``[batch, heads, time, features]``."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


class Attention(nn.Module):
    """Knows the width of a head; how many of them a rank has only if somebody sets ``heads``."""

    def __init__(self, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)  # a bias would have no gradient but rounding
        self.rotary, self.heads = rotary, -1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            of(x).view(*x.shape[:2], self.heads, WIDTH // HEADS).transpose(1, 2) for of in (self.q, self.k, self.v)
        )
        if self.rotary:
            q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, rotary: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if rotary else nn.LayerNorm
        self.before, self.attention = norm(WIDTH), Attention(bias=not rotary, rotary=rotary)
        self.between, self.mlp = norm(WIDTH), Gated() if rotary else Plain()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Decoder(nn.Module):
    """With rotary embeddings, RMS norms and gated layers; or with learned positions, layer norms and GELU."""

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = None if rotary else nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(rotary) for _ in range(2)])
        self.norm = nn.RMSNorm(WIDTH) if rotary else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.words(x)
        if self.places is not None:
            stream = stream + self.places(torch.arange(LENGTH).expand(x.shape))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def plan(net: Decoder, sequence: bool, by_width: bool, losses: bool) -> dict[str, Any]:
    """How ``parallelize_module`` splits a decoder.

    Args:
        net: the decoder.
        sequence: whether the residual stream is split along the sequence, so that norms are sequence parallel.
        by_width: whether embeddings are split by features rather than by words.
        losses: whether the logits stay split over the words, for ``loss_parallel``.
    """
    stream: Any = Shard(1) if sequence else Replicate()
    style = ColwiseParallel if by_width else RowwiseParallel
    found: dict[str, Any] = {
        "words": style(input_layouts=Replicate(), output_layouts=stream),
        "places": style(input_layouts=Replicate(), output_layouts=stream),
        "head": ColwiseParallel(
            input_layouts=stream, output_layouts=Shard(-1) if losses else Replicate(), use_local_output=not losses
        ),
    }
    for number in range(2):
        own = {
            "attention": PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate()),
            "attention.o": RowwiseParallel(output_layouts=stream),
            "mlp": PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate()),
            "mlp.down": RowwiseParallel(output_layouts=stream),
            **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
            **{f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")},
            **({"before": SequenceParallel(), "between": SequenceParallel()} if sequence else {}),
        }
        found |= {f"blocks.{number}.{name}": of for name, of in own.items()}
    found |= {"norm": SequenceParallel()} if sequence else {}
    own = dict(net.named_modules())
    return {name: of for name, of in found.items() if name in own}


def split_(net: Decoder, mesh: DeviceMesh, sequence: bool = True, by_width: bool = False, losses: bool = False) -> None:
    """Split a decoder over a mesh with the dimensions ``data_parallel`` and ``tensor_parallel``."""
    if mesh["tensor_parallel"].size() > 1:
        parallelize_module(net, mesh["tensor_parallel"], plan(net, sequence, by_width, losses))
    if mesh["data_parallel"].size() > 1:
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh["data_parallel"])
