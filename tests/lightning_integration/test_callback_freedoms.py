"""Where the callback finds the freedoms, and what it says."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_ecopt import EquivalentClassOptimization, ScalingGroup
from tests.lightning_integration.callback_runs import FORMS, Level, TwoOptimizers, normalised
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    Batch,
    Classifier,
    batches,
    digits,
    fit,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    train_plainly,
    weights,
    wrapped,
)

# Where the freedoms are found -----------------------------------------------------------------------------------------


class Named(Classifier):
    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        return self.net(x * scale)


@pytest.mark.parametrize(
    "example",
    [None, torch.rand(3, 64), (torch.rand(3, 64),), [torch.rand(3, 64)], {"x": torch.rand(3, 64), "scale": 1.0}],
    ids=["first step", "tensor", "tuple", "list", "dictionary"],
)
def test_every_kind_of_example_and_the_first_step_give_the_same_weights(example: Any) -> None:
    callback, ours, reference = quiet(), Named(mlp(), example=example), Named(mlp(), example=EXAMPLE)
    fit(ours, callback)
    fit(reference, quiet())
    assert callback.group is not None
    assert callback.group.num_units == 32
    assert same(weights(ours), weights(reference))


def test_an_example_of_one_row_is_enough_for_batch_norm() -> None:
    # Lightning runs examples in evaluation mode, for its summary, where this works: in training mode a single row has
    # no variance, and the module refuses.
    callback, module, reference = quiet(), Classifier(normalised(), example=EXAMPLE), Classifier(normalised())
    fit(module, callback)
    fit(reference, quiet())
    assert callback.group is not None
    assert callback.group.num_units == 12
    assert module.training
    assert same(weights(module), weights(reference))


class Calls:
    """What is counted; an object of the user's, so that tracing does not put it back."""

    def __init__(self) -> None:
        self.real: list[bool] = []
        self.fake: list[bool] = []
        self.batches: list[tuple[int, float]] = []


class Counting(Classifier):
    """Keeps books outside of the module, which a trace would put back as they were."""

    def __init__(self, example: Tensor | None) -> None:
        super().__init__(nn.Sequential(mlp(), nn.Dropout(0.3)), example=example)
        self.calls = Calls()

    def forward(self, x: Tensor) -> Tensor:
        (self.calls.fake if isinstance(x, FakeTensor) else self.calls.real).append(self.training)
        return super().forward(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.calls.batches.append((batch_idx, float(batch[0].sum())))
        return super().training_step(batch, batch_idx)


@EXAMPLES
def test_no_batch_forward_pass_or_random_number_is_spent(example: Tensor | None) -> None:
    def run(*callbacks: Any) -> tuple[Calls, Tensor]:
        module = Counting(example)
        torch.manual_seed(1)
        fit(module, *callbacks, data=loader(shuffle=True))
        return module.calls, torch.get_rng_state()

    (calls, state), (expected, expected_state) = run(quiet()), run()
    assert len(expected.batches) == len(expected.real) == 8
    assert calls.batches == expected.batches
    assert calls.real == expected.real
    assert len(calls.fake) == (0 if example is None else 1)
    assert torch.equal(state, expected_state)


def test_the_group_can_be_reached_and_the_module_is_clean_after_fit() -> None:
    for example in (None, EXAMPLE):
        callback, module = quiet(), Classifier(example=example)
        assert callback.group is None
        fit(module, callback)
        group = callback.group
        assert isinstance(group, ScalingGroup)
        assert (group.num_parameters, group.num_units, group.dimension) == (1482, 32, 1450)
        assert is_clean(module)
        assert same(weights(copy.deepcopy(module)), weights(module))
        before = module(digits()[0])
        group.act_(torch.linspace(-1, 1, 32))
        torch.testing.assert_close(module(digits()[0]), before, rtol=1e-4, atol=1e-4)


@RULES
@pytest.mark.parametrize(
    ("refresh", "epochs", "steps"),
    [
        ("epoch", 3, [0, 4, 8]),
        ("auto", 33, [0, 128]),
        (3, 3, [0, 3, 6, 9]),
        (4, 3, [0, 4, 8]),
        (None, 3, [0]),
    ],
)
@EXAMPLES
def test_refreshes_come_when_they_are_due(
    monkeypatch: pytest.MonkeyPatch, refresh: Any, epochs: int, steps: list[int], example: Tensor | None, rule: str
) -> None:
    found: list[int] = []
    balance_ = ScalingGroup.balance_
    module = Classifier(mlp(), example=example)

    def spy(group: ScalingGroup, *args: Any) -> Tensor:
        found.append(module.trainer.global_step)
        return balance_(group, *args)

    monkeypatch.setattr(ScalingGroup, "balance_", spy)
    fit(module, quiet(rule=rule, refresh_interval=refresh), max_epochs=epochs)
    assert found == steps


class Switching(Classifier):
    """Sets another rule after the first epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers().rule = self.rule


@RULES
def test_a_rule_that_is_set_after_the_papers_has_the_defaults_of_the_callback(rule: str) -> None:
    ours, net = Switching(mlp()), mlp()
    ours.rule = rule
    run = fit(ours, quiet(rule="paper", max_path_ratio=None), max_epochs=3)
    (optimizer,) = run.optimizers
    assert (optimizer.rule, optimizer.refresh_interval, optimizer.representative) == (rule, "auto", "balanced")
    assert (optimizer.skeleton, optimizer.max_path_ratio, optimizer.free_start) == ("max", None, 2.0)
    plain = wrapped(net, sgd(net), rule="paper", max_path_ratio=None)
    train_plainly(
        net,
        plain,
        batches(),
        3,
        refresh_each_epoch=False,
        before_epoch=lambda epoch: setattr(plain, "rule", rule) if epoch else None,
    )
    assert same(weights(ours), weights(net))


@RULES
@pytest.mark.parametrize("refresh", [3, None])
def test_refreshes_that_are_counted_are_those_of_the_optimizer(refresh: int | None, rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule, refresh_interval=refresh))
    train_plainly(net, wrapped(net, sgd(net), rule=rule, refresh_interval=refresh), batches(), refresh_each_epoch=False)
    assert same(weights(ours), weights(net))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "path"},
        {"representative": "current"},
        {"rule": "path", "representative": "current"},
        {"rule": "path", "skeleton": "diagonal"},
        {"rule": "path", "max_path_ratio": 1.0001},
        {"rule": "path", "free_start": 5.0},
    ],
    ids=str,
)
def test_the_options_of_the_callback_reach_the_optimizer(options: dict[str, Any]) -> None:
    def unbalanced() -> nn.Sequential:
        net = mlp()
        with torch.no_grad():
            net[2].weight.mul_(0.2)
        return net

    *others, _ = options.items()
    ours, net, default = Classifier(unbalanced()), unbalanced(), Classifier(unbalanced())
    fit(ours, quiet(**options))
    fit(default, quiet(**dict(others)))
    train_plainly(net, wrapped(net, sgd(net), **options), batches())
    assert same(weights(ours), weights(net))
    assert not same(weights(ours), weights(default))


def test_the_guard_can_be_turned_off() -> None:
    run = fit(Classifier(), quiet(rule="path", max_path_ratio=None))
    assert run.optimizers[0].max_path_ratio is None


# What is said ---------------------------------------------------------------------------------------------------------


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("example", [None, EXAMPLE.expand(2, 64)], ids=["first step", "example"])
def test_the_table_is_printed_once_and_names_what_cost_freedoms(
    capsys: pytest.CaptureFixture[str], example: Tensor | None
) -> None:
    net = normalised()
    fit(Classifier(net, example=example), EquivalentClassOptimization(verbose="table"))
    said = _said(capsys)
    size = sum(p.numel() for p in net.parameters())
    assert said.count(f"m = {size} parameters, H = 12 freedoms, m - H = {size - 12}") == 1
    assert said.count("Operations that fix scales") == 1
    # The norm holds the scale of what it normalises.
    assert "native_batch_norm" in said
    assert "net.1" in said.split("Operations that fix scales")[1]
    assert "100.0% of the freedoms used, 0 units dormant" in said


@RULES
@EXAMPLES
def test_the_report_counts_the_units_that_are_dormant_when_training_starts(
    capsys: pytest.CaptureFixture[str], example: Tensor | None, rule: str
) -> None:
    net = mlp()
    nn.init.zeros_(net[4].weight)
    callback = EquivalentClassOptimization(rule=rule, refresh_interval=None)
    run = fit(Classifier(net, example=example), callback, log_every_n_steps=1)
    # No path leads through a layer of zeros, and none is chosen before a refresh.
    assert run.callback_metrics["ecopt/dormant_units"] == 32
    assert "16 + 16 freedoms in 3 layers, 0 of them used" in _said(capsys)


def test_nothing_is_printed_when_not_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(), EquivalentClassOptimization(verbose=False))
    assert "freedoms" not in _said(capsys)


def test_each_fit_has_its_own_report(capsys: pytest.CaptureFixture[str]) -> None:
    callback = EquivalentClassOptimization()
    fit(Classifier(), callback)
    assert "16 + 16 freedoms" in _said(capsys)
    fit(Classifier(mlp(width=8)), callback)
    assert "8 + 8 freedoms" in _said(capsys)


STATISTICS = {
    "unit": {"ecopt/clipped_share", "ecopt/dormant_units", "ecopt/violation"},
    "path": {
        "ecopt/min_path_value",
        "ecopt/max_path_value",
        "ecopt/guarded_paths",
        "ecopt/dormant_units",
        "ecopt/violation",
    },
}


def _logged(path: Path) -> list[dict[str, str]]:
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


@RULES
@EXAMPLES
def test_scalars_are_logged_with_the_logger_and_kept_as_metrics(
    tmp_path: Path, example: Tensor | None, rule: str
) -> None:
    run = fit(Classifier(example=example), quiet(rule=rule), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    rows = [row for row in _logged(tmp_path) if row["ecopt/dormant_units"]]
    assert [row["step"] for row in rows] == ["1", "3", "5", "7"]
    assert set(run.callback_metrics) == STATISTICS[rule]
    assert set(run.callback_metrics) <= set(rows[-1])
    last = {name: float(rows[-1][name]) for name in STATISTICS[rule]}
    statistics = run.optimizers[0].statistics()
    if rule == "path":
        assert 0 < last["ecopt/min_path_value"] < 1 < last["ecopt/max_path_value"]
    else:
        assert 0 < last["ecopt/clipped_share"] < 1
    expected = {f"ecopt/{name}": value for name, value in vars(statistics).items()}
    assert last == pytest.approx({**expected, "ecopt/violation": 0.0}, rel=1e-6)


@RULES
def test_each_of_two_optimizers_has_scalars_of_its_own(rule: str) -> None:
    run = fit(TwoOptimizers(), quiet(rule=rule), log_every_n_steps=1)
    expected = {name.replace("ecopt", f"ecopt/{number}") for name in STATISTICS[rule] for number in (0, 1)}
    assert set(run.callback_metrics) == expected


def test_nothing_is_logged_when_logging_is_off(tmp_path: Path) -> None:
    run = fit(Level(), quiet(log=False), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert set(run.callback_metrics) == {"level"}
    assert not [name for row in _logged(tmp_path) for name in row if name.startswith("ecopt")]


@pytest.mark.parametrize("form", ["optimizer", "dictionary with scheduler"])
def test_the_learning_rate_monitor_logs_one_rate_under_its_usual_name(tmp_path: Path, form: str) -> None:
    module = Classifier(mlp(), lambda m: FORMS[form](sgd(m)))
    fit(module, quiet(), LearningRateMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    names = {name for row in _logged(tmp_path) for name in row if name.startswith("lr")}
    assert names == {"lr-SGD"}
