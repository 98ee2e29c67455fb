"""Other callbacks of Lightning beside this one do what they do beside a plain optimizer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_ecopt import ECSGD, EquivalentClassOptimization, ec_adamw, ec_sgd
from tests.lightning_integration.beside import CASES
from tests.lightning_integration.modules import (
    EXAMPLES,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    batches,
    digits,
    fit,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    train_plainly,
    trainer,
    weights,
    wrapped,
)
from tests.selection import few

FORMS = pytest.mark.parametrize("form", ["callback", "ec_sgd"])

# Checkpoints, and the end of training ---------------------------------------------------------------------------------


class Losses(Classifier):
    """Logs its loss over an epoch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=True, prog_bar=True)
        return loss


def _epochs(rule: str, count: int, **options: Any) -> list[list[Tensor]]:
    """Weights of a plain loop after each epoch."""
    net, found = mlp(), []
    base = sgd(net, **options)
    train_plainly(net, wrapped(net, base, rule=rule), batches(), count, after_epoch=lambda: found.append(weights(net)))
    return found


@RULES
def test_early_stopping_stops_at_the_epoch_of_its_metric(rule: str) -> None:
    ours = Losses(mlp())
    run = fit(ours, quiet(rule=rule), EarlyStopping("loss_epoch", min_delta=1.5, patience=2), max_epochs=20)
    assert run.current_epoch == 3
    assert same(weights(ours), _epochs(rule, 3)[-1])


@SETTINGS
def test_the_best_checkpoints_are_kept_and_may_hold_weights_alone(
    tmp_path: Path, example: Tensor | None, rule: str
) -> None:
    saving = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="loss_epoch", save_top_k=2, save_weights_only=True, save_on_train_epoch_end=True
    )
    ours = Losses(mlp(), lambda m: sgd(m, lr=0.05), example)
    fit(ours, quiet(rule=rule), saving, max_epochs=4, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2.ckpt", "epoch=3.ckpt"]
    assert Path(saving.best_model_path).name == "epoch=3.ckpt"
    expected = _epochs(rule, 4, lr=0.05)
    for epoch in (2, 3):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert "optimizer_states" not in state
        again = Losses(mlp(seed=9))
        again.load_state_dict(state["state_dict"])
        assert same(weights(again), expected[epoch])
    # It can be evaluated without the callback, and trained further with it.
    trainer().validate(Scored(mlp(seed=9)), loader(), ckpt_path=saving.best_model_path, verbose=False)
    fit(again, quiet(rule=rule))
    assert not same(weights(again), expected[3])


class Scored(Classifier):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("validation loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])


class Fails(Classifier):
    """Takes its batch by the number of the step, and raises at one of them."""

    def __init__(self, at: int | None, example: Tensor | None, configure: Any = None, seed: int = 0) -> None:
        super().__init__(mlp(seed), configure, example)
        self.at = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.at:
            raise ArithmeticError("the user's own")
        return super().training_step(batches(8)[self.trainer.global_step % 8], batch_idx)


@CASES
@pytest.mark.parametrize("at", few([0, 3, 4], [3]), ids=["at once", "within an epoch", "at a refresh"])
def test_the_checkpoint_of_an_exception_is_resumed_bit_identical(
    tmp_path: Path, at: int, form: str, example: Tensor | None, rule: str
) -> None:
    def configure(module: LightningModule) -> Optimizer:
        if form == "ec_sgd":
            return ec_sgd(module, lr=0.1, momentum=0.9, rule=rule, refresh_interval=4)
        if form == "ECSGD":
            return ECSGD(module.parameters(), lr=0.1, momentum=0.9, rule=rule, refresh_interval=4)
        return sgd(module)

    def run(module: Fails, **options: Any) -> Fails:
        saving = [OnExceptionCheckpoint(tmp_path)] if module.at is not None else []
        own = [quiet(rule=rule)] if form == "callback" else []
        fitting = trainer(*saving, *own, max_epochs=-1, max_steps=10, enable_checkpointing=bool(saving))
        fitting.fit(module, loader(), **options)
        return module

    expected = run(Fails(None, example, configure))
    with pytest.raises(ArithmeticError, match="the user's own"):
        run(Fails(at, example, configure))
    resumed = run(Fails(None, example, configure, seed=9), ckpt_path=tmp_path / "on_exception.ckpt")
    assert same(weights(resumed), weights(expected))


# What is shown and logged ---------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def _cycled(optimizer: Optimizer) -> dict[str, Any]:
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@FORMS
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_learning_rate_monitor_logs_rates_momenta_and_decay(tmp_path: Path, kind: str, form: str) -> None:
    def plain(module: LightningModule) -> Optimizer:
        return AdamW(module.parameters()) if kind == "adamw" else sgd(module, weight_decay=0.1)

    def ours(module: LightningModule) -> Optimizer:
        return ec_adamw(module) if kind == "adamw" else ec_sgd(module, momentum=0.9, weight_decay=0.1)

    def logged(folder: Path, base: Callable[[LightningModule], Optimizer], *callbacks: Callback) -> Any:
        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        module = Classifier(mlp(), lambda m: _cycled(base(m)))
        fit(module, monitor, *callbacks, logger=CSVLogger(folder), log_every_n_steps=1)
        rows = _rows(folder)
        columns = {name: [row[name] for row in rows if row[name]] for name in rows[0] if name.startswith("lr-")}
        assert all(len(values) == 8 for values in columns.values())
        found: dict[str, list[Any]] = {"momentum": [], "weight_decay": [], "rate": []}
        for name, values in columns.items():
            found[name.rpartition("-")[2] if name.count("-") > 1 else "rate"].append(values)
        return columns, found

    names, expected = logged(tmp_path / "plain", plain)
    assert len(names) == 3
    assert len(set(expected["rate"][0])) > 4
    assert len(set(expected["momentum"][0])) > 4
    if form == "callback":
        assert logged(tmp_path / "ours", plain, quiet())[0] == names
    else:
        # Lightning logs once more what the base optimizer holds.
        for quantity, columns in logged(tmp_path / "ours", ours)[1].items():
            assert columns
            assert all(values == expected[quantity][0] for values in columns)


def test_the_device_is_monitored_as_ever(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="Lightning monitors processors with psutil")
    ours = Classifier(mlp())
    fit(ours, quiet(), DeviceStatsMonitor(cpu_stats=True), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert any("cpu_percent" in name for name in _rows(tmp_path)[-1])
    assert same(weights(ours), _epochs("unit", 2)[-1])


@EXAMPLES
@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_metrics_and_the_report(
    capsys: pytest.CaptureFixture[str], kind: type[Callback], example: Tensor | None
) -> None:
    ours = Losses(mlp(), example=example)
    others = kind(), RichModelSummary(), Timer()
    callback = EquivalentClassOptimization(refresh_interval="epoch")
    run = fit(ours, *others, callback, enable_progress_bar=True, enable_model_summary=True)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "loss_step" in said
    assert "loss_epoch" in said
    assert said.count("16 + 16 freedoms in 3 layers") == 1
    assert set(run.progress_bar_metrics) == {"loss_step", "loss_epoch"}
    assert same(weights(ours), _epochs("unit", 2)[-1])


# Several runs ---------------------------------------------------------------------------------------------------------


def _images() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    return Classifier(nn.Sequential(*layers))


@RULES
def test_one_callback_serves_fits_of_different_modules_with_evaluations_between(rule: str) -> None:
    callback, first, second = quiet(rule=rule), Scored(mlp()), _images()
    fit(first, callback)
    middle = weights(first)
    run = trainer(callback)
    (scores,) = run.validate(first, loader(), verbose=False)
    (others,) = run.test(first, loader(), verbose=False)
    predictions = torch.cat(run.predict(first, loader()))
    assert scores == others
    assert torch.equal(predictions, first(digits()[0][:128]))
    assert same(weights(first), middle)
    fit(second, callback)
    assert callback.group is not None
    assert callback.group.num_units == 4
    fit(first, callback)
    assert callback.group.num_units == 32

    net = mlp()
    for _ in range(2):
        train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(first), weights(net))
    reference = _images()
    fit(reference, quiet(rule=rule))
    assert same(weights(second), weights(reference))
    assert is_clean(first)
    assert is_clean(second)


@RULES
def test_a_module_that_was_trained_can_be_copied_and_trained_on(rule: str) -> None:
    first = Classifier(mlp(), lambda m: ec_sgd(m, lr=0.1, momentum=0.9, rule=rule))
    fit(first)
    second = deepcopy(first)
    fit(first)
    fit(second)
    assert same(weights(first), weights(second))
    net = mlp()
    for _ in range(2):
        optimizer = wrapped(net, sgd(net), rule=rule)
        train_plainly(net, optimizer, batches(), refresh_each_epoch=False)
    assert same(weights(first), weights(net))
