"""Who else writes to weights in a Trainer: constraints, of which units are held fixed, and callbacks that are none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim import SGD

from tests.lightning_integration.modules import Batch, Classifier, loader, mlp, quiet, trainer
from tests.lightning_integration.test_averaging_and_pruning import _averaging
from tests.selection import few


class Written(Classifier):
    """Writes to its weights in one of the hooks."""

    def __init__(self, hook: str = "") -> None:
        super().__init__()
        self.hook = hook

    @torch.no_grad()
    def constrain(self, hook: str) -> None:
        if hook == self.hook:
            for p in self.net[2].parameters():
                p.clamp_(-0.1, 0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.constrain("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.constrain("on_train_batch_end")

    def on_train_batch_start(self, *args: Any) -> None:
        self.constrain("on_train_batch_start")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.constrain("on_before_optimizer_step")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.constrain("on_before_zero_grad")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.net(batch[0])


class Wasserstein(Written):
    """A critic whose weights are clipped, and a generator: manual optimization."""

    def __init__(self, in_training_step: bool) -> None:
        super().__init__()
        self.in_training_step = in_training_step
        self.automatic_optimization, self.critic = False, mlp(1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator, critic = self.optimizers()  # type: ignore[misc]
        for optimizer, sign in ((critic, 1), (generator, -1)):
            optimizer.zero_grad()
            made = F.pad(self.net(batch[0]), (0, 54))
            self.manual_backward(sign * (self.critic(made).mean() - self.critic(batch[0]).mean()))
            optimizer.step()
            if self.in_training_step:
                self.clip()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clip()

    def clip(self) -> None:
        for p in self.critic.parameters():
            p.data.clamp_(-0.1, 0.1)

    def configure_optimizers(self) -> Any:
        return [SGD(net.parameters(), lr=0.05) for net in (self.net, self.critic)]


class Loads(Written):
    """Takes other weights over, once."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 2:
            self.net.load_state_dict(mlp(3).state_dict())


def said(module: Any, *callbacks: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(*callbacks, quiet(), max_epochs=4, **options).fit(module, loader(), loader(1))
    return [str(each.message) for each in found if "writes to" in str(each.message)]


@pytest.mark.parametrize(
    "hook",
    few(
        [
            "on_train_batch_start",
            "on_train_batch_end",
            "on_before_optimizer_step",
        ],
        ["on_train_batch_end", "on_before_optimizer_step"],
    ),
)
def test_a_constraint_is_noticed_in_every_hook(hook: str) -> None:
    module = Written(hook)
    (message,) = said(module)
    assert "2.weight" in message or "net.2.weight" in message


@pytest.mark.parametrize("in_training_step", [False, True])  # which is watched, so that nothing is left to be noticed
def test_the_units_of_a_critic_are_held_and_those_of_the_generator_are_free(in_training_step: bool) -> None:
    module, callback = Wasserstein(in_training_step), quiet()
    with nullcontext() if in_training_step else pytest.warns(UserWarning, match="writes to critic"):
        trainer(callback, max_epochs=3).fit(module, loader(), loader(1))
    group = callback.group
    assert group is not None
    left = {coupling.parameter.partition(".")[0] for coupling in group.couplings if not coupling.is_fixed}
    assert left == {"net"}


@pytest.mark.parametrize(
    "make",
    few(
        [
            lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)],
            lambda: [_averaging("WeightAveraging")],
            lambda: [_averaging("EMAWeightAveraging", decay=0.8)],
            lambda: [ModelPruning("l1_unstructured", amount=0.2)],
        ],
        4,
    ),
)
def test_averages_and_pruning_are_no_constraints(make: Callable[[], list[Any]]) -> None:
    assert not said(Written(), *make())


def test_weights_that_are_loaded_or_pruned_by_hand_are_no_constraint() -> None:
    assert not said(Loads())
    module = Written()
    prune.random_unstructured(module.net[2], "weight", amount=0.5)
    assert not said(module)
