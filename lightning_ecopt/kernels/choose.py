"""Which kernels run the passes over given parameters."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from lightning_ecopt.common.tensors import PIECE_SIZES
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.foreach import ForeachKernels
from lightning_ecopt.kernels.passes import Kernels

Implementation = Literal["auto", "wrapped", "eager", "compiled", "triton"]


#: Number of weights from which a compiled step is faster by more than noise.
COMPILE_FROM = 1 << 20
#: Number of steps times weights from which it is worth the time to compile it: 32,000 steps of a million weights, twice
#: what half a minute comes to.
COMPILE_PAYS = 1 << 35


def check_implementation(implementation: Implementation, parameters: Iterable[Tensor]) -> None:
    """Check that the passes over some parameters can be run in a way.

    Raises:
        ValueError: if Triton is asked for and the parameters are not on a GPU.
        ModuleNotFoundError: if Triton is asked for and is not installed.
    """
    if implementation == "triton":
        devices = {parameter.device.type for parameter in parameters}
        if devices != {"cuda"} and os.environ.get("TRITON_INTERPRET") != "1":
            given = ", ".join(sorted(devices))
            raise ValueError(f"implementation='triton' needs a GPU, and the parameters are on {given}: use 'auto'.")
        importlib.import_module("triton")


def choose_kernels(
    implementation: Implementation, parameters: Sequence[Tensor], fused: bool = True, steps: float | None = None
) -> Kernels:
    """Choose how the passes of a step over weights, gradients and state are run.

    Args:
        implementation:

            - ``"triton"`` needs a GPU, and launches as many kernels however deep the network is;
            - ``"compiled"`` goes through ``torch.compile``, which takes some seconds at the first steps;
            - ``"eager"`` runs operation by operation; in small networks each operation works on all weights;
            - ``"wrapped"`` runs operation by operation, too, but leaves the step itself to the base optimizer, between
              passes that scale weights and gradients there and back. All others must agree with it. Base optimizers
              that are not exactly SGD, Adam or AdamW always step in this way;
            - ``"auto"`` takes Triton on a GPU. On a CPU it compiles if the steps that are to come are known and pay for
              it, from a million weights on, and if there is a compiler. Otherwise it is ``"eager"``.
        parameters: of the network.
        fused: whether the base is SGD, Adam or AdamW, whose whole step is one pass.
        steps: number of steps of all training; ``None`` if it is not known.

    Raises:
        ValueError: if Triton is asked for and the parameters are not on a GPU.
        ModuleNotFoundError: if Triton is asked for and is not installed.

    Example::

        kernels = choose_kernels("auto", list(model.parameters()), steps=20_000)
    """
    check_implementation(implementation, parameters)
    if implementation == "auto":
        implementation = _best(parameters, steps)
    if implementation == "triton":
        from lightning_ecopt.kernels.triton_plan import TritonKernels

        return TritonKernels()
    if implementation == "compiled":
        # A fused step makes few affine passes, at refreshes; a wrapped one makes some at every step.
        return CompiledKernels(affine=not fused)
    is_small = _is_one_piece(parameters) and len({parameter.dtype for parameter in parameters}) == 1
    return ForeachKernels() if is_small else EagerKernels()


def _is_one_piece(parameters: Sequence[Tensor]) -> bool:
    """Whether all weights together are no more than a piece, so that memory of their size does not matter."""
    sizes = PIECE_SIZES["step"]
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters) <= (sizes.cpu if on_cpu else sizes.accelerator)


def _best(parameters: Sequence[Tensor], steps: float | None) -> Implementation:
    devices = {parameter.device.type for parameter in parameters}
    if devices == {"cuda"} and importlib.util.find_spec("triton") is not None:
        return "triton"
    count = sum(parameter.numel() for parameter in parameters)
    pays = count >= COMPILE_FROM and steps is not None and steps * count >= COMPILE_PAYS
    return "compiled" if devices == {"cpu"} and pays and _has_compiler() else "eager"


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
