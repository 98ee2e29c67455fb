"""What a pipeline does around the steps of its optimizer goes on as ever, and gives what a plain loop gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.checkpoint import checkpoint

from lightning_ecopt import (
    ECSGD,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    ScalingGroup,
    ec_sgd,
    scaling_group,
)
from tests.lightning_integration.modules import (
    EXAMPLE,
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
    mlp,
    quiet,
    same,
    same_state,
    sgd,
    train_plainly,
    trainer,
    weights,
    wrapped,
)

EXAMPLES = pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])


def plainly(rule: str = "unit", data: Sequence[Batch] | None = None, **loop: Any) -> list[Tensor]:
    """The weights at the end of a plain loop."""
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches() if data is None else data, **loop)
    return weights(net)


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
    fit(ours, quiet(refresh=3), accumulate_grad_batches=2, max_epochs=4)
    accumulate(wrapped(net, sgd(net), refresh_interval=3), net, batches(), [2] * 4, refresh=False)
    assert same(weights(ours), weights(net))


def test_the_report_waits_for_the_first_step_when_gradients_are_accumulated(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(mlp()), EquivalentClassOptimization(), accumulate_grad_batches=3, log_every_n_steps=1)
    assert capsys.readouterr().out.count("H = 32 freedoms") == 1


@RULES
def test_gradients_are_clipped_by_value_as_ever(rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule), gradient_clip_val=0.003, gradient_clip_algorithm="value")
    assert same(weights(ours), _clipped_by_value(net, rule))
    assert not same(weights(ours), plainly(rule))


def _clipped_by_value(net: nn.Sequential, rule: str = "unit") -> list[Tensor]:
    def clip() -> None:
        nn.utils.clip_grad_value_(net.parameters(), 0.003)

    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), before_step=clip)
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

STEPS = 12


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


@pytest.mark.parametrize("form", ["callback", "ec_sgd"])
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
BASES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda net: AdamW(net.parameters(), lr=0.1, betas=(0.9, 0.99)),
}


@RULES
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CYCLES)
def test_schedulers_that_cycle_momentum_move_that_of_the_steps(name: str, base: str, rule: str) -> None:
    make, momenta, rates = CYCLES[name], Momenta(), Rates()
    ours = Classifier(mlp(), lambda m: _stepwise(make, BASES[base](m)))
    fit(ours, quiet(rule=rule), momenta, rates, max_epochs=3)
    assert len(set(momenta.steps)) > 3

    # No scheduler, but the numbers written where torch keeps them, ahead of each step.
    def loop(momenta: Sequence[Any]) -> list[Tensor]:
        net = mlp()
        optimizer, waiting = wrapped(net, BASES[base](net), rule=rule), iter(momenta)

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
    # A step is lr rho / sqrt(v) times (1 - momentum) (momentum buffer + g): linear in the momentum but for one factor.
    def moved(momentum: float) -> Tensor:
        change = SetsMomentum(momentum, at=3)
        fit(Classifier(mlp().double()), quiet(refresh=None), change, max_epochs=1, precision="64-true")
        return torch.cat([step.flatten() for step in change.moved]) / (1 - momentum)

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


# Manual optimization --------------------------------------------------------------------------------------------------


class Manual(Classifier):
    """One optimizer, by hand, with its scheduler and accumulated gradients."""

    def __init__(self, configure: Any = None, example: Tensor | None = EXAMPLE) -> None:
        super().__init__(mlp(), configure, example)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(optimizer, EquivalentClassOptimizer)
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()


def _decayed(optimizer: Optimizer) -> Any:
    return [optimizer], [ExponentialLR(optimizer, 0.8)]


@SETTINGS
@pytest.mark.parametrize("form", ["callback", "ec_sgd"])
def test_manual_optimization_accumulates_clips_and_schedules_as_it_likes(
    form: str, example: Tensor | None, rule: str
) -> None:
    if form == "callback":
        fit(ours := Manual(lambda m: _decayed(sgd(m)), example), quiet(rule=rule))
    else:
        fit(ours := Manual(lambda m: _decayed(ec_sgd(m, lr=0.1, momentum=0.9, rule=rule)), example))
    net = mlp()
    base = sgd(net)
    optimizer, scheduler = wrapped(net, base, rule=rule), ExponentialLR(base, 0.8)
    for epoch in range(2):
        if epoch > 0 and form == "callback":
            optimizer.refresh()
        data = batches()
        for pair in (data[:2], data[2:]):
            optimizer.zero_grad()
            for x, y in pair:
                F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    assert same(weights(ours), weights(net))


class ManualClosure(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@SETTINGS
def test_manual_optimization_may_hand_over_a_closure(example: Tensor | None, rule: str) -> None:
    ours = ManualClosure(example=example)
    fit(ours, quiet(rule=rule))
    assert same(weights(ours), plainly(rule))


class RefreshesItself(ManualClosure):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch > 0:
            self.optimizers().refresh()


@RULES
def test_the_optimizer_that_lightning_hands_out_can_be_asked_to_refresh(rule: str) -> None:
    ours = RefreshesItself()
    fit(ours, quiet(rule=rule, refresh=None))
    assert same(weights(ours), plainly(rule))
    assert not same(weights(ours), plainly(rule, refresh_each_epoch=False))


class TakesUpItsState(ManualClosure):
    """Saves and loads the state of the optimizer that Lightning hands out between two steps."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))


@RULES
def test_the_optimizer_that_lightning_hands_out_saves_and_loads_the_whole_state(rule: str) -> None:
    ours, reference = TakesUpItsState(), ManualClosure()
    fit(ours, quiet(rule=rule))
    fit(reference, quiet(rule=rule))
    assert same(weights(ours), weights(reference))


class GAN(LightningModule):
    """A generator and a discriminator of digits, with an optimizer each; calling it judges what is generated."""

    def __init__(self, toggle: str, example: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.automatic_optimization = False
        self.example_input_array = example
        self.toggle = toggle

    def forward(self, noise: Tensor) -> Tensor:
        return self.discriminator(self.generator(noise))

    def noise(self, step: int) -> Tensor:
        return torch.randn(32, 8, generator=torch.Generator().manual_seed(step))

    def generator_loss(self, noise: Tensor) -> Tensor:
        return F.softplus(-self(noise)).mean()

    def discriminator_loss(self, real: Tensor, noise: Tensor) -> Tensor:
        fake = self.generator(noise).detach()
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        noise = self.noise(batch_idx)
        for number, optimizer in enumerate(self.optimizers()):
            if self.toggle == "toggle":
                self.toggle_optimizer(optimizer)
            elif self.toggle == "context":
                with optimizer.toggle_model():
                    self.take_step(number, optimizer, batch[0], noise)
                continue
            self.take_step(number, optimizer, batch[0], noise)
            if self.toggle == "toggle":
                self.untoggle_optimizer(optimizer)

    def take_step(self, number: int, optimizer: Any, real: Tensor, noise: Tensor) -> None:
        loss = self.discriminator_loss(real, noise) if number else self.generator_loss(noise)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return sgd(self.generator), sgd(self.discriminator, lr=0.05)


class UsualGAN(GAN):
    """Calling it generates, as most do, so that no call of it uses all parameters."""

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def generator_loss(self, noise: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(self(noise))).mean()


class Judges(nn.Module):
    """Both networks of a GAN, side by side."""

    def __init__(self, gan: GAN) -> None:
        super().__init__()
        self.generator, self.discriminator = gan.generator, gan.discriminator

    def forward(self, noise: Tensor, images: Tensor) -> Any:
        return self.generator(noise), self.discriminator(images)


NOISE = torch.zeros(1, 8)


@RULES
@pytest.mark.parametrize(
    ("kind", "toggle", "example"),
    [
        (GAN, "no", NOISE),
        (GAN, "toggle", NOISE),
        (GAN, "context", NOISE),
        (GAN, "toggle", None),
        (UsualGAN, "toggle", None),
        (UsualGAN, "context", None),
    ],
    ids=["by hand, example", "toggle, example", "context, example", "toggle", "usual, toggle", "usual, context"],
)
def test_a_gan_takes_the_steps_of_a_plain_loop(kind: type[GAN], toggle: str, example: Tensor | None, rule: str) -> None:
    ours, twin = kind(toggle, example), kind("no")
    run = fit(ours, quiet(rule=rule))
    # In one call the 64 pixels are units that lie between the two, in two calls they are nobody's.
    group = scaling_group(twin, NOISE) if kind is GAN else scaling_group(Judges(twin), NOISE, EXAMPLE)
    assert group.num_units == (96 if kind is GAN else 32)
    options: dict[str, Any] = {"rule": rule, "refresh_interval": None}
    generator = EquivalentClassOptimizer(sgd(twin.generator), group, **options)
    discriminator = EquivalentClassOptimizer(sgd(twin.discriminator, lr=0.05), group, **options)
    for epoch in range(2):
        if epoch > 0:
            generator.refresh()
            discriminator.refresh()
        for step, (real, _) in enumerate(batches()):
            twin.zero_grad()
            twin.generator_loss(twin.noise(step)).backward()
            generator.step()
            twin.zero_grad()
            twin.discriminator_loss(real, twin.noise(step)).backward()
            discriminator.step()
    assert same(weights(ours), weights(twin))
    assert all(p.requires_grad for p in ours.parameters())
    assert [int(optimizer.usable_units().sum()) for optimizer in run.optimizers] == [16, 16]
    assert is_clean(ours)


@RULES
def test_the_units_between_a_generator_and_its_discriminator_are_left_alone_and_reported(
    capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    # The discriminator sees images that nobody generated, too: a rescaled pixel would be another function of those.
    module, real, noise = GAN("toggle", NOISE), digits()[0], torch.randn(50, 8)
    with torch.no_grad():
        module.generator[2].weight.mul_(5)
        expected = module.discriminator(real), module.generator(noise)
    module.configure_optimizers = lambda: (sgd(module.generator, lr=0.0), sgd(module.discriminator, lr=0.0))
    before = weights(module)
    fit(module, EquivalentClassOptimization(rule=rule))
    torch.testing.assert_close((module.discriminator(real), module.generator(noise)), expected)
    assert not same(weights(module), before)  # of the others a representative is taken
    assert "33.3% of the freedoms used" in " ".join(capsys.readouterr().out.split())


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
    ours, net, callback, unmoved = GivesMuch(mlp(), example=example), mlp(), quiet(rule=rule, refresh=None), Unmoved()
    fit(ours, callback, unmoved)
    # Where the network is known from the start, the first step moves to the representative.
    assert unmoved.batches == [example is None, *[False, False, True], *[True, False, False, True]]
    optimizer = wrapped(net, sgd(net), rule=rule)
    for number, (x, y) in enumerate(batches() * 2):
        optimizer.zero_grad()
        if number % 4 % 3:
            F.cross_entropy(net(x), y).backward()
        if number > 0 or example is not None:
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
    ours, unchanged = Overflows(at, BASES[base], example), Unchanged()
    scaling = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(ours, EquivalentClassOptimization(rule=rule), unchanged, plugins=scaling, max_epochs=3)
    assert unchanged.batches == [step in at for step in range(STEPS)]
    assert scaling.scaler is not None
    assert scaling.scaler.get_scale() == 1024.0 / 2 ** len(at)

    # As if there had been no such batches.
    net, scaler, step = mlp(), torch.amp.GradScaler("cpu", init_scale=1024.0), 0
    scaler.scale(torch.ones(1))  # so that it knows its device
    optimizer = wrapped(net, BASES[base](net), rule=rule)
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


# Options of the Trainer -----------------------------------------------------------------------------------------------


class Evaluated(Classifier):
    """Validates, and counts the batches."""

    def __init__(self, example: Tensor | None = None) -> None:
        super().__init__(mlp(), example=example)
        self.validated = 0
        self.inference: set[bool] = set()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += 1
        self.inference.add(torch.is_inference_mode_enabled())
        self.log("validation loss", F.cross_entropy(self(batch[0]), batch[1]))


@EXAMPLES
def test_batches_may_be_limited(example: Tensor | None) -> None:
    ours = Evaluated(example)
    run = trainer(quiet(), limit_train_batches=3, limit_val_batches=1, val_check_interval=1)
    run.fit(ours, loader(), loader(2))
    assert ours.validated == 7  # one before training
    assert same(weights(ours), plainly(data=batches(3)))


@EXAMPLES
@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"check_val_every_n_epoch": 2}], ids=str)
def test_validation_may_come_at_any_time_and_without_inference_mode(
    options: dict[str, Any], example: Tensor | None
) -> None:
    ours = Evaluated(example)
    run = trainer(quiet(), inference_mode=False, num_sanity_val_steps=0, **options)
    run.fit(ours, loader(), loader(1))
    assert ours.validated == (4 if "val_check_interval" in options else 1)
    assert ours.inference == {False}
    assert same(weights(ours), plainly())


@pytest.mark.parametrize(("overfit", "count"), [(1, 1), (0.5, 2)])
def test_batches_may_be_overfitted(overfit: float, count: int) -> None:
    ours = Classifier(mlp())
    fit(ours, quiet(), overfit_batches=overfit)
    assert same(weights(ours), plainly(data=batches(count)))


@RULES
def test_a_run_may_end_within_an_epoch(rule: str) -> None:
    ours = Classifier(mlp())
    run = fit(ours, quiet(rule=rule), max_epochs=-1, max_steps=6)
    assert run.global_step == 6
    net = mlp()
    optimizer = wrapped(net, sgd(net), rule=rule)
    train_plainly(net, optimizer, batches(), epochs=1)
    optimizer.refresh()
    train_plainly(net, optimizer, batches(2), epochs=1)
    assert same(weights(ours), weights(net))


@EXAMPLES
def test_a_fast_dev_run_may_take_several_steps(example: Tensor | None) -> None:
    ours = Evaluated(example)
    trainer(quiet(), fast_dev_run=3).fit(ours, loader(), loader())
    assert same(weights(ours), plainly(data=batches(3), epochs=1))
    assert ours.validated == 3


@SETTINGS
def test_anomalies_may_be_looked_for_in_a_deterministic_run(example: Tensor | None, rule: str) -> None:
    ours = Classifier(mlp(), example=example)
    try:
        fit(ours, quiet(rule=rule), detect_anomaly=True, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(ours), plainly(rule))


@EXAMPLES
def test_a_barebones_run_is_the_same_run(example: Tensor | None) -> None:
    ours = Classifier(mlp(), example=example)
    # Such a Trainer takes no other options.
    run = Trainer(accelerator="cpu", devices=1, max_epochs=2, barebones=True, callbacks=[quiet()])
    run.fit(ours, loader())
    assert same(weights(ours), plainly())
    assert not run.callback_metrics


class Reloads(Classifier):
    """Has another loader in each epoch."""

    def train_dataloader(self) -> Any:
        return loader(self.current_epoch + 1)


@EXAMPLES
def test_loaders_may_be_made_anew(example: Tensor | None) -> None:
    ours, net = Reloads(mlp(), example=example), mlp()
    trainer(quiet(), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(ours)
    optimizer = wrapped(net, sgd(net))
    for epoch in range(3):
        if epoch:
            optimizer.refresh()
        train_plainly(net, optimizer, batches(epoch + 1), epochs=1)
    assert same(weights(ours), weights(net))


class TwoLoaders(Classifier):
    """Sums the losses of two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(self(x), y) for x, y in batch.values() if x is not None)


@SETTINGS
def test_loaders_may_be_combined(example: Tensor | None, rule: str) -> None:
    ours, net, callback = TwoLoaders(mlp(), example=example), mlp(), quiet(rule=rule)
    fit(ours, callback, data=CombinedLoader({"one": loader(2), "other": loader(4, 16)}, "max_size_cycle"))
    assert callback.group is not None
    assert callback.group.num_units == 32
    optimizer = wrapped(net, sgd(net), rule=rule)
    for epoch in range(2):
        if epoch:
            optimizer.refresh()
        for pair in zip(batches(2) * 2, batches(4, 16), strict=True):
            optimizer.zero_grad()
            sum(F.cross_entropy(net(x), y) for x, y in pair).backward()
            optimizer.step()
    assert same(weights(ours), weights(net))


class Interrupted(Classifier):
    """Breaks off at one step, once."""

    def __init__(self, at: int, example: Tensor | None) -> None:
        super().__init__(mlp(), example=example)
        self.at: int | None = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.at:
            self.at = None
            raise ArithmeticError("the user's own")
        return super().training_step(batch, batch_idx)


@SETTINGS
@pytest.mark.parametrize("at", [0, 5], ids=["at once", "later"])
def test_an_interrupted_run_can_be_followed_by_another(at: int, example: Tensor | None, rule: str) -> None:
    ours, net, callback = Interrupted(at, example), mlp(), quiet(rule=rule)
    with pytest.raises(ArithmeticError, match="the user's own"):
        fit(ours, callback)
    assert is_clean(ours)
    fit(ours, callback)
    if at:
        optimizer = wrapped(net, sgd(net), rule=rule)
        train_plainly(net, optimizer, batches(), epochs=1)
        optimizer.refresh()
        train_plainly(net, optimizer, batches(1), epochs=1)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(ours), weights(net))
    assert is_clean(ours)


# Modules --------------------------------------------------------------------------------------------------------------


class BuiltLate(Classifier):
    """Makes its network only when Lightning asks for it."""

    def __init__(self, example: Tensor | None) -> None:
        super().__init__(nn.Identity(), example=example)

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = mlp()


@SETTINGS
def test_a_network_may_be_made_when_training_starts(example: Tensor | None, rule: str) -> None:
    ours = BuiltLate(example)
    fit(ours, quiet(rule=rule))
    assert same(weights(ours), plainly(rule))


class Checkpointed(nn.Module):
    """Computes its hidden layers twice instead of keeping them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = mlp()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[1](self.inner[0](x))
        return self.inner[4](checkpoint(self.inner[2:4], hidden, use_reentrant=self.reentrant))


@EXAMPLES
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_may_be_recomputed(reentrant: bool, example: Tensor | None) -> None:
    ours, callback = Classifier(Checkpointed(reentrant), example=example), quiet()
    fit(ours, callback)
    assert callback.group is not None
    assert callback.group.num_units == 32
    assert same(weights(ours), plainly())


def _compiled_net(example: Tensor | None) -> Classifier:
    return Classifier(torch.compile(mlp(), backend="eager"), example=example)


def _compiled_in_place(example: Tensor | None) -> Classifier:
    module = Classifier(mlp(), example=example)
    module.net.compile(backend="eager")
    return module


def _compiled_module(example: Tensor | None) -> Classifier:
    return torch.compile(Classifier(mlp(), example=example), backend="eager")


class CompilesItself(Classifier):
    def configure_model(self) -> None:
        self.compile(backend="eager")


COMPILED = {
    "network": _compiled_net,
    "network in place": _compiled_in_place,
    "module": _compiled_module,
    "module in place": lambda example: CompilesItself(mlp(), example=example),
}


@EXAMPLES
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_modules_take_the_steps_of_a_plain_loop(form: str, example: Tensor | None) -> None:
    torch._dynamo.reset()
    ours, callback = COMPILED[form](example), quiet()
    fit(ours, callback)
    assert isinstance(callback.group, ScalingGroup)
    assert callback.group.num_units == 32
    assert same(weights(ours), plainly())
    # What is compiled stays so, and runs, after training.
    assert torch.isfinite(ours(digits()[0][:5])).all()


def test_a_compiled_network_is_watched_uncompiled_and_runs_compiled_afterwards() -> None:
    torch._dynamo.reset()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    ours = Classifier(torch.compile(mlp(), backend=backend))
    fit(ours, quiet())
    assert len(compiled) == 1
    assert same(weights(ours), plainly())


def _afterwards(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    optimizer = ec_sgd(net, lr=0.1, momentum=0.9)
    return torch.compile(net, backend="eager"), optimizer


def _before(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    return torch.compile(net, backend="eager"), ec_sgd(net, lr=0.1, momentum=0.9)


def _compiled_given(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    model = torch.compile(net, backend="eager")
    return model, ec_sgd(model, lr=0.1, momentum=0.9)


def _in_place(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    net.compile(backend="eager")
    return net, ec_sgd(net, lr=0.1, momentum=0.9)


def _parameters_alone(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    return torch.compile(net, backend="eager"), ECSGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("compiled", [_afterwards, _before, _compiled_given, _in_place, _parameters_alone])
def test_the_first_call_of_a_compiled_network_is_watched_in_a_plain_loop(
    compiled: Callable[[nn.Module], tuple[Any, EquivalentClassOptimizer]],
) -> None:
    torch._dynamo.reset()
    net = mlp()
    model, optimizer = compiled(net)
    train_plainly(model, optimizer, batches())
    assert optimizer.group is not None
    assert optimizer.group.num_units == 32
    assert same(weights(net), plainly())
    assert is_clean(net)
