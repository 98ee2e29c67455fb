"""Schedule-free optimizers, which average weights: trained in coordinates, evaluated at weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.lightning_integration.modules import (
    Classifier,
    batches,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    same_state,
    train_plainly,
    trainer,
    weights,
    wrapped,
)
from tests.optim.training import distance, loss_of, problem, rescaled, same_bits, through_a_file, train
from tests.selection import few

library = pytest.importorskip("schedulefree")

BASES: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda params: library.SGDScheduleFree(params, lr=0.1, warmup_steps=3),
    "AdamW": lambda params: library.AdamWScheduleFree(params, lr=0.02, warmup_steps=3, weight_decay=0.01),
    "RAdam": lambda params: library.RAdamScheduleFree(params, lr=0.02),
}
EACH = pytest.mark.parametrize("base", few(list(BASES), ["SGD", "AdamW"]))
RULES = pytest.mark.parametrize("rule", few(["unit", "path"], ["unit"]))


def ours(module: nn.Module, x: Tensor, base: str, rule: str = "unit") -> Any:
    return EquivalentClassOptimizer(
        BASES[base](module.parameters()), scaling_group(module, x), rule=rule, refresh_interval=5
    )


def evaluated(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    """The loss at the averages, between two steps."""
    optimizer.eval()
    with torch.no_grad():
        loss = float(loss_of(module, x, y))
    optimizer.train()
    return loss


@RULES
@EACH
def test_a_run_depends_on_the_class_alone(base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other, start = rescaled(module, x), copy.deepcopy(module)
    losses: list[list[float]] = []
    for one in (module, other):
        optimizer = ours(one, x, base, rule)
        optimizer.train()
        seen = []
        for step in range(0, 24, 3):
            seen += train(one, optimizer, x, y, range(step, step + 3))
            seen.append(evaluated(one, optimizer, x, y))
        optimizer.eval()
        losses.append(seen)
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert distance(module, other, x) < 1e-8
    assert float(loss_of(module, x, y)) < float(loss_of(start, x, y))


@RULES
@EACH
def test_a_look_at_the_averages_changes_nothing(base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other = copy.deepcopy(module)
    looks, runs = ours(module, x, base, rule), ours(other, x, base, rule)
    for optimizer in (looks, runs):
        optimizer.train()
    at_averages = []
    for step in range(12):
        for one, optimizer in ((module, looks), (other, runs)):
            train(one, optimizer, x, y, range(step, step + 1))
        at_averages.append(evaluated(module, looks, x, y))
    assert distance(module, other, x) < 1e-10
    at_weights = float(loss_of(module, x, y))
    assert at_averages[-1] != pytest.approx(at_weights, rel=1e-6)
    assert looks.param_groups[0]["train_mode"]


@RULES
@EACH
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_run_is_resumed_bit_identical(mode: str, base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    optimizer = ours(module, x, base, rule)
    optimizer.train()
    train(module, optimizer, x, y, range(7))
    getattr(optimizer, mode)()  # schedulefree asks for eval() before a checkpoint is saved
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    expected = train(module, optimizer, x, y, range(7, 14))
    other, _, _ = problem(5, 8, 6, 2, seed=1)
    resumed = ours(other, x, base, rule)
    other.load_state_dict(saved["module"])
    resumed.load_state_dict(saved["optimizer"])
    resumed.train()
    assert train(other, resumed, x, y, range(7, 14)) == expected
    assert same_bits(module, other)
    assert same_state(resumed.state_dict(), optimizer.state_dict())


class ScheduleFree(Classifier):
    """A module that switches its optimizer as schedulefree's guide has it, and validates at the averages."""

    def __init__(self, base: str, net: nn.Module | None = None) -> None:
        super().__init__(net, lambda module: BASES[base](module.parameters()))
        self.seen: list[float] = []

    def _switch(self, mode: str) -> None:
        for optimizer in self.trainer.optimizers:
            getattr(optimizer, mode)()

    def on_train_epoch_start(self) -> None:
        self._switch("train")

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._switch("eval")

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self._switch("train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(nn.functional.cross_entropy(self(batch[0]), batch[1])))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert all(optimizer.param_groups[0]["train_mode"] for optimizer in self.trainer.optimizers)


@EACH
def test_the_callback_equals_a_loop_and_resumes(base: str, tmp_path: Path) -> None:
    def run(module: ScheduleFree, epochs: int, path: Path | None = None) -> Trainer:
        whole = trainer(quiet(), max_epochs=epochs, num_sanity_val_steps=0)
        whole.fit(module, loader(), loader(1), ckpt_path=path)
        return whole

    module = ScheduleFree(base)
    whole = run(module, 3)
    net = mlp()
    plain: Any = wrapped(net, BASES[base](net.parameters()))
    plain.train()
    seen: list[float] = []

    def validate() -> None:
        plain.eval()
        with torch.no_grad():
            seen.append(float(nn.functional.cross_entropy(net(batches(1)[0][0]), batches(1)[0][1])))
        plain.train()

    train_plainly(net, plain, batches(), epochs=3, after_epoch=validate)
    assert module.seen == seen
    assert seen[-1] < seen[0]
    assert same(weights(module.net), weights(net))
    assert is_clean(module)
    run(ScheduleFree(base), 1).save_checkpoint(tmp_path / "first.ckpt")
    resumed = ScheduleFree(base, mlp(1))
    second = run(resumed, 3, tmp_path / "first.ckpt")
    assert resumed.seen == seen[1:]
    assert same(weights(resumed), weights(module))
    assert same_state(second.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


def test_their_own_error_stays_if_the_mode_is_forgotten() -> None:
    module, x, y = problem(5, 8, 6, 2)
    with pytest.raises(Exception, match=r"train mode"):
        train(module, ours(module, x, "SGD"), x, y, range(1))


@EACH
def test_a_plain_run_takes_up_a_checkpoint_of_ours(base: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    optimizer = ours(module, x, base)
    optimizer.train()
    train(module, optimizer, x, y, range(7))
    state = through_a_file(optimizer.state_dict())
    del state["equivalent_class"]
    plain = BASES[base](module.parameters())
    plain.load_state_dict(state)
    assert isinstance(plain, Optimizer)
    before = evaluated(module, optimizer, x, y)
    assert evaluated(module, plain, x, y) == pytest.approx(before, rel=1e-9)
    losses = train(module, plain, x, y, range(7, 31))
    assert all(torch.isfinite(torch.tensor(losses)))
