"""Inputs and bricks of networks for sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.symmetry.zoo.case import Sample

# Inputs ---------------------------------------------------------------------------------------------------------------


def tokens(*shapes: tuple[int, ...], vocabulary: int = 5) -> Sample:
    """Draws one tensor of tokens for each shape."""
    return lambda generator, size: tuple(torch.randint(0, vocabulary, shape, generator=generator) for shape in shapes)


def numbers(*shapes: tuple[int, ...], scale: float = 0.3) -> Sample:
    """Draws normally distributed numbers that are small enough to leave a softmax soft."""
    return lambda generator, size: tuple(
        scale * size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def bert_inputs(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Padded tokens, segments, and a mask that hides the padding."""
    mask = (torch.arange(4) < torch.randint(2, 5, (4, 1), generator=generator)).long()
    return torch.randint(1, 5, (4, 4), generator=generator) * mask, torch.tensor([0, 0, 1, 1]).expand(4, 4), mask


def sentences(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor]:
    """Padded sentences and their lengths."""
    lengths = torch.randint(1, 5, (6,), generator=generator)
    return torch.randint(1, 6, (6, 4), generator=generator) * (torch.arange(4) < lengths[:, None]), lengths


def bags(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor]:
    """All words of all texts in a row, and where each text begins."""
    return torch.randint(0, 6, (12,), generator=generator), torch.tensor([0, 3, 5, 9])


# Bricks ---------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square norm as in Llama and T5: no mean, no bias."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class Residual(nn.Module):
    """What a function of the normed stream returns is added to the stream."""

    def __init__(self, dim: int, fn: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


def causal_mask(x: Tensor) -> Tensor:
    """What is added to the scores of the sequence in the second dimension."""
    length = x.shape[1]
    return torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
