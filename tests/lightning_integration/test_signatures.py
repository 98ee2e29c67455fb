"""Lightning reads the signature of ``training_step``; what waits for its first call must not change it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_ecopt import ECSGD, EquivalentClassOptimization, ec_sgd
from tests.lightning_integration.modules import Batch, Classifier, fit, is_clean, mlp, quiet, same, sgd, weights


class Plain(Classifier):
    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class BatchOnly(Plain):
    def training_step(self, batch: Batch) -> Tensor:
        return self.loss(batch)


class Iterating(Plain):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class OtherNames(Plain):
    def training_step(self, images_and_labels: Batch, number: int) -> Tensor:
        assert isinstance(number, int)
        return self.loss(images_and_labels)


class Defaults(Plain):
    def training_step(self, batch: Batch, batch_idx: int = -1, *, scale: float = 1.0) -> Tensor:
        assert batch_idx >= 0
        return scale * self.loss(batch)


class Anything(Plain):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(args[0])


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Decorated(Plain):
    @logged
    def training_step(self, batch: Batch) -> Tensor:
        return self.loss(batch)


class DecoratedIterating(Plain):
    @logged
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


MODULES = [BatchOnly, Iterating, OtherNames, Defaults, Anything, Decorated, DecoratedIterating]
WAYS: dict[str, tuple[Callable[[LightningModule], Optimizer], list[EquivalentClassOptimization]]] = {
    "callback": (sgd, [quiet(refresh_interval=None)]),
    "ec_sgd": (lambda module: ec_sgd(module, lr=0.1, momentum=0.9, refresh_interval=None), []),
    "ECSGD": (
        lambda module: ECSGD(module.parameters(), lr=0.1, momentum=0.9, refresh_interval=None),
        [quiet(refresh_interval=None)],
    ),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("way", WAYS)
def test_every_signature_trains_alike(kind: type[Plain], way: str) -> None:
    configure, callbacks = WAYS[way]
    runs = [module(mlp(), configure) for module in (Classifier, kind)]
    for module in runs:
        torch.manual_seed(0)
        fit(module, *callbacks)
        assert is_clean(module)
    assert same(*(weights(module) for module in runs))
    assert not same(weights(runs[0].net), weights(mlp()))
