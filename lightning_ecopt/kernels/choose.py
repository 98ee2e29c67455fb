"""See the functions below."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.eager import EagerKernels, Kernels

Implementation = Literal["auto", "wrapped", "eager", "compiled", "triton"]


#: Numbers of weights from which a compiled step is worth the time to compile it.
COMPILE_FROM = 1 << 20


def choose_kernels(implementation: Implementation, parameters: Sequence[Tensor], fused: bool = True) -> Kernels:
    """The way to run the passes over some parameters.

    Args:
        implementation:

            - ``"triton"`` needs a GPU, and launches as many kernels however deep the network is;
            - ``"compiled"`` goes through ``torch.compile``, which takes some seconds at the first steps;
            - ``"eager"`` runs operation by operation;
            - ``"wrapped"`` does so too, and leaves the step itself to the base optimizer, between passes that scale
              weights and gradients there and back: what all others must agree with, and what happens anyway with base
              optimizers that are not exactly SGD, Adam or AdamW;
            - ``"auto"`` takes Triton on a GPU, and on a CPU compiles if there are a million weights and a compiler.
        parameters: of the network.
        fused: whether the base optimizer is one of those whose steps are fused.

    Raises:
        ValueError: if Triton is asked for and the parameters are not on a GPU.
        ModuleNotFoundError: if it is not installed.
    """
    if implementation == "auto":
        implementation = "eager"
        kinds = {parameter.device.type for parameter in parameters}
        if kinds == {"cuda"} and importlib.util.find_spec("triton") is not None:
            implementation = "triton"
        elif (
            kinds == {"cpu"} and sum(parameter.numel() for parameter in parameters) >= COMPILE_FROM and _has_compiler()
        ):
            implementation = "compiled"
    if implementation == "triton":
        on = {parameter.device.type for parameter in parameters}
        if on != {"cuda"} and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"implementation='triton' needs a GPU, and the parameters are on {', '.join(sorted(on))}: use 'auto'."
            )
        from lightning_ecopt.kernels.triton import TritonKernels

        return TritonKernels()
    return CompiledKernels(affine=not fused) if implementation == "compiled" else EagerKernels()


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
