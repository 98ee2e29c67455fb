"""Accumulated and clipped gradients and schedulers give what a plain loop gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_ecopt import EquivalentClassOptimization, ec_sgd
from lightning_ecopt.optim.bases import momentum_to_step
from tests.lightning_integration.modules import (
    EXAMPLES,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    Rates,
    batches,
    fit,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    train_plainly,
    weights,
    wrapped,
)
from tests.lightning_integration.pipelines import OPTIMIZERS, STEPS, plainly
from tests.selection import few

# Gradient accumulation and clipping -----------------------------------------------------------------------------------


def accumulate(
    optimizer: Any, net: nn.Module, data: Sequence[Batch], windows: Sequence[int], refresh: bool = True
) -> None:
    """Train for as many epochs as there are windows, with the gradients of so many batches in each step."""
    for epoch, window in enumerate(windows):
        if epoch > 0 and refresh:
            optimizer.refresh()
        for start in range(0, len(data), window):
            optimizer.zero_grad()
            for x, y in data[start : start + window]:
                (F.cross_entropy(net(x), y) / window).backward()
            optimizer.step()


@SETTINGS
def test_the_last_window_of_accumulated_gradients_may_be_incomplete(example: Tensor | None, rule: str) -> None:
    ours, net = Classifier(mlp(), example=example), mlp()
    run = fit(ours, quiet(rule=rule), data=loader(5), accumulate_grad_batches=2)
    assert run.global_step == 6
    accumulate(wrapped(net, sgd(net), rule=rule), net, batches(5), [2, 2])
    assert same(weights(ours), weights(net))


@RULES
def test_the_window_of_accumulated_gradients_may_be_scheduled(rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    schedule = GradientAccumulationScheduler({0: 4, 1: 1, 3: 2})
    run = fit(ours, quiet(rule=rule), schedule, max_epochs=4)
    assert run.global_step == 1 + 4 + 4 + 2
    accumulate(wrapped(net, sgd(net), rule=rule), net, batches(), [4, 1, 1, 2])
    assert same(weights(ours), weights(net))


@EXAMPLES
def test_the_refresh_interval_counts_steps_and_not_batches(example: Tensor | None) -> None:
    ours, net = Classifier(mlp(), example=example), mlp()
    fit(ours, quiet(refresh_interval=3), accumulate_grad_batches=2, max_epochs=4)
    accumulate(wrapped(net, sgd(net), refresh_interval=3), net, batches(), [2] * 4, refresh=False)
    assert same(weights(ours), weights(net))


def test_the_report_waits_for_the_first_step_when_gradients_are_accumulated(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(mlp()), EquivalentClassOptimization(), accumulate_grad_batches=3, log_every_n_steps=1)
    assert capsys.readouterr().out.count("16 + 16 freedoms") == 1


@RULES
def test_gradients_are_clipped_by_value_as_ever(rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule), gradient_clip_val=0.003, gradient_clip_algorithm="value")
    assert same(weights(ours), _clipped_by_value(net, rule))
    assert not same(weights(ours), plainly(rule))


def _clipped_by_value(net: nn.Sequential, rule: str = "unit") -> list[Tensor]:
    optimizer, steps = wrapped(net, sgd(net), rule=rule), iter(range(8))

    def clip() -> None:
        if next(steps) == 0:
            optimizer.start()  # so that they are clipped at the representative
        nn.utils.clip_grad_value_(net.parameters(), 0.003)

    train_plainly(net, optimizer, batches(), before_step=clip)
    return weights(net)


class ClipsItself(Classifier):
    """Clips by value in even and by norm in odd steps."""

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert gradient_clip_val is None
        if self.trainer.global_step % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        else:
            self.clip_gradients(optimizer, gradient_clip_val=0.003, gradient_clip_algorithm="value")


@RULES
def test_a_module_may_clip_its_gradients_itself(rule: str) -> None:
    ours, net, step = ClipsItself(mlp()), mlp(), iter(range(8))
    fit(ours, quiet(rule=rule))

    def clip() -> None:
        if next(step) % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        else:
            nn.utils.clip_grad_value_(net.parameters(), 0.003)

    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), before_step=clip)
    assert same(weights(ours), weights(net))


# Schedulers -----------------------------------------------------------------------------------------------------------


def _chain(base: Optimizer) -> Any:
    warm_up = schedulers.LinearLR(base, 0.1, total_iters=3)
    cosine = schedulers.CosineAnnealingLR(base, STEPS - 3)
    return schedulers.SequentialLR(base, [warm_up, cosine], milestones=[3])


def _linear_chain(base: Optimizer) -> Any:
    up = schedulers.LinearLR(base, 0.25, 1.0, total_iters=4)
    down = schedulers.LinearLR(base, 1.0, 0.1, total_iters=8)
    return schedulers.SequentialLR(base, [up, down], milestones=[4])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda base: schedulers.LambdaLR(base, lambda step: 1 / (1 + step)),
    "multiplicative": lambda base: schedulers.MultiplicativeLR(base, lambda step: 0.8 + 0.01 * step),
    "multistep": lambda base: schedulers.MultiStepLR(base, [2, 5], 0.3),
    "constant": lambda base: schedulers.ConstantLR(base, 0.2, total_iters=4),
    "linear": lambda base: schedulers.LinearLR(base, 0.1, total_iters=6),
    "linear, up and down": _linear_chain,
    "polynomial": lambda base: schedulers.PolynomialLR(base, STEPS, power=2.0),
    "warm restarts": lambda base: schedulers.CosineAnnealingWarmRestarts(base, 3, 2),
    "chained": lambda base: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(base, 0.5, total_iters=4), schedulers.ExponentialLR(base, 0.9)]
    ),
    "sequential": _chain,
    "cyclic": lambda base: schedulers.CyclicLR(base, 0.01, 0.2, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda base: schedulers.OneCycleLR(base, 0.2, total_steps=STEPS, cycle_momentum=False),
}


def _stepwise(make: Callable[[Optimizer], Any], base: Optimizer) -> dict[str, Any]:
    return {"optimizer": base, "lr_scheduler": {"scheduler": make(base), "interval": "step"}}


@pytest.mark.parametrize("form", few(["callback", "ec_sgd"], ["callback"]))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_sets_the_rates_of_the_steps(name: str, form: str) -> None:
    make, found = SCHEDULERS[name], Rates()
    if form == "callback":
        fit(ours := Classifier(mlp(), lambda m: _stepwise(make, sgd(m))), quiet(), found, max_epochs=3)
    else:
        fit(ours := Classifier(mlp(), lambda m: _stepwise(make, ec_sgd(m, lr=0.1, momentum=0.9))), found, max_epochs=3)
    net = mlp()
    base = sgd(net)
    scheduler = make(base)
    refreshes = form == "callback"
    train_plainly(net, wrapped(net, base), batches(), 3, refresh_each_epoch=refreshes, after_step=scheduler.step)
    assert same(weights(ours), weights(net))
    assert len(set(map(tuple, found.steps))) > 1


class Momenta(Callback):
    """Takes down the momentum, or the betas, of every step."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        (options,) = trainer.optimizers[0].param_groups
        self.steps.append(options["betas"] if "betas" in options else options["momentum"])


CYCLES: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": lambda base: schedulers.OneCycleLR(
        base, 0.1, total_steps=STEPS, pct_start=0.5, base_momentum=0.5, max_momentum=0.9
    ),
    "cyclic": lambda base: schedulers.CyclicLR(base, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.9),
}


@RULES
@pytest.mark.parametrize("base", OPTIMIZERS)
@pytest.mark.parametrize("name", CYCLES)
def test_schedulers_that_cycle_momentum_move_that_of_the_steps(name: str, base: str, rule: str) -> None:
    make, momenta, rates = CYCLES[name], Momenta(), Rates()
    ours = Classifier(mlp(), lambda m: _stepwise(make, OPTIMIZERS[base](m)))
    fit(ours, quiet(rule=rule), momenta, rates, max_epochs=3)
    assert len(set(momenta.steps)) > 3

    # No scheduler, but the numbers written where torch keeps them, ahead of each step.
    def loop(momenta: Sequence[Any]) -> list[Tensor]:
        net = mlp()
        optimizer, waiting = wrapped(net, OPTIMIZERS[base](net), rule=rule), iter(momenta)

        def write() -> None:
            optimizer.optimizer.param_groups[0]["betas" if base == "adamw" else "momentum"] = next(waiting)

        train_plainly(net, optimizer, batches(), 3, rates.steps, before_step=write)
        return weights(net)

    assert same(weights(ours), loop(momenta.steps))
    assert not same(weights(ours), loop([momenta.steps[0]] * STEPS))


class SetsMomentum(Callback):
    """Writes another momentum ahead of one step, as schedulers do, and takes down what that step changes."""

    def __init__(self, momentum: float, at: int) -> None:
        self.momentum, self.at = momentum, at
        self.moved: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            trainer.optimizers[0].param_groups[0]["momentum"] = self.momentum
            self.moved = weights(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.at + 1:
            self.moved = [after - before for before, after in zip(self.moved, weights(pl_module), strict=True)]


def test_the_relative_length_of_a_step_follows_the_momentum_of_that_step() -> None:
    # A step is lr rho / sqrt(v) times f(momentum) (momentum buffer + g): linear in the momentum but for one factor.
    def moved(momentum: float) -> Tensor:
        change = SetsMomentum(momentum, at=3)
        fit(Classifier(mlp().double()), quiet(refresh_interval=None), change, max_epochs=1, precision="64-true")
        return torch.cat([step.flatten() for step in change.moved]) / momentum_to_step({"momentum": momentum})

    none, half, much = moved(0.0), moved(0.5), moved(0.9)
    assert (half - none).abs().max() > 1e-4
    torch.testing.assert_close((half - none) / 0.5, (much - none) / 0.9, rtol=1e-9, atol=1e-12)


class Logged(Classifier):
    """Logs its loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss


@RULES
def test_a_scheduler_may_watch_a_metric_that_training_changes(rule: str) -> None:
    def make(base: Optimizer) -> schedulers.ReduceLROnPlateau:
        return schedulers.ReduceLROnPlateau(base, factor=0.5, patience=0, threshold=0.3)

    def configure(module: LightningModule) -> dict[str, Any]:
        base = sgd(module)
        return {"optimizer": base, "lr_scheduler": {"scheduler": make(base), "monitor": "loss"}}

    ours, net, found = Logged(mlp(), configure), mlp(), Rates()
    fit(ours, quiet(rule=rule), found, max_epochs=5)
    assert len(set(map(tuple, found.steps))) > 1
    base, labels = sgd(net), batches()[3][1]
    optimizer, scheduler, losses = wrapped(net, base, rule=rule), make(base), []
    net.register_forward_hook(lambda module, inputs, output: losses.append(F.cross_entropy(output, labels)))
    train_plainly(net, optimizer, batches(), 5, after_epoch=lambda: scheduler.step(losses[-1].item()))
    assert same(weights(ours), weights(net))
