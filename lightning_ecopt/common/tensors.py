"""See the functions below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def listing(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def widest(device: torch.device) -> torch.dtype:
    """The most exact floating point type that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


#: Elements that are looked at together: on a CPU few enough for its caches, elsewhere enough to be worth the calls.
CPU_PIECE, PIECE = 2**17, 2**22


def rows_at_a_time(weight: Tensor, width: int) -> int:
    """How many rows of ``width`` elements make up a piece."""
    return max(1, (CPU_PIECE if weight.device.type == "cpu" else PIECE) // max(width, 1))


Tensors = Mapping[str, Tensor]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on another device, without waiting for it."""
    from_host = values.device.type == "cpu" and device.type == "cuda"
    return values.pin_memory().to(device, non_blocking=True) if from_host else values.to(device)


def updates_by_difference(tensor: Tensor) -> bool:
    """Whether steps are taken as differences, so that to scale a weight there and back does not round it.

    In sixteen bits a rounding is 0.2 per cent of a weight, and would add up over the steps.
    """
    return torch.finfo(tensor.dtype).bits < 32


def region_of(tensor: Tensor, region: tuple[slice, ...]) -> Tensor:
    """A view of a box-shaped region; a scalar counts as a vector of one element."""
    return tensor.view(1)[region] if tensor.ndim == 0 else tensor[region]
