"""What to watch of a network besides its loss: numbers that tell how far scales are off, or that ignore them.

All are torchmetrics metrics of models rather than of predictions: what is given to ``update`` is a model or its scaling
group. The metric is the mean over all updates, such as those of several steps or epochs, but for
:class:`InvarianceViolation`, which is the largest. Nothing that is given changes.

- :class:`PathNorm` depends on the equivalent class alone.
- :class:`UnitImbalance` is one at the balanced member of the class, and grows with the distance from it.
- :class:`EquivalentClassDistance` compares two models and ignores how their units are scaled.
- :class:`InvarianceViolation` says whether a loss changes when units are rescaled.

They are imported when they are asked for: torchmetrics takes longer to import than the rest of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ecopt.common.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_ecopt.metrics.path_norm import PathNorm
    from lightning_ecopt.metrics.units import EquivalentClassDistance, UnitImbalance
    from lightning_ecopt.metrics.violation import InvarianceViolation

__all__ = ["EquivalentClassDistance", "InvarianceViolation", "PathNorm", "UnitImbalance"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "EquivalentClassDistance": "units",
        "InvarianceViolation": "violation",
        "PathNorm": "path_norm",
        "UnitImbalance": "units",
    },
)
