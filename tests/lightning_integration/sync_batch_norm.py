"""torch has the kernels of SyncBatchNorm for GPUs only; these let it run on the CPU, operation by operation alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def _rows(x: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[C, n]``."""
    return x.transpose(0, 1).flatten(1)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_rows(x), dim=1, correction=0)
    return mean, (variance + eps).rsqrt()


def gather_stats(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    count, share = counts.sum(), (counts / counts.sum())[:, None]
    whole = (share * mean).sum(0)
    variance = (share * (invstd**-2 - eps + (mean - whole) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(whole, momentum)
        running_var.lerp_(variance * count / (count - 1), momentum)
    return whole, (variance + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    result = (x - _along_channels(mean, x)) * _along_channels(invstd, x)
    result = result if weight is None else result * _along_channels(weight, x)
    return result if bias is None else result + _along_channels(bias, x)


def backward_reduce(
    gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _rows(gradient).sum(1)
    along = (_rows(gradient) * (_rows(x) - mean[:, None])).sum(1)
    return total, along, along * invstd, total.clone()


def backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    total: Tensor,
    along: Tensor,
    count: Tensor,
) -> Tensor:
    along = along * invstd**2 / count.sum()
    result = gradient - _along_channels(total / count.sum(), x)
    result = (result - (x - _along_channels(mean, x)) * _along_channels(along, x)) * _along_channels(invstd, x)
    return result if weight is None else result * _along_channels(weight, x)


KERNELS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


@contextmanager
def on_cpu() -> Iterator[None]:
    """While entered, SyncBatchNorm takes tensors on the CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel)
    try:
        # One of the devices that it allows is that of a backend of the user's own; DDP allows none but GPUs.
        with (
            patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"),
            patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None),
        ):
            yield
    finally:
        library._destroy()
