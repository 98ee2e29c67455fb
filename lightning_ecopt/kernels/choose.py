"""Which kernels run the passes over given parameters."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_ecopt.common.tensors import PIECE_SIZES
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.foreach import ForeachKernels
from lightning_ecopt.kernels.passes import Kernels

Implementation = Literal["auto", "wrapped", "eager", "compiled", "triton"]


#: Number of weights from which a compiled step is worth the time to compile it.
COMPILE_FROM = 1 << 20


def choose_kernels(implementation: Implementation, parameters: Sequence[Tensor], fused: bool = True) -> Kernels:
    """Choose how the passes of a step over weights, gradients and state are run.

    Args:
        implementation:

            - ``"triton"`` needs a GPU, and launches as many kernels however deep the network is;
            - ``"compiled"`` goes through ``torch.compile``, which takes some seconds at the first steps;
            - ``"eager"`` runs operation by operation; in small networks each operation works on all weights;
            - ``"wrapped"`` runs operation by operation, too, but leaves the step itself to the base optimizer, between
              passes that scale weights and gradients there and back. All others must agree with it. Base optimizers
              that are not exactly SGD, Adam or AdamW always step in this way;
            - ``"auto"`` takes Triton on a GPU, and on a CPU compiles if there are a million weights and a compiler.
        parameters: of the network.
        fused: whether the base is SGD, Adam or AdamW, whose whole step is one pass.

    Raises:
        ValueError: if Triton is asked for and the parameters are not on a GPU.
        ModuleNotFoundError: if Triton is asked for and is not installed.

    Example::

        kernels = choose_kernels("auto", list(model.parameters()))
    """
    devices = {parameter.device.type for parameter in parameters}
    if implementation == "auto":
        implementation = _best(parameters, devices)
    if implementation == "triton":
        if devices != {"cuda"} and os.environ.get("TRITON_INTERPRET") != "1":
            given = ", ".join(sorted(devices))
            raise ValueError(f"implementation='triton' needs a GPU, and the parameters are on {given}: use 'auto'.")
        from lightning_ecopt.kernels.triton_plan import TritonKernels

        return TritonKernels()
    if implementation == "compiled":
        # A fused step makes few affine passes, at refreshes; a wrapped one makes some at every step.
        return CompiledKernels(affine=not fused)
    return ForeachKernels() if _is_one_piece(parameters) else EagerKernels()


def _is_one_piece(parameters: Sequence[Tensor]) -> bool:
    """Whether all weights together are no more than a piece, so that memory of their size does not matter."""
    sizes = PIECE_SIZES["step"]
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters) <= (sizes.cpu if on_cpu else sizes.accelerator)


def _best(parameters: Sequence[Tensor], devices: set[str]) -> Implementation:
    if devices == {"cuda"} and importlib.util.find_spec("triton") is not None:
        return "triton"
    count = sum(parameter.numel() for parameter in parameters)
    return "compiled" if devices == {"cpu"} and count >= COMPILE_FROM and _has_compiler() else "eager"


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
