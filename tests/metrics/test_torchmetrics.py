"""The metrics are metrics of torchmetrics."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_ecopt import ScalingGroup, scaling_group
from lightning_ecopt.metrics import EquivalentClassDistance, PathNorm, UnitImbalance
from tests.lightning_integration.modules import Classifier, fit, quiet, same, weights
from tests.metrics.cases import distance, imbalance, path_norm, zeros
from tests.networks import mlp


def all_metrics() -> MetricCollection:
    return MetricCollection(
        {
            "l1": PathNorm(1),
            "l2": PathNorm(2),
            "log": PathNorm(2, log=True),
            "imbalance": UnitImbalance(),
            "distance": EquivalentClassDistance(),
            "absolute": EquivalentClassDistance(relative=False),
        }
    )


def test_several_updates_are_averaged_until_a_reset() -> None:
    nets = [mlp(3, 4, 2).double() for _ in range(3)]
    values = [path_norm(net, zeros(1, 3)) for net in nets]
    metric = PathNorm(1)
    for net, value in zip(nets, values, strict=True):
        assert float(metric(net, zeros(1, 3))) == pytest.approx(value, rel=1e-15)
    assert float(metric.compute()) == pytest.approx(sum(values) / 3, rel=1e-14)
    metric.reset()
    metric.update(nets[1], zeros(1, 3))
    assert float(metric.compute()) == values[1]
    assert metric.compute().dtype is torch.float64


def test_a_collection_gives_each_metric_what_it_asks_for() -> None:
    net = mlp(3, 4, 2).double()
    # A single path: all norms are one, as the ratio is, and must not be taken for one metric.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight[0, 0] = net[2].weight[0, 0] = 1
    group = scaling_group(net, zeros(1, 3))
    reference = copy.deepcopy(net)
    with torch.no_grad():
        reference[2].weight[0, 0] = -1
    metrics = all_metrics()
    given = {"inputs": zeros(1, 3), "reference": reference, "group": group}
    metrics.update(model=net, **given)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {"l1": 1, "l2": 1, "log": 0, "imbalance": 1, "distance": 2**0.5, "absolute": 2}
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    metrics.reset()
    metrics.update(model=net, **given)
    values = {name: float(value) for name, value in metrics.compute().items()}
    norms = {f"l{p}": path_norm(net, zeros(1, 3), p) for p in (1, 2)}
    expected = {
        "log": math.log(norms["l2"]),
        "imbalance": imbalance(group),
        "distance": distance(net, reference, group, relative=True),
        "absolute": distance(net, reference, group),
    }
    assert values == pytest.approx({**norms, **expected}, rel=1e-12)
    assert len({round(value, 6) for value in values.values()}) == 6


def test_metrics_can_be_pickled_copied_moved_and_saved_with_a_module() -> None:
    net = mlp(3, 4, 2)
    given = {"model": net, "inputs": zeros(1, 3), "group": scaling_group(net, zeros(1, 3))}
    metrics = all_metrics()
    metrics.update(**given, reference=mlp(3, 4, 2))
    expected = metrics.compute()
    for other in (pickle.loads(pickle.dumps(metrics)), copy.deepcopy(metrics), metrics.clone(), metrics.to("cpu")):
        assert other.compute() == expected
    metrics.persistent(True)
    module = nn.ModuleDict({"net": net, "metrics": metrics})
    loaded = nn.ModuleDict({"net": mlp(3, 4, 2), "metrics": all_metrics()})
    loaded["metrics"].persistent(True)
    loaded.load_state_dict(module.state_dict())
    assert loaded["metrics"].compute() == expected
    assert list(module.parameters()) == list(net.parameters())
    half = copy.deepcopy(module).half()
    half["metrics"].reset()
    half["metrics"].update(**given, reference=net)
    assert half["metrics"]["l1"].compute() == expected["l1"]


class Monitored(Classifier):
    """A pipeline that logs all metrics, of its first call and at the end of every epoch."""

    def __init__(self, monitored: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.monitored = monitored
        self.group: ScalingGroup | None = None
        self.start = [copy.deepcopy(self.net)]  # in a list it is no submodule
        self.metrics = all_metrics()
        self.first: dict[str, Tensor] = {}

    def on_fit_start(self) -> None:
        dtype = next(self.parameters()).dtype
        self.start[0].to(dtype)
        self.group = scaling_group(self.net, torch.zeros(1, 64, dtype=dtype))

    def measure(self, images: Tensor) -> None:
        self.metrics.update(model=self.net, inputs=images, group=self.group, reference=self.start[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if self.monitored and not self.first:
            self.measure(batch[0])
            self.first = self.metrics.compute()
            self.metrics.reset()
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.monitored:
            self.measure(torch.zeros(1, 64, dtype=next(self.parameters()).dtype))
            self.log_dict(dict(self.metrics.items()))


@pytest.mark.parametrize("example", [None, torch.zeros(1, 64)], ids=["watched", "traced"])
def test_logged_next_to_the_callback_they_change_nothing(example: Tensor | None) -> None:
    runs = []
    for monitored in (False, True):
        seed_everything(3, verbose=False)
        module, callback = Monitored(monitored, example=example), quiet()
        run = fit(module, callback)
        runs.append((weights(module), callback.group.num_units, run.callback_metrics))
    assert runs[0][1] == runs[1][1] == 32
    assert same(runs[0][0], runs[1][0])
    logged = {name: float(value) for name, value in runs[1][2].items()}
    inputs = torch.zeros(1, 64)
    expected = {
        "l1": path_norm(module, inputs, 1),
        "l2": path_norm(module, inputs, 2),
        "log": math.log(path_norm(module, inputs, 2)),
        "imbalance": imbalance(module.group),
        "distance": distance(module.net, module.start[0], module.group, relative=True),
        "absolute": distance(module.net, module.start[0], module.group),
    }
    assert logged == pytest.approx(expected, rel=1e-6)
    assert expected["imbalance"] > 1.0001
    assert float(module.first["absolute"]) < 1e-4 < expected["distance"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_they_work_in_every_precision(precision: str) -> None:
    seed_everything(3, verbose=False)
    module = Monitored()
    run = fit(module, precision=precision, max_epochs=1, limit_train_batches=2)
    dtype = next(module.parameters()).dtype
    assert dtype is {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert float(run.callback_metrics["l1"]) == pytest.approx(path_norm(module.double(), torch.zeros(1, 64)), rel=1e-6)
    assert float(run.callback_metrics["imbalance"]) == pytest.approx(imbalance(module.group), rel=1e-6)
