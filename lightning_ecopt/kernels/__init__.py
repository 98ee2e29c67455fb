"""The passes over weights, gradients and state that a step consists of, and the ways to run them.

Kernels know tensors and vectors, and neither modules nor optimizers. :mod:`~lightning_ecopt.kernels.passes` says what
each pass computes. Triton is imported when :func:`choose_kernels` takes it, and the passes in C are compiled then.
"""

from __future__ import annotations

from lightning_ecopt.kernels.choose import Implementation, check_implementation, choose_kernels
from lightning_ecopt.kernels.eager import EagerKernels
from lightning_ecopt.kernels.passes import Coefficient, Elements, Kernels, Shapes, Views

__all__ = [
    "Coefficient",
    "EagerKernels",
    "Elements",
    "Implementation",
    "Kernels",
    "Shapes",
    "Views",
    "check_implementation",
    "choose_kernels",
]
