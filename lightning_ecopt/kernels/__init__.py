"""The passes over weights, gradients and state that a step consists of, and the ways to run them."""

from __future__ import annotations

from lightning_ecopt.kernels.choose import Implementation, choose_kernels
from lightning_ecopt.kernels.eager import Coefficient, EagerKernels, Kernels, Shapes, Views

__all__ = ["Coefficient", "EagerKernels", "Implementation", "Kernels", "Shapes", "Views", "choose_kernels"]
