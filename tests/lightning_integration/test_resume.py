"""A run that is taken up from a checkpoint ends where the uninterrupted one does, to the last bit."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

from lightning_ecopt import EquivalentClassOptimization, ScalingGroup, ec_sgd, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    Batch,
    Classifier,
    Rates,
    batches,
    digits,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    trainer,
    weights,
)
from tests.optim.bases import BASES
from tests.selection import few, pairwise

STEPS_PER_EPOCH = 5
EPOCHS = 4


class Stepwise(Classifier):
    """Takes its batch by the number of the step: Lightning does not wind a loader on to where an epoch broke off."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        data = batches(8)
        return super().training_step(data[self.trainer.global_step % len(data)], batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])


def scheduled(module: Any) -> dict[str, Any]:
    base = sgd(module, weight_decay=1e-3)
    return {"optimizer": base, "lr_scheduler": {"scheduler": ExponentialLR(base, 0.95), "interval": "step"}}


def scheduled_ec_sgd(module: Any, **options: Any) -> dict[str, Any]:
    optimizer = ec_sgd(module, lr=0.1, momentum=0.9, weight_decay=1e-3, **options)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.95), "interval": "step"}}


def run(
    *callbacks: Callback,
    seed: int = 0,
    net: nn.Module | None = None,
    configure: Any = scheduled,
    example: Any = None,
    ckpt: Path | None = None,
) -> Classifier:
    # Another seed shows that a resumed module takes everything from the checkpoint.
    module = Stepwise(mlp(seed) if net is None else net, configure, example)
    fitting = trainer(
        *callbacks,
        max_epochs=EPOCHS,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    with warnings.catch_warnings():
        # Neither the loader nor the callback that saved goes on, and Lightning says so.
        warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before.*")
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        warnings.filterwarnings("ignore", message="The dirpath has changed.*")
        fitting.fit(module, loader(STEPS_PER_EPOCH), loader(1), ckpt_path=ckpt)
    assert fitting.global_step == EPOCHS * STEPS_PER_EPOCH
    assert is_clean(module)
    return module


def saving(path: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path, filename="{step}", save_top_k=-1, **when)


WHEN = {
    "epoch end": {"save_on_train_epoch_end": True},
    "after validation": {"save_on_train_epoch_end": False},
    # Within epochs, at their ends, and by turns.
    "every 3 steps": {"every_n_train_steps": 3},
    "every 5 steps": {"every_n_train_steps": 5},
}


@pytest.mark.parametrize(
    ("when", "refresh", "example", "rule"),
    few(pairwise(WHEN, ["epoch", 7, None], [None, EXAMPLE], ["unit", "path"]), 8),
)
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path, when: str, refresh: Any, example: Tensor | None, rule: str
) -> None:
    def callback() -> EquivalentClassOptimization:
        return EquivalentClassOptimization(rule=rule, refresh_interval=refresh, verbose=False)

    expected = run(callback(), saving(tmp_path, **WHEN[when]), example=example)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[:3]
    assert len(paths) == 3
    different = []
    for path in paths:
        resumed = run(callback(), seed=9, example=example, ckpt=path)
        if not same(weights(resumed), weights(expected)):
            different.append(path.stem)
    assert different == []


def without_biases(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 10, bias=False))


@RULES
@pytest.mark.parametrize("name", few(BASES, ["adamw", "lion"]))
def test_a_run_of_any_optimizer_is_resumed_bit_identical_within_an_epoch(tmp_path: Path, name: str, rule: str) -> None:
    build = without_biases if BASES[name].matrices else mlp

    def configure(module: Any) -> Any:
        return BASES[name].make(list(module.parameters()))

    def callback() -> EquivalentClassOptimization:
        return EquivalentClassOptimization(rule=rule, refresh_interval=4, verbose=False)

    expected = run(callback(), saving(tmp_path, every_n_train_steps=7), net=build(), configure=configure)
    resumed = run(callback(), net=build(9), configure=configure, ckpt=tmp_path / "step=7.ckpt")
    assert same(weights(resumed), weights(expected))
    assert not same(weights(expected), weights(build()))


@RULES
@pytest.mark.parametrize("example", few([None, EXAMPLE], [EXAMPLE]), ids=["first step", "example"])
@pytest.mark.parametrize("when", few(["epoch end", "every 3 steps"], ["every 3 steps"]))
def test_a_resumed_run_of_ec_sgd_is_bit_identical(tmp_path: Path, when: str, example: Tensor | None, rule: str) -> None:
    def configure(module: Any) -> Any:
        return scheduled_ec_sgd(module, rule=rule, refresh_interval=4)

    expected = run(saving(tmp_path, **WHEN[when]), configure=configure, example=example)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[:3]
    assert len(paths) == 3
    for path in paths:
        resumed = run(seed=9, configure=configure, example=example, ckpt=path)
        assert same(weights(resumed), weights(expected))


@RULES
@pytest.mark.parametrize("refresh", few(["epoch", 7], [7]), ids=str)
@pytest.mark.parametrize("at", few([3, 5, 8], [5]))
def test_a_run_that_starts_without_a_path_is_resumed_bit_identical(
    tmp_path: Path, refresh: Any, at: int, rule: str
) -> None:
    # Behind a last layer of zeros all units are dormant until the first refresh, also when the run breaks off before.
    def callback() -> EquivalentClassOptimization:
        return EquivalentClassOptimization(rule=rule, refresh_interval=refresh, verbose=False)

    net = mlp()
    nn.init.zeros_(net[4].weight)
    expected = run(callback(), saving(tmp_path, every_n_train_steps=at), net=net)
    resumed = run(callback(), seed=9, ckpt=tmp_path / f"step={at}.ckpt")
    assert same(weights(resumed), weights(expected))


@RULES
def test_a_run_that_is_resumed_twice_is_bit_identical(tmp_path: Path, rule: str) -> None:
    def parts(name: str) -> tuple[Callback, Callback]:
        return quiet(rule=rule), saving(tmp_path / name, every_n_train_steps=3)

    expected = run(*parts("one"))
    run(*parts("two"), seed=8, ckpt=tmp_path / "one" / "step=3.ckpt")
    resumed = run(*parts("three"), seed=9, ckpt=tmp_path / "two" / "step=12.ckpt")
    assert same(weights(resumed), weights(expected))


@pytest.mark.parametrize("refresh", few(["epoch", 7], [7]), ids=str)
@pytest.mark.parametrize("at", few([3, 5, 8], [5]))
@RULES
def test_a_resumed_run_refreshes_when_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: Any, at: int, rule: str
) -> None:
    balance_, modules, found = ScalingGroup.balance_, [], []

    class Seen(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            modules.append(pl_module)

    def spy(group: ScalingGroup, *args: Any) -> Tensor:
        found.append(modules[-1].trainer.global_step)
        return balance_(group, *args)

    monkeypatch.setattr(ScalingGroup, "balance_", spy)

    def parts() -> tuple[Callback, Callback]:
        return Seen(), EquivalentClassOptimization(rule=rule, refresh_interval=refresh, verbose=False)

    run(*parts(), saving(tmp_path, every_n_train_steps=at))
    expected = [step for step in found if step >= at]
    found.clear()
    run(*parts(), ckpt=tmp_path / f"step={at}.ckpt")
    assert found == expected


@RULES
def test_a_checkpoint_can_be_loaded_as_weights_only(tmp_path: Path, rule: str) -> None:
    run(quiet(rule=rule), saving(tmp_path, every_n_train_steps=3))
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert set(state["optimizer_states"][0]) >= {"state", "param_groups"}


def _loss(module: Classifier) -> float:
    images, labels = digits()
    return float(F.cross_entropy(module(images), labels).detach())


@RULES
@EXAMPLES
@pytest.mark.parametrize("step", [3, 10])
def test_a_run_of_plain_sgd_goes_on_with_the_callback(
    tmp_path: Path, step: int, example: Tensor | None, rule: str
) -> None:
    rates, resumed_rates = Rates(), Rates()
    plain = run(rates, saving(tmp_path, every_n_train_steps=step))
    callback = quiet(rule=rule)
    path = tmp_path / f"step={step}.ckpt"
    resumed = run(callback, resumed_rates, seed=9, example=example, ckpt=path)
    assert resumed_rates.steps == rates.steps[step:]
    assert callback.group is not None
    assert not same(weights(resumed), weights(plain))

    # The first step goes on with the momentum of the checkpoint: training gets on as it did, and not anew.
    start = Classifier(mlp())
    start.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert math.isfinite(_loss(resumed))
    assert _loss(resumed) < _loss(start)
    assert _loss(resumed) < 1.1 * _loss(plain)  # equivalent-class steps get on faster


@RULES
def test_a_run_with_the_callback_goes_on_with_plain_sgd(tmp_path: Path, rule: str) -> None:
    rates, resumed_rates = Rates(), Rates()
    ours = run(quiet(rule=rule), rates, saving(tmp_path, every_n_train_steps=3))
    path = tmp_path / "step=6.ckpt"
    resumed = run(resumed_rates, seed=9, ckpt=path)
    assert resumed_rates.steps == rates.steps[6:]

    # Exactly what plain PyTorch makes of that checkpoint.
    state = torch.load(path, weights_only=True)
    reference = Classifier(mlp(9))
    reference.load_state_dict(state["state_dict"])
    base = sgd(reference)
    base.load_state_dict(state["optimizer_states"][0])
    assert base.param_groups[0]["weight_decay"] == 1e-3
    data = batches(8)
    for step in range(6, EPOCHS * STEPS_PER_EPOCH):
        base.param_groups[0]["lr"] = rates.steps[step][0]
        base.zero_grad()
        x, y = data[step % 8]
        F.cross_entropy(reference(x), y).backward()
        base.step()
    assert same(weights(resumed), weights(reference))
    assert not same(weights(resumed), weights(ours))


def test_momentum_is_kept_in_weight_space_for_plain_sgd(tmp_path: Path) -> None:
    # A small start of the free coordinates lets paths move far in one step, so that the two spaces differ.
    callback = quiet(rule="path", free_start=0.02)
    run(callback, saving(tmp_path, every_n_train_steps=1), configure=sgd, example=EXAMPLE)
    state = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    start = Classifier(mlp())
    group = scaling_group(start, EXAMPLE)
    group.balance_()
    x, y = batches(8)[0]
    F.cross_entropy(start(x), y).backward()
    moved = 0
    for number, (name, p) in enumerate(start.named_parameters()):
        momentum, weight = state["optimizer_states"][0]["state"][number]["momentum_buffer"], state["state_dict"][name]
        assert p.grad is not None
        # The coordinate moves from w to v = w - lr g. Then w' = v / beta and the covector is g beta.
        agree = torch.isclose(momentum * weight, p.grad * (p - 0.1 * p.grad), rtol=1e-4, atol=1e-8)
        assert int((~agree).sum()) <= 2 * group.num_units  # the skeleton weights have rules of their own
        moved += int((~torch.isclose(momentum, p.grad, rtol=1e-2)).sum())
    assert moved > 100
