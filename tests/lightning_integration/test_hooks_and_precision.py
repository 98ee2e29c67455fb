"""Hooks run around steps as ever, and precision plugins give what a plain loop gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer
from tests.lightning_integration.modules import (
    EXAMPLE,
    SETTINGS,
    Batch,
    Classifier,
    batches,
    fit,
    mlp,
    quiet,
    same,
    same_state,
    sgd,
    weights,
    wrapped,
)
from tests.lightning_integration.pipelines import OPTIMIZERS, STEPS, plainly

# Hooks ----------------------------------------------------------------------------------------------------------------


class Hooks(Classifier):
    """Overrides how a step is taken and how gradients are cleared."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.trainer.global_step)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


@SETTINGS
def test_a_module_may_take_its_steps_and_clear_its_gradients_itself(example: Tensor | None, rule: str) -> None:
    ours = Hooks(mlp(), example=example)
    fit(ours, quiet(rule=rule))
    assert same(weights(ours), plainly(rule, rates=[[0.1 / (1 + step)] for step in range(8)]))
    assert all(p.grad is not None for p in ours.parameters())


class EverySecond(Classifier):
    """Takes every second step only."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            assert optimizer_closure is not None
            optimizer_closure()


@SETTINGS
def test_a_module_may_leave_steps_out(example: Tensor | None, rule: str) -> None:
    ours = EverySecond(mlp(), example=example)
    fit(ours, quiet(rule=rule))
    assert same(weights(ours), plainly(rule, data=batches()[1::2]))


class SeesGradients(Classifier):
    """Compares what the hook before a step sees with gradients of its own computation."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        x, y = batches()[self.trainer.global_step % 4]
        expected = torch.autograd.grad(F.cross_entropy(self.net(x), y), list(self.net.parameters()))
        found = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert same(found, expected)
        self.seen = [gradient.clone() for gradient in found]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Nor are they others after the step; but where weights have moved to their representative, they have as well.
        if batch_idx > 0:
            assert same([p.grad for p in self.net.parameters()], self.seen)
        self.steps = batch_idx + 1


@SETTINGS
def test_hooks_see_the_gradients_of_the_loss(example: Tensor | None, rule: str) -> None:
    ours = SeesGradients(mlp(), example=example)
    fit(ours, quiet(rule=rule))
    assert ours.steps == 4
    assert same(weights(ours), plainly(rule))


class BringsTheCallback(Classifier):
    def configure_callbacks(self) -> Callback:
        return quiet(rule="path")


def test_a_module_may_bring_the_callback_itself() -> None:
    ours = BringsTheCallback(mlp())
    run = fit(ours)
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert same(weights(ours), plainly("path"))
    # Lightning lets that of the module replace the Trainer's.
    fit(both := BringsTheCallback(mlp()), quiet(rule="unit"))
    assert same(weights(both), weights(ours))


class GivesMuch(Classifier):
    """Returns a dictionary, and nothing at all for every third batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx % 3 == 0:
            return None
        output = self(batch[0])
        return {"loss": F.cross_entropy(output, batch[1]), "output": output.detach(), "index": batch_idx}


class Unmoved(Callback):
    """Whether batches left the weights as they were."""

    def __init__(self) -> None:
        self.batches: list[bool] = []
        self.before: Any = None

    def now(self, trainer: Trainer, module: LightningModule) -> Any:
        return deepcopy(module.state_dict())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.before = self.now(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches.append(same_state(self.before, self.now(trainer, pl_module)))


@SETTINGS
def test_a_training_step_may_return_a_dictionary_or_nothing(example: Tensor | None, rule: str) -> None:
    ours, net, callback, unmoved = (
        GivesMuch(mlp(), example=example),
        mlp(),
        quiet(rule=rule, refresh_interval=None),
        Unmoved(),
    )
    fit(ours, callback, unmoved)
    # Nothing is rescaled before a training step was watched, even if the network is known from the start.
    assert unmoved.batches == [True, False, False, True] * 2
    optimizer = wrapped(net, sgd(net), rule=rule)
    for number, (x, y) in enumerate(batches() * 2):
        optimizer.zero_grad()
        if number % 4 % 3:
            F.cross_entropy(net(x), y).backward()
        if number > 0:
            optimizer.step()
    assert same(weights(ours), weights(net))
    assert callback.group is not None
    assert callback.group.num_units == 32


# Precision ------------------------------------------------------------------------------------------------------------


DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@SETTINGS
@pytest.mark.parametrize("precision", [*DTYPES, "bf16-mixed"])
def test_every_precision_takes_the_steps_of_a_plain_loop(precision: Any, example: Tensor | None, rule: str) -> None:
    ours, callback = Classifier(mlp(), example=example), quiet(rule=rule)
    fit(ours, callback, precision=precision)
    dtype = DTYPES.get(precision, torch.float32)
    net = mlp().to(dtype)
    optimizer = wrapped(net, sgd(net), EXAMPLE.to(dtype), rule=rule)
    for epoch in range(2):
        if epoch:
            optimizer.refresh()
        for x, y in batches(dtype=dtype):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
    assert callback.group is not None
    assert callback.group.num_units == 32
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in ours.parameters())
    assert same(weights(ours), weights(net))
    assert not same(weights(ours), [p.to(dtype) for p in weights(mlp())])


class Overflows(Classifier):
    """The gradients of some steps are not finite."""

    def __init__(self, at: set[int], configure: Any = None, example: Tensor | None = None) -> None:
        super().__init__(mlp(), configure, example)
        self.at, self.number = at, 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.number += 1
        return loss * math.inf if self.number - 1 in self.at else loss


class Unchanged(Unmoved):
    """Whether batches changed nothing: weights, moments, or what the optimizer counts."""

    def now(self, trainer: Trainer, module: LightningModule) -> Any:
        return deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()))


@pytest.mark.parametrize(("base", "rule"), [("sgd", "unit"), ("adamw", "path")])
@pytest.mark.parametrize(
    ("at", "example"),
    [(set(), None), ({0, 1}, None), ({0, 1}, EXAMPLE), ({2}, None), ({4, 5}, EXAMPLE)],
    ids=["none", "first steps", "first steps, example", "later", "at a refresh, example"],
)
def test_a_step_that_a_loss_scaler_skips_changes_nothing(
    at: set[int], example: Tensor | None, base: str, rule: str
) -> None:
    ours, unchanged = Overflows(at, OPTIMIZERS[base], example), Unchanged()
    scaling = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(ours, quiet(rule=rule), unchanged, plugins=scaling, max_epochs=3)
    assert unchanged.batches == [step in at for step in range(STEPS)]
    assert scaling.scaler is not None
    assert scaling.scaler.get_scale() == 1024.0 / 2 ** len(at)

    # As if there had been no such batches.
    net, scaler, step = mlp(), torch.amp.GradScaler("cpu", init_scale=1024.0), 0
    scaler.scale(torch.ones(1))  # so that it knows its device
    optimizer = wrapped(net, OPTIMIZERS[base](net), rule=rule)
    for epoch in range(3):
        if epoch:
            optimizer.refresh()
        for x, y in batches():
            if step in at:
                scaler.update(scaler.get_scale() / 2)
            else:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16, cache_enabled=False):
                    loss = F.cross_entropy(net(x), y)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            step += 1
    assert same(weights(ours), weights(net))
