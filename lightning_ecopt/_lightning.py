"""Lightning goes by two names; here it is decided which one is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
else:

    def _namespace() -> str:
        """``lightning.pytorch``, unless only ``pytorch_lightning`` is installed or imported."""
        split_only = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
        try:
            found = importlib.util.find_spec("lightning") is not None
        except (ImportError, ValueError):  # hidden by an import hook, or a stand-in without a specification
            found = False
        return "lightning.pytorch" if found and not split_only else "pytorch_lightning"

    _name = _namespace()
    _package = importlib.import_module(_name)
    Callback, LightningModule, Trainer = _package.Callback, _package.LightningModule, _package.Trainer
    MisconfigurationException = importlib.import_module(f"{_name}.utilities.exceptions").MisconfigurationException
    _rank_zero = importlib.import_module(f"{_name}.utilities.rank_zero")
    rank_zero_info, rank_zero_only = _rank_zero.rank_zero_info, _rank_zero.rank_zero_only

__all__ = [
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "rank_zero_info",
    "rank_zero_only",
]
