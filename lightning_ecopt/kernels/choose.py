"""Which kernels run the passes over given parameters."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from lightning_ecopt.common.warn import warn
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.library import compiler, load
from lightning_ecopt.kernels.passes import Kernels

Implementation = Literal["auto", "wrapped", "eager", "compiled", "triton"]

#: The device that an implementation needs.
DEVICES = {"triton": "cuda", "compiled": "cpu"}
CANNOT_COMPILE = (
    "The passes of the step could not be compiled and run operation by operation, which is slower: {error}. "
    "implementation='eager' stops this warning."
)


def check_implementation(implementation: Implementation, parameters: Iterable[Tensor]) -> None:
    """Check that the passes over some parameters can be run in a way.

    Raises:
        ValueError: if Triton is asked for and the parameters are not on a GPU; if ``"compiled"`` is, and they are not
            on a CPU, or there is no C compiler that works.
        ModuleNotFoundError: if Triton is asked for and is not installed.
    """
    needed = DEVICES.get(implementation)
    devices = {parameter.device.type for parameter in parameters}
    if needed is None or (implementation == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return
    if devices != {needed}:
        where, given = {"cuda": "a GPU", "cpu": "a CPU"}[needed], ", ".join(sorted(devices))
        raise ValueError(
            f"implementation={implementation!r} needs {where}, and the parameters are on {given}: use 'auto'."
        )
    if implementation == "triton":
        importlib.import_module("triton")
    else:
        try:
            load()
        except OSError as error:
            raise ValueError(f"implementation='compiled' needs a C compiler: {error}. Or use 'auto'.") from error


def choose_kernels(implementation: Implementation, parameters: Sequence[Tensor]) -> Kernels:
    """Choose how the passes of a step over weights, gradients and state are run.

    Args:
        implementation:

            - ``"triton"`` needs a GPU, and launches as many kernels however deep the network is;
            - ``"compiled"`` needs a CPU and a C compiler (gcc or clang), and makes as many calls however deep the
              network is. The first process ever compiles for one or two seconds;
            - ``"eager"`` runs operation by operation, on all devices;
            - ``"wrapped"`` runs operation by operation, too, but leaves the step itself to the base optimizer, between
              passes that scale weights and gradients there and back. All others must agree with it. Base optimizers
              that are not exactly SGD, Adam or AdamW always step in this way;
            - ``"auto"`` takes Triton on a GPU, what is compiled on a CPU, and ``"eager"`` elsewhere, or where there is
              no Triton or no compiler.
        parameters: of the network.

    Raises:
        ValueError: if the parameters are not where the implementation runs, or there is no compiler that works.
        ModuleNotFoundError: if Triton is asked for and is not installed.

    Example::

        kernels = choose_kernels("auto", list(model.parameters()))
    """
    check_implementation(implementation, parameters)
    if implementation == "auto":
        implementation = _best(parameters)
    if implementation == "triton":
        from lightning_ecopt.kernels.triton_plan import TritonKernels

        return TritonKernels()
    return CompiledKernels() if implementation == "compiled" else EagerKernels()


def _best(parameters: Sequence[Tensor]) -> Implementation:
    devices = {parameter.device.type for parameter in parameters}
    if devices == {"cuda"} and importlib.util.find_spec("triton") is not None:
        return "triton"
    if devices == {"cpu"}:
        try:
            load()
        except OSError as error:
            if compiler() is not None:
                warn(CANNOT_COMPILE.format(error=error))
        else:
            return "compiled"
    return "eager"
