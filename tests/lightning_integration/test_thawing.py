"""Callbacks that thaw frozen parameters work beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.beside import CASES
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    Rates,
    batches,
    digits,
    fit,
    is_clean,
    loader,
    quiet,
    same,
    sgd,
    train_plainly,
    trainer,
    weights,
    wrapped,
)
from tests.selection import few


class Transfer(Classifier):
    """A backbone of two layers, and a head of one or two."""

    def __init__(
        self, form: str, rule: str = "unit", example: Tensor | None = None, deep: bool = True, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        head = [nn.Linear(16, 16), nn.ReLU()] if deep else []
        backbone = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        super().__init__(nn.Sequential(backbone, nn.Sequential(*head, nn.Linear(16, 10))), example=example)
        self.form, self.rule = form, rule

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.form == "ec_sgd":
            return ec_sgd(self, trainable, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        if self.form == "ECSGD":
            return ECSGD(trainable, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        return SGD(trainable, lr=0.1, momentum=0.9)

    def callbacks(self) -> list[Callback]:
        return [quiet(rule=self.rule, refresh_interval=None)] if self.form == "callback" else []


class ThawsBackbone(BaseFinetuning):
    """Trains the backbone from some epoch on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Freedoms(Callback):
    """Takes down how many freedoms are used at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        known = isinstance(optimizer, EquivalentClassOptimizer) and optimizer.group is not None
        self.epochs.append(int(optimizer.usable_units().sum()) if known else 0)


def _thawed_by_hand(rule: str, deep: bool, at: int, epochs: int) -> list[Tensor]:
    """A new optimizer around the old one's state, when all of the network is to be trained."""
    net = Transfer("none", deep=deep).net
    base = SGD(net[1].parameters(), lr=0.1, momentum=0.9)
    net[0].requires_grad_(False)
    optimizer: Any = base
    if at > 0:
        group = scaling_group(net, EXAMPLE)
        if group.num_units:
            optimizer = EquivalentClassOptimizer(base, group, rule=rule, refresh_interval=None)
        train_plainly(net, optimizer, batches(), epochs=at, refresh_each_epoch=False)
    net[0].requires_grad_(True)
    later = SGD(net[1].parameters(), lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    later.load_state_dict({name: state[name] for name in ("state", "param_groups")})
    later.add_param_group({"params": list(net[0].parameters()), "lr": 0.05})
    whole = wrapped(net, later, rule=rule)
    train_plainly(net, whole, batches(), epochs=epochs - at, refresh_each_epoch=False)
    return weights(net)


@CASES
@pytest.mark.parametrize(("deep", "at"), [(True, 0), (True, 1), (False, 1)], ids=str)
@pytest.mark.filterwarnings("ignore:The network has no scaling freedoms")
def test_the_freedoms_of_a_backbone_are_found_when_it_thaws(
    deep: bool, at: int, form: str, example: Tensor | None, rule: str
) -> None:
    ours, freedoms = Transfer(form, rule, example, deep), Freedoms()
    run = fit(ours, *ours.callbacks(), ThawsBackbone(at), freedoms, max_epochs=3)
    frozen, whole = (16, 48) if deep else (0, 32)
    assert freedoms.epochs == [frozen] * at + [whole] * (3 - at)
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert run.optimizers[0].group is not None
    assert run.optimizers[0].group.num_units == whole
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.05]
    expected = _thawed_by_hand(rule, deep, at, 3)
    if form == "ECSGD":  # knows parameters in the order of the optimizer, and adds up in that
        torch.testing.assert_close(weights(ours), expected, rtol=1e-4, atol=1e-6)
    else:
        assert same(weights(ours), expected)
    assert is_clean(ours)


@EXAMPLES
def test_the_group_of_the_callback_follows_what_thaws(example: Tensor | None) -> None:
    ours, callback = Transfer("callback", example=example), quiet()
    thaw = BackboneFinetuning(1, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.02, initial_denom_lr=1.0)
    rates = Rates()
    fit(ours, thaw, callback, rates, max_epochs=3)
    assert rates.steps == [[0.1]] * 4 + [[0.1, 0.02]] * 4 + [[0.1, pytest.approx(0.03)]] * 4
    assert callback.group is not None
    assert callback.group.num_units == 48
    before = ours(digits()[0])
    callback.group.act_(torch.linspace(-1, 1, 48))
    torch.testing.assert_close(ours(digits()[0]), before, rtol=1e-4, atol=1e-4)


class ThawsInPlace(Transfer):
    """Its optimizer has all parameters from the start; the backbone is frozen in the first epoch."""

    def configure_optimizers(self) -> Any:
        self.backbone.requires_grad_(False)
        if self.form == "ec_sgd":
            return ec_sgd(self, self.parameters(), lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        return sgd(self)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)


@SETTINGS
def test_the_freedoms_of_parameters_that_thaw_in_place_are_found_at_the_refresh(
    example: Tensor | None, rule: str
) -> None:
    ours, callback, freedoms = ThawsInPlace("callback", rule, example), quiet(rule=rule), Freedoms()
    start = weights(ours.backbone)
    fit(ours, callback, freedoms, max_epochs=3)
    assert freedoms.epochs == [16, 48, 48]
    assert not same(weights(ours.backbone), start)
    assert callback.group is not None
    assert callback.group.num_units == 48


@RULES
def test_two_members_of_a_class_stay_alike_when_their_backbone_thaws(rule: str) -> None:
    images = digits()[0].double()

    def run(log_scale: Tensor, form: str) -> Tensor:
        module = Transfer(form, rule, EXAMPLE).double()
        scaling_group(module, images[:2], parameters=module.net[1].parameters()).act_(log_scale)
        fit(module, ThawsBackbone(1), *module.callbacks(), precision="64-true", max_epochs=4)
        return module.net(images).detach()

    torch.manual_seed(2)
    rescaled = torch.randn(16)
    torch.testing.assert_close(run(rescaled, "callback"), run(torch.zeros(16), "callback"), rtol=0, atol=1e-8)
    assert (run(rescaled, "plain") - run(torch.zeros(16), "plain")).abs().max() > 1e-2


class ByStep(Transfer):
    """Takes its batch by the number of the step, so that it may be resumed anywhere."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return super().training_step(batches(8)[self.trainer.global_step % 8], batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning leaves this to the user: its callback gives back parameter groups, but freezes them once more.
        self.thawed = len(checkpoint["optimizer_states"][0]["param_groups"]) > 1

    def on_fit_start(self) -> None:
        if getattr(self, "thawed", False):
            self.backbone.requires_grad_(True)


@CASES
@pytest.mark.parametrize("first", few([True, False], [True]), ids=["before", "behind"])
def test_a_run_that_thaws_is_resumed_bit_identical(
    tmp_path: Path, first: bool, form: str, example: Tensor | None, rule: str
) -> None:
    def run(*others: Callback, **options: Any) -> Transfer:
        module = ByStep(form, rule, example)
        thaw, own = [ThawsBackbone(1)], module.callbacks()
        fitting = trainer(
            *(thaw + own if first else own + thaw), *others, max_epochs=3, enable_checkpointing=bool(others)
        )
        fitting.fit(module, loader(), **options)
        return module

    expected = run(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    for epoch in (0, 1):
        assert same(weights(run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")), weights(expected))
