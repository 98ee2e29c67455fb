"""Manual optimization gives what a plain loop gives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    batches,
    digits,
    fit,
    is_clean,
    mlp,
    quiet,
    same,
    sgd,
    trainer,
    weights,
    wrapped,
)
from tests.lightning_integration.pipelines import plainly


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
            optimizer.step()  # the first training step takes none
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
    assert same(weights(ours), plainly(rule, first_is_plain=True))


class RefreshesItself(ManualClosure):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch > 0:
            self.optimizers().refresh()


@RULES
def test_the_optimizer_that_lightning_hands_out_can_be_asked_to_refresh(rule: str) -> None:
    ours = RefreshesItself()
    fit(ours, quiet(rule=rule, refresh_interval=None))
    assert same(weights(ours), plainly(rule, first_is_plain=True))
    assert not same(weights(ours), plainly(rule, first_is_plain=True, refresh_each_epoch=False))


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
    # The discriminator sees real images, too, so that the 64 pixels between the two are not free.
    group = scaling_group(Judges(twin), NOISE, EXAMPLE)
    assert group.num_units == 32
    options: dict[str, Any] = {"rule": rule, "refresh_interval": None}
    generator = EquivalentClassOptimizer(sgd(twin.generator), group, **options)
    discriminator = EquivalentClassOptimizer(sgd(twin.discriminator, lr=0.05), group, **options)
    for epoch in range(2):
        if epoch > 0:
            generator.refresh()
            discriminator.refresh()
        for step, (real, _) in enumerate(batches()):
            is_first = epoch == step == 0
            twin.zero_grad()
            twin.generator_loss(twin.noise(step)).backward()
            (generator.optimizer if is_first else generator).step()
            twin.zero_grad()
            twin.discriminator_loss(real, twin.noise(step)).backward()
            (discriminator.optimizer if is_first else discriminator).step()
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
    assert "freedoms in 4 layers, 32 of them used; lr = 0 is" in capsys.readouterr().out


class Counts(ManualClosure):
    """Saves weights and state after a number of steps, and may begin from what another has saved."""

    def __init__(self, at: int, begin: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.count, self.saved, self.begin = at, 0, None, begin

    def on_fit_start(self) -> None:
        if self.begin is not None:
            weights, state = deepcopy(self.begin)
            self.net.load_state_dict(weights)
            self.optimizers().load_state_dict(state)
            self.count = self.at

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.count += 1
        super().training_step(batches()[self.count % 4], batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.count == self.at:
            self.saved = deepcopy((self.net.state_dict(), self.optimizers().state_dict()))


@SETTINGS
@pytest.mark.parametrize("at", [1, 2])
def test_a_run_is_resumed_bit_identical_after_its_first_plain_step(at: int, example: Tensor | None, rule: str) -> None:
    whole = Counts(at, example=example)
    fit(whole, quiet(rule=rule, refresh_interval=3), max_epochs=2)
    resumed = Counts(at, whole.saved, example=example)
    fit(resumed, quiet(rule=rule, refresh_interval=3), max_epochs=2, max_steps=8 - at)
    assert (whole.count, resumed.count) == (8, 8)
    assert same(weights(whole), weights(resumed))


class Compares(LightningModule):
    """A loss on hidden features in the second half of each training step, with gradients that others look at."""

    def __init__(self, compares: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.compares, self.seen = False, compares, []
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, x = self.optimizers(), torch.eye(8)
        losses = [lambda: F.cross_entropy(self(x), torch.arange(8) % 3), lambda: (self.encoder(x) - 1).square().mean()]
        for number, loss in enumerate(losses[: 1 + self.compares]):
            with optimizer.toggle_model():
                value = loss()
                optimizer.zero_grad()
                self.manual_backward(value)
                self.clip_gradients(optimizer, gradient_clip_val=1.0)
                self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())
                optimizer.step()
            if number:
                self.seen.append(value.item())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("form", ["callback", "ec_sgd"])
def test_the_whole_training_step_is_watched(form: str, compares: bool, recwarn: pytest.WarningsRecorder) -> None:
    module, callback = Compares(compares), quiet(refresh_interval=2)
    if form == "ec_sgd":
        module.configure_optimizers = lambda: ec_sgd(module, lr=1e-9, refresh_interval=2)
    run = fit(module, *([callback] if form == "callback" else []))
    assert run.optimizers[0].group.num_units == (16 if compares else 24)
    assert module.seen == pytest.approx([module.seen[0]] * len(module.seen) if compares else [], rel=1e-5)
    assert not [w for w in recwarn if "lightning_ecopt" in str(w.message) or "base optimizer" in str(w.message)]
    assert is_clean(module)


class Rarely(LightningModule):
    """A generator that learns in every third batch only, by features of the discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.G, self.features = (nn.Sequential(nn.Linear(a, 8), nn.ReLU(), nn.Linear(8, 6)) for a in (4, 6))
        self.judge = nn.Linear(6, 1)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        x, made = self.pair()
        if batch_idx % 3 == 2:
            optimizer, loss = generator, (self.features(made) - self.features(x)).square().mean()
        else:
            scores = [self.judge(self.features(of).relu()).mean() for of in (x, made.detach())]
            optimizer, loss = discriminator, scores[0] - scores[1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def pair(self) -> tuple[Tensor, Tensor]:
        return torch.linspace(-1, 1, 48).view(8, 6), self.G(torch.linspace(0, 1, 32).view(8, 4))

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            x, made = map(self.features, self.pair())
            self.seen.append(float((made - x).square().mean()))

    def configure_optimizers(self) -> Any:
        others = [*self.features.parameters(), *self.judge.parameters()]
        return [torch.optim.SGD(of, lr=1e-9) for of in (self.G.parameters(), others)]


def test_a_loss_that_only_a_rare_step_has_is_seen_before_anything_is_rescaled() -> None:
    plain, ours = Rarely(), Rarely()
    for module, callbacks in ((plain, []), (ours, [quiet()])):
        trainer(*callbacks, max_epochs=2).fit(module, DataLoader(range(6)))
    assert ours.seen == pytest.approx(plain.seen, rel=1e-4)
