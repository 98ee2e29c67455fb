"""Modules that the tests of the callback share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR

from tests.lightning_integration.modules import EXAMPLE, Batch, Classifier, sgd


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def _two_schedulers(base: SGD) -> Any:
    return [base], [StepLR(base, 1, 0.5), {"scheduler": ExponentialLR(base, 0.9), "interval": "step"}]


def with_scheduler(base: SGD, scheduler: Any, **config: Any) -> dict[str, Any]:
    return {"optimizer": base, "lr_scheduler": {"scheduler": scheduler, **config}}


FORMS = {
    "optimizer": lambda base: base,
    "list": lambda base: [base],
    "tuple": lambda base: (base,),
    "two lists": lambda base: ([base], [CosineAnnealingLR(base, 3)]),
    "two lists with config dictionary": _two_schedulers,
    "dictionary": lambda base: {"optimizer": base},
    "dictionary with scheduler": lambda base: {"optimizer": base, "lr_scheduler": StepLR(base, 1, 0.5)},
    "dictionary with step interval": lambda base: with_scheduler(base, ExponentialLR(base, 0.8), interval="step"),
    "dictionary with frequency": lambda base: with_scheduler(base, StepLR(base, 1, 0.5), interval="step", frequency=3),
    "plateau": lambda base: {
        "optimizer": base,
        "lr_scheduler": ReduceLROnPlateau(base, factor=0.5, patience=0),
        "monitor": "level",
    },
    "plateau config": lambda base: with_scheduler(
        base, ReduceLROnPlateau(base, factor=0.5, patience=0), monitor="level", interval="epoch"
    ),
    "tuple of dictionaries": lambda base: (with_scheduler(base, StepLR(base, 1, 0.5)),),
}


class Level(Classifier):
    """Logs a number that does not depend on the weights, for schedulers that watch one."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.log("level", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class TwoOptimizers(Classifier):
    """Manual optimization: the halves of a deeper network have an optimizer each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(12, 10)), example=EXAMPLE)
        self.automatic_optimization = False

    def bases(self) -> tuple[SGD, SGD]:
        return sgd(self.net[:4]), sgd(self.net[4:], lr=0.05)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers() or []:
                scheduler.step()

    def configure_optimizers(self) -> Any:
        return self.bases()
