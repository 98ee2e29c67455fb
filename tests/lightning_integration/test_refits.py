"""Fits that follow each other, what is left when one ends, and what the callback says of optimizers."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import (
    ECSGD,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    ScalingGroup,
    ec_sgd,
    scaling_group,
)
from lightning_ecopt.symmetry.report import Overview
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    fit,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    trainer,
    weights,
)
from tests.selection import few


class Keeps(Classifier):
    """Makes its optimizer once, for all fits."""

    def __init__(self, make: Any = sgd, example: Tensor | None = None) -> None:
        super().__init__(example=example)
        self.kept = make(self.net)

    def configure_optimizers(self) -> Any:
        return self.kept


KEPT: dict[str, Any] = {
    "SGD": sgd,
    "ECSGD": lambda net: ECSGD(net.parameters(), lr=0.1, momentum=0.9),
    "ECSGD, paths": lambda net: ECSGD(net.parameters(), lr=0.1, momentum=0.9, rule="path"),
    "a group": lambda net: EquivalentClassOptimizer(sgd(net), scaling_group(net, EXAMPLE)),
}


@pytest.mark.parametrize("make", few(list(KEPT), ["SGD", "ECSGD, paths"]))
@EXAMPLES
def test_an_optimizer_that_the_module_keeps_is_fitted_again_and_again(make: str, example: Tensor | None) -> None:
    module = Keeps(KEPT[make], example)
    losses = []
    for callbacks in ([quiet()], [quiet()], [], [quiet(rule="path")]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, *callbacks, max_epochs=1)
        images, labels = next(iter(loader(1, 128)))
        losses.append(float(F.cross_entropy(module(images), labels)))
        assert is_clean(module)
    assert losses == sorted(losses, reverse=True)


@SETTINGS
def test_the_base_is_a_plain_optimizer_again_when_the_fit_has_ended(example: Tensor | None, rule: str) -> None:
    module = Keeps(example=example)
    run = fit(module, quiet(rule=rule))
    ours = run.optimizers[0]
    states = ours.state_dict()["state"]
    for number, p in enumerate(module.net.parameters()):
        assert torch.equal(module.kept.state[p]["momentum_buffer"], states[number]["momentum_buffer"])
    assert ours.statistics() is not None


@SETTINGS
def test_a_checkpoint_saved_after_the_fit_goes_on_bit_identical(
    tmp_path: Path, example: Tensor | None, rule: str
) -> None:
    def run(epochs: int, path: Path | None = None) -> tuple[Classifier, Trainer]:
        module = Classifier(example=example)
        fitting = trainer(quiet(rule=rule, refresh_interval=3), max_epochs=epochs)
        fitting.fit(module, loader(), ckpt_path=path)
        return module, fitting

    run(2)[1].save_checkpoint(tmp_path / "after.ckpt")
    assert same(weights(run(4, tmp_path / "after.ckpt")[0]), weights(run(4)[0]))


class Stops(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("stop")


@pytest.mark.parametrize("stops", [False, True])
def test_the_callbacks_of_a_trainer_keep_their_order(stops: bool, tmp_path: Path) -> None:
    own = quiet()
    callbacks = [Callback(), own, ModelCheckpoint(tmp_path), *([Stops()] if stops else [])]
    run = trainer(*callbacks, enable_checkpointing=True, max_epochs=1)
    before = list(run.callbacks)
    if stops:
        with pytest.raises(RuntimeError, match="stop"):
            run.fit(Classifier(), loader())
    else:
        run.fit(Classifier(), loader())
    assert run.callbacks == before


@SETTINGS
def test_a_replaced_submodule_is_trained_by_the_next_fit(example: Tensor | None, rule: str) -> None:
    module, callback = Classifier(example=example), quiet(rule=rule)
    fit(module, callback)
    module.net = mlp(seed=5, width=9)
    before = weights(module)
    fit(module, callback)
    assert not same(weights(module), before)
    assert callback.group is not None
    assert callback.group.num_units == 18
    assert callback.group.parameters["net.0.weight"] is module.net[0].weight


# What is said ---------------------------------------------------------------------------------------------------------


def test_options_that_an_optimizer_has_of_its_own_are_named() -> None:
    module = Classifier(mlp(), lambda m: ECSGD(m.parameters(), lr=0.1, rule="path"))
    callback = quiet(rule="path", max_path_ratio=4.0, refresh_interval=7)
    with pytest.warns(UserWarning, match=r"refresh_interval, max_path_ratio not used.*returns an ECSGD"):
        fit(module, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EquivalentClassOptimization")
        callback = EquivalentClassOptimization(verbose=False)
        fit(Classifier(mlp(), lambda m: ECSGD(m.parameters(), lr=0.1, rule="path")), callback)


def test_the_report_describes_the_rule_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_paths = []
    overview = ScalingGroup.overview

    def spy(group: ScalingGroup, usable: Any, needs: bool, followers: Any) -> Overview:
        needs_paths.append(needs)
        return overview(group, usable, needs, followers)

    monkeypatch.setattr(ScalingGroup, "overview", spy)
    for rule in ("path", "unit"):
        make = partial(ECSGD, lr=0.1, rule=rule)
        fit(Classifier(mlp(), lambda m, make=make: make(m.parameters())), EquivalentClassOptimization())
    assert needs_paths == [True, False]


class Manual(LightningModule):
    """Manual optimization of two parts, with a loss weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.encoder, self.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 10)
        self.temperature = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        output = self.head(self.encoder(batch[0])) * self.temperature.exp()
        self.manual_backward(F.cross_entropy(output, batch[1]))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return sgd(self)


def test_names_are_those_of_the_module_under_manual_optimization_too() -> None:
    module, callback = Manual(), quiet()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No traced call")
        fit(module, callback)
    assert callback.group is not None
    assert not callback.group.unseen
    assert set(callback.group.parameters) == {name for name, _ in module.named_parameters()}
    places = {operation.module.partition(",")[0] for operation in callback.group.costs}
    assert places <= {"", "training_step", "encoder", "encoder.0", "head"}
    assert module.temperature != 0


# One name for the interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["epoch", 3, None])
@RULES
def test_the_old_name_of_the_refresh_interval_means_the_same(value: Any, rule: str) -> None:
    old, new = Classifier(mlp()), Classifier(mlp())
    with pytest.warns(FutureWarning, match="refresh is called refresh_interval now"):
        callback = quiet(rule=rule, refresh=value)
    fit(old, callback)
    fit(new, quiet(rule=rule, refresh_interval=value))
    assert same(weights(old), weights(new))


@SETTINGS
@pytest.mark.parametrize("value", ["epoch", 3, None])
def test_the_interval_means_the_same_for_every_way_in(value: Any, example: Tensor | None, rule: str) -> None:
    def configure(module: Classifier) -> Any:
        return ec_sgd(module, lr=0.1, momentum=0.9, rule=rule, refresh_interval=value)

    ours, reference = Classifier(mlp(), configure, example), Classifier(mlp(), example=example)
    fit(ours)
    fit(reference, quiet(rule=rule, refresh_interval=value))
    assert same(weights(ours), weights(reference))


@SETTINGS
@pytest.mark.parametrize(("first", "then"), [("epoch", 5), (None, 2), (500, "epoch")])
def test_a_resumed_run_may_have_another_interval(
    tmp_path: Path, first: Any, then: Any, example: Tensor | None, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(quiet(rule=rule, refresh_interval=first), save, max_epochs=2, enable_checkpointing=True)
    run.fit(Classifier(example=example), loader())
    steps: list[int] = []
    balance_ = ScalingGroup.balance_

    def spy(group: ScalingGroup, *args: Any) -> Tensor:
        steps.append(resumed.global_step)
        return balance_(group, *args)

    monkeypatch.setattr(ScalingGroup, "balance_", spy)
    resumed = trainer(quiet(rule=rule, refresh_interval=then), max_epochs=4)
    resumed.fit(Classifier(example=example), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    expected = {5: [9, 14], 2: [8, 10, 12, 14], "epoch": [8, 12]}[then]
    assert steps == expected
