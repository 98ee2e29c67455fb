"""``log="layers"``: what the callback logs of each layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimization, ScalingGroup
from tests.lightning_integration.modules import EXAMPLE, RULES, Classifier, loader, mlp, sgd, trainer


class Kept(Logger):
    """Keeps what is logged, by step."""

    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


def logged(
    module: LightningModule, callback: EquivalentClassOptimization, **options: Any
) -> dict[int, dict[str, float]]:
    kept = Kept()
    trainer(callback, logger=kept, **{"log_every_n_steps": 1, "max_epochs": 1, **options}).fit(module, loader(6))
    return kept.steps


@RULES
def test_each_layer_has_its_numbers(rule: Any) -> None:
    steps = logged(Classifier(example=EXAMPLE), EquivalentClassOptimization(rule, log="layers", verbose=False))
    expected = {
        *(f"ecopt/relative_step/net.{number}" for number in (0, 2, 4)),
        *(f"ecopt/clipped/net.{number}" for number in (0, 2, 4) if rule == "unit"),
        *(f"ecopt/imbalance/net.{number}" for number in (0, 2)),
    }
    assert list(steps) == list(range(6))
    for values in steps.values():
        assert {name for name in values if name.count("/") == 2} == expected
        assert all(0 < values[f"ecopt/relative_step/net.{number}"] < 1 for number in (0, 2, 4))
        assert all(values[f"ecopt/imbalance/net.{number}"] >= 1 for number in (0, 2))
    assert any("violation" in name for name in steps[5])


@pytest.mark.parametrize("log", [True, False])
def test_layers_are_logged_on_request(log: bool) -> None:
    steps = logged(Classifier(), EquivalentClassOptimization(log=log, verbose=False))
    assert not [name for values in steps.values() for name in values if name.count("/") == 2]


def test_steps_that_are_not_logged_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    measure = ScalingGroup.imbalances

    def counted(self: ScalingGroup) -> torch.Tensor:
        nonlocal count
        count += 1
        return measure(self)

    monkeypatch.setattr(ScalingGroup, "imbalances", counted)
    callback = EquivalentClassOptimization(log="layers", verbose=False)
    steps = logged(Classifier(example=EXAMPLE), callback, log_every_n_steps=3)
    assert count == 2
    assert list(steps) == [2, 5]


def test_accumulated_gradients_and_clipping() -> None:
    callback = EquivalentClassOptimization(log="layers", verbose=False)
    steps = logged(Classifier(example=EXAMPLE), callback, accumulate_grad_batches=2, gradient_clip_val=1.0)
    lengths = [values["ecopt/relative_step/net.0"] for values in steps.values()]
    assert len(set(lengths)) == 3  # each of its own step


class Halves(Classifier):
    """Two optimizers under manual optimization, which step in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [sgd(self.net), sgd(self.other)]


def test_several_optimizers_have_numbers_of_their_own() -> None:
    steps = logged(Halves(), EquivalentClassOptimization(log="layers", verbose=False))
    names = {name for name in steps[5] if name.startswith("ecopt/") and "relative_step" in name}
    assert names == {
        *(f"ecopt/0/relative_step/net.{number}" for number in (0, 2, 4)),
        *(f"ecopt/1/relative_step/other.{number}" for number in (0, 2)),
    }


def test_logging_changes_no_step() -> None:
    weights = []
    for log in (True, "layers"):
        module = Classifier(mlp(), example=EXAMPLE)
        logged(module, EquivalentClassOptimization(log=log, verbose=False))  # type: ignore[arg-type]
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log must be True, False or 'layers', got 'all'"):
        EquivalentClassOptimization(log="all")  # type: ignore[arg-type]
