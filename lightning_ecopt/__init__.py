"""Optimisation in the equivalent-class space of a network, as a PyTorch Lightning callback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ecopt.callback import EquivalentClassOptimization
    from lightning_ecopt.configure import ec_adamw, ec_sgd
    from lightning_ecopt.metrics import EquivalentClassDistance, PathNorm, UnitImbalance
    from lightning_ecopt.optim import ECSGD, ECAdamW, EquivalentClassOptimizer
    from lightning_ecopt.symmetry import ScalingGroup, scaling_group

__version__ = "0.1.0.dev0"

# Names are imported when they are asked for: whoever trains with plain PyTorch need not import Lightning.
_MODULES = {
    "ECAdamW": "optim",
    "ECSGD": "optim",
    "EquivalentClassDistance": "metrics",
    "EquivalentClassOptimization": "callback",
    "EquivalentClassOptimizer": "optim",
    "PathNorm": "metrics",
    "ScalingGroup": "symmetry",
    "UnitImbalance": "metrics",
    "ec_adamw": "configure",
    "ec_sgd": "configure",
    "scaling_group": "symmetry",
}

__all__ = [
    "ECSGD",
    "ECAdamW",
    "EquivalentClassDistance",
    "EquivalentClassOptimization",
    "EquivalentClassOptimizer",
    "PathNorm",
    "ScalingGroup",
    "UnitImbalance",
    "ec_adamw",
    "ec_sgd",
    "scaling_group",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found  # next time without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
