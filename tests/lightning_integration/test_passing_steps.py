"""Training that passes by the optimizers of the callback is noticed within an epoch, and nothing else is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_ecopt import ec_sgd
from tests.lightning_integration.modules import Batch, Classifier, batches, fit, loader, quiet
from tests.optim.test_passing import TwoPhases
from tests.selection import few


class Manual(Classifier):
    """Manual optimization, in which ``move`` trains."""

    def __init__(self, kind: str, base: Any = SGD) -> None:
        super().__init__()
        self.automatic_optimization, self.kind, self.base = False, kind, base

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.backwards(batch)
        if self.kind == "own":
            self.own.step()
        elif self.kind == "another":
            self.other.step()
        elif self.kind == "by hand":
            with torch.no_grad():
                for p in self.parameters():
                    p.data.sub_(p.grad, alpha=0.05)
        elif self.kind == "own phases":
            self.phases(self.own, batch)
        elif self.kind == "phases":
            self.phases(optimizer, batch)
        elif self.kind == "ours":
            optimizer.step()
        elif self.kind == "constrained":  # while gradients accumulate
            for p in self.parameters():
                p.data.clamp_(-0.05, 0.05)

    def phases(self, optimizer: Any, batch: Batch) -> None:
        optimizer.first_step()
        optimizer.zero_grad()
        self.backwards(batch)
        optimizer.second_step()

    def backwards(self, batch: Batch) -> None:
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        self.own = self.base(self.parameters(), lr=0.05)
        self.other = SGD(self.parameters(), lr=0.05)
        return self.own


def said(module: Any, *callbacks: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, *callbacks, **options)
    return [str(each.message) for each in found if "plain" in str(each.message)]


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("own", SGD),
        ("own", AdamW),
        ("another", SGD),
        ("by hand", SGD),
        ("own phases", TwoPhases),
        ("phases", TwoPhases),
    ],
)
def test_training_without_a_step_of_ours_is_told_once_within_the_first_epoch(kind: str, base: Any) -> None:
    (message,) = said(Manual(kind, base), quiet(), data=loader(3), max_epochs=1)
    assert base.__name__ in message
    assert "step" in message
    assert len(said(Manual(kind, base), quiet(), data=loader(2), max_epochs=3)) == 1


@pytest.mark.parametrize("kind", ["own", "phases"])
def test_one_batch_in_an_epoch_is_enough(kind: str) -> None:
    assert len(said(Manual(kind, TwoPhases), quiet(), data=loader(1), max_epochs=1)) == 1


def test_an_optimizer_without_the_callback_tells_of_steps_of_its_base() -> None:
    class Module(Manual):
        def configure_optimizers(self) -> Any:
            ours = ec_sgd(self, lr=0.05)
            self.own = ours.optimizer
            return ours

    assert len(said(Module("own"), data=loader(2), max_epochs=1)) == 1


class Rarely(Classifier):
    """A training step that sometimes has no loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return None


class Infinite(Classifier):
    """Gradients that are not finite, as at the start of mixed precision; the step is left out."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure()


class Every(Manual):
    """A pair of optimizers, of which the second one steps in the last batch, with weights of both."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.backwards(batch)
        first.step()
        if batch_idx == 7:
            second.step()
        first.zero_grad()

    def configure_optimizers(self) -> Any:
        return [SGD(self.net.parameters(), lr=0.05), SGD(self.net[-1].parameters(), lr=0.05)]


@pytest.mark.parametrize(
    ("module", "options"),
    few(
        [
            (Classifier, {}),
            (Classifier, {"accumulate_grad_batches": 100}),
            (Classifier, {"fast_dev_run": True}),
            (Classifier, {"limit_train_batches": 0}),
            (Rarely, {}),
            (Infinite, {}),
            (lambda: Every("both"), {}),
            (lambda: Manual("ours"), {}),
            (lambda: Manual("nothing"), {}),
            (lambda: Manual("constrained"), {}),
        ],
        10,
    ),
)
def test_no_false_word(module: Any, options: dict[str, Any]) -> None:
    assert not said(module(), quiet(), data=loader(3), **{"max_epochs": 2, **options})


def test_after_a_fit_the_optimizer_is_free() -> None:
    module = Manual("ours")
    fit(module, quiet(), data=loader(2), max_epochs=1)
    F.cross_entropy(module.net(batches(1)[0][0]), batches(1)[0][1]).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.own.step()
