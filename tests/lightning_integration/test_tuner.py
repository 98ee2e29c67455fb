"""Lightning's search for the learning rate and the batch size works beside this callback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd
from tests.lightning_integration.beside import CASES
from tests.lightning_integration.modules import (
    EXAMPLE,
    Batch,
    Classifier,
    batches,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    trainer,
    weights,
    wrapped,
)
from tests.selection import few, full


class Tuned(Classifier):
    """Has what tuners look for: a learning rate, a batch size, and loaders that follow it."""

    def __init__(self, form: str, rule: str = "unit", example: Tensor | None = None, lr: float = 0.07) -> None:
        super().__init__(mlp(), example=example)
        self.form, self.rule = form, rule
        self.lr, self.batch_size = lr, 32

    def configure_optimizers(self) -> Any:
        if self.form == "ec_sgd":
            return ec_sgd(self, lr=self.lr, momentum=0.9, rule=self.rule, refresh_interval=None)
        if self.form == "ECSGD":
            return ECSGD(self.parameters(), lr=self.lr, momentum=0.9, rule=self.rule, refresh_interval=None)
        return sgd(self, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(128 // self.batch_size, self.batch_size)

    def callbacks(self) -> list[Callback]:
        return [quiet(rule=self.rule, refresh_interval=None)] if self.form == "callback" else []


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Tuners write checkpoints to where they are run.
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


RANGE: dict[str, Any] = {"min_lr": 1e-3, "max_lr": 0.5, "early_stop_threshold": None}


def _smoothed(losses: Sequence[float]) -> list[float]:
    """As Lightning smooths the losses of a range test."""
    average, found = 0.0, []
    for step, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss
        found.append(average / (1 - 0.98 ** (step + 2)))
    return found


@CASES
@pytest.mark.usefixtures("in_a_folder")
def test_the_learning_rate_finder_tries_rates_with_the_optimizer_that_trains(
    form: str, example: Tensor | None, rule: str
) -> None:
    ours = Tuned(form, rule, example)
    run = trainer(*ours.callbacks(), max_epochs=4)
    found = Tuner(run).lr_find(ours, **RANGE, num_training=16)
    assert found is not None
    assert len(set(found.results["lr"])) > 12
    net, losses = mlp(), []
    optimizer = wrapped(net, sgd(net), rule=rule)
    for rate, (x, y) in zip(found.results["lr"], batches() * 4, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.results["loss"] == pytest.approx(_smoothed(losses), rel=1e-12)
    # Weights are as they were, the rate is that of the suggestion.
    assert same(weights(ours), weights(mlp()))
    assert is_clean(ours)
    assert ours.lr == found.suggestion()
    assert math.isfinite(ours.lr)


def _with_found_rate(ours: Tuned, finder: str) -> Trainer:
    if finder == "tuner":
        run = trainer(*ours.callbacks(), max_epochs=4)
        Tuner(run).lr_find(ours, **RANGE, num_training=16)
    else:
        run = trainer(LearningRateFinder(**RANGE, num_training_steps=16), *ours.callbacks(), max_epochs=4)
    run.fit(ours)
    assert ours.lr != 0.07
    return run


def _rate(run: Trainer) -> float:
    (group,) = run.optimizers[0].param_groups
    return group["lr"]


@CASES
@pytest.mark.parametrize("finder", few(["tuner", "callback"], ["callback"]))
@pytest.mark.usefixtures("in_a_folder")
def test_training_after_the_learning_rate_finder_is_that_of_a_run_with_its_rate(
    finder: str, form: str, example: Tensor | None, rule: str
) -> None:
    ours, plain = Tuned(form, rule, example), Tuned("plain")
    run = _with_found_rate(ours, finder)
    # Some versions of Lightning forget the rate that their callback has found, and train with the one from before.
    assert (_rate(run) == ours.lr) == (_rate(_with_found_rate(plain, finder)) == plain.lr)
    reference = Tuned(form, rule, example, lr=_rate(run))
    other = trainer(*reference.callbacks(), max_epochs=4)
    other.fit(reference)
    assert run.global_step == other.global_step == 16
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert int(run.optimizers[0].usable_units().sum()) == 32
    assert same(weights(ours), weights(reference))
    assert not same(weights(ours), weights(mlp()))
    assert is_clean(ours)


class Limited(Tuned):
    """Has memory for 16 images at a time; what fails leaves half a forward call behind."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if len(batch[0]) > 16:
            raise RuntimeError("CUDA out of memory.")
        return loss


@full
@pytest.mark.parametrize(("form", "example", "rule"), [("callback", None, "unit"), ("ec_sgd", EXAMPLE, "path")])
@pytest.mark.parametrize(("finder", "start"), [("tuner", 32), ("callback", 16)])
@pytest.mark.usefixtures("in_a_folder")
def test_training_after_the_batch_size_finder_is_that_of_a_run_with_its_size(
    finder: str, start: int, form: str, example: Tensor | None, rule: str
) -> None:
    ours = Limited(form, rule, example)
    options: dict[str, Any] = {"init_val": start, "max_trials": 2, "steps_per_trial": 1}
    if finder == "tuner":
        run = trainer(*ours.callbacks())
        assert Tuner(run).scale_batch_size(ours, **options) == ours.batch_size
    else:
        run = trainer(BatchSizeFinder(**options), *ours.callbacks())
    assert is_clean(ours)
    run.fit(ours)
    reference = Limited(form, rule, example)
    reference.batch_size = ours.batch_size
    other = trainer(*reference.callbacks())
    other.fit(reference)
    assert ours.batch_size in (8, 16)
    assert run.global_step == other.global_step == 256 // ours.batch_size
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert int(run.optimizers[0].usable_units().sum()) == 32
    assert same(weights(ours), weights(reference))
    assert is_clean(ours)
