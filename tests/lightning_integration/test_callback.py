"""One line in a Trainer puts the SGD of a pipeline into the equivalent-class space, and changes nothing else."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR

from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, ScalingGroup, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    RULES,
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
    sgd,
    train_plainly,
    trainer,
    weights,
    wrapped,
)


def _normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


# The forms that Lightning allows --------------------------------------------------------------------------------------


def _two_schedulers(base: SGD) -> Any:
    return [base], [StepLR(base, 1, 0.5), {"scheduler": ExponentialLR(base, 0.9), "interval": "step"}]


def _config(base: SGD, scheduler: Any, **config: Any) -> dict[str, Any]:
    return {"optimizer": base, "lr_scheduler": {"scheduler": scheduler, **config}}


FORMS = {
    "optimizer": lambda base: base,
    "list": lambda base: [base],
    "tuple": lambda base: (base,),
    "two lists": lambda base: ([base], [CosineAnnealingLR(base, 3)]),
    "two lists with config dictionary": _two_schedulers,
    "dictionary": lambda base: {"optimizer": base},
    "dictionary with scheduler": lambda base: {"optimizer": base, "lr_scheduler": StepLR(base, 1, 0.5)},
    "dictionary with step interval": lambda base: _config(base, ExponentialLR(base, 0.8), interval="step"),
    "dictionary with frequency": lambda base: _config(base, StepLR(base, 1, 0.5), interval="step", frequency=3),
    "plateau": lambda base: {
        "optimizer": base,
        "lr_scheduler": ReduceLROnPlateau(base, factor=0.5, patience=0),
        "monitor": "level",
    },
    "plateau config": lambda base: _config(
        base, ReduceLROnPlateau(base, factor=0.5, patience=0), monitor="level", interval="epoch"
    ),
    "tuple of dictionaries": lambda base: (_config(base, StepLR(base, 1, 0.5)),),
}
SCHEDULED = {name for name in FORMS if name not in ("optimizer", "list", "tuple", "dictionary")}


class Level(Classifier):
    """Logs a number that does not depend on the weights, for schedulers that watch one."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.log("level", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@RULES
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_configure_optimizers_takes_the_steps_of_a_plain_loop(
    form: str, example: Tensor | None, rule: str
) -> None:
    def module() -> Classifier:
        return Level(mlp(), lambda m: FORMS[form](sgd(m.net)), example)

    without, found = Rates(), Rates()
    fit(module(), without, max_epochs=3)
    ours = module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        fit(ours, quiet(rule=rule), found, max_epochs=3)
    assert found.steps == without.steps
    assert (len(set(map(tuple, found.steps))) > 1) == (form in SCHEDULED)

    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), epochs=3, rates=without.steps)
    assert same(weights(ours), weights(net))
    plain = module()
    fit(plain, max_epochs=3)
    assert not same(weights(ours), weights(plain))


@RULES
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.0, "weight_decay": 1e-2},
        {"lr": 0.01, "maximize": True},
        {"foreach": True},
    ],
    ids=str,
)
def test_the_options_of_sgd_are_kept(options: dict[str, Any], rule: str) -> None:
    ours = Classifier(mlp(), lambda m: sgd(m.net, **options))
    run = fit(ours, quiet(rule=rule))
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    group = run.optimizers[0].param_groups[0]
    assert {name: group[name] for name in options} == options
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net, **options), rule=rule), batches())
    assert same(weights(ours), weights(net))


@RULES
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_and_its_options_are_kept(kind: type[Adam], rule: str) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True}
    ours = Classifier(mlp(), lambda m: kind(m.net.parameters(), **options))
    run = fit(ours, quiet(rule=rule))
    assert type(run.optimizers[0].optimizer) is kind
    group = run.optimizers[0].param_groups[0]
    assert {name: group[name] for name in options} == options
    net, plain = mlp(), Classifier(mlp(), lambda m: kind(m.net.parameters(), **options))
    train_plainly(net, wrapped(net, kind(net.parameters(), **options), rule=rule), batches())
    assert same(weights(ours), weights(net))
    fit(plain)
    assert not same(weights(ours), weights(plain))


@RULES
def test_parameter_groups_keep_their_own_rates_and_decay(rule: str) -> None:
    def base(net: nn.Sequential) -> SGD:
        groups = [
            {"params": net[0].parameters(), "weight_decay": 0.1},
            {"params": net[2].parameters(), "lr": 0.02, "momentum": 0.5},
            {"params": net[4].parameters()},
        ]
        return SGD(groups, lr=0.1, momentum=0.9)

    ours, found = Classifier(mlp(), lambda m: FORMS["dictionary with scheduler"](base(m.net)), EXAMPLE), Rates()
    fit(ours, quiet(rule=rule), found)
    assert found.steps == [[0.1, 0.02, 0.1]] * 4 + [[0.05, 0.01, 0.05]] * 4
    net = mlp()
    train_plainly(net, wrapped(net, base(net), rule=rule), batches(), rates=found.steps)
    assert same(weights(ours), weights(net))


class TwoOptimizers(Classifier):
    """Manual optimization: the halves of a deeper network have an optimizer each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(12, 10)), example=EXAMPLE)
        self.automatic_optimization = False

    def bases(self) -> tuple[SGD, SGD]:
        return sgd(self.net[:4]), sgd(self.net[4:], lr=0.05)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers() or []:
                scheduler.step()

    def configure_optimizers(self) -> Any:
        return self.bases()


class TwoDictionaries(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        return tuple(_config(base, StepLR(base, 1, 0.5)) for base in self.bases())


class TwoLists(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        bases = list(self.bases())
        return bases, [StepLR(base, 1, 0.5) for base in bases]


@RULES
@pytest.mark.parametrize("kind", [TwoOptimizers, TwoDictionaries, TwoLists])
def test_two_optimizers_under_manual_optimization_take_the_steps_of_a_plain_loop(
    kind: type[TwoOptimizers], rule: str
) -> None:
    ours, found = kind(), Rates()
    run = fit(ours, quiet(rule=rule), found)
    decay = 1 if kind is TwoOptimizers else 0.5
    assert found.steps == [[0.1, 0.05]] * 4 + [[0.1 * decay, 0.05 * decay]] * 4
    assert all(isinstance(optimizer, EquivalentClassOptimizer) for optimizer in run.optimizers)

    twin = TwoOptimizers()
    group = scaling_group(twin.net, EXAMPLE)
    pair = [EquivalentClassOptimizer(base, group, rule=rule, refresh_interval=None) for base in twin.bases()]
    for epoch in range(2):
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] *= decay**epoch
            if epoch > 0:
                optimizer.refresh()
        for x, y in batches():
            for optimizer in pair:
                optimizer.zero_grad()
            F.cross_entropy(twin.net(x), y).backward()
            for optimizer in pair:
                optimizer.step()
    # 12 units in the middle touch both optimizers, the others are one's own.
    assert group.num_units == 36
    assert [int(optimizer.usable_units().sum()) for optimizer in pair] == [12, 12]
    assert same(weights(ours), weights(twin))


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
    callback, module, reference = quiet(), Classifier(_normalised(), example=EXAMPLE), Classifier(_normalised())
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


@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
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
@pytest.mark.parametrize(("refresh", "steps"), [("epoch", [0, 4, 8]), (3, [0, 3, 6, 9]), (4, [0, 4, 8]), (None, [0])])
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
def test_refreshes_come_when_they_are_due(
    monkeypatch: pytest.MonkeyPatch, refresh: Any, steps: list[int], example: Tensor | None, rule: str
) -> None:
    found: list[int] = []
    balance_ = ScalingGroup.balance_
    module = Classifier(mlp(), example=example)

    def spy(group: ScalingGroup, *args: Any) -> Tensor:
        found.append(module.trainer.global_step)
        return balance_(group, *args)

    monkeypatch.setattr(ScalingGroup, "balance_", spy)
    fit(module, quiet(rule=rule, refresh=refresh), max_epochs=3)
    assert found == steps


@RULES
@pytest.mark.parametrize("refresh", [3, None])
def test_refreshes_that_are_counted_are_those_of_the_optimizer(refresh: int | None, rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule, refresh=refresh))
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
def test_the_report_is_printed_once_and_names_what_cost_freedoms(
    capsys: pytest.CaptureFixture[str], example: Tensor | None
) -> None:
    net = _normalised()
    fit(Classifier(net, example=example), EquivalentClassOptimization())
    said = _said(capsys)
    size = sum(p.numel() for p in net.parameters())
    assert said.count(f"m = {size} parameters, H = 12 freedoms, m - H = {size - 12}") == 1
    assert said.count("Operations that fix scales") == 1
    # The norm holds the scale of what it normalises.
    assert "native_batch_norm" in said
    assert "net.1" in said.split("Operations that fix scales")[1]
    assert "100.0% of the freedoms used, 0 units dormant" in said


@RULES
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
def test_the_report_counts_the_units_that_are_dormant_when_training_starts(
    capsys: pytest.CaptureFixture[str], example: Tensor | None, rule: str
) -> None:
    net = mlp()
    nn.init.zeros_(net[4].weight)
    callback = EquivalentClassOptimization(rule=rule, refresh=None)
    run = fit(Classifier(net, example=example), callback, log_every_n_steps=1)
    # No path leads through a layer of zeros, and none is chosen before a refresh.
    assert run.callback_metrics["ecopt/dormant_units"] == 32
    assert "0.0% of the freedoms used, 32 units dormant" in _said(capsys)


def test_nothing_is_printed_when_not_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(), EquivalentClassOptimization(verbose=False))
    assert "freedoms" not in _said(capsys)


def test_each_fit_has_its_own_report(capsys: pytest.CaptureFixture[str]) -> None:
    callback = EquivalentClassOptimization()
    fit(Classifier(), callback)
    assert "m = 1,482 parameters, H = 32 freedoms" in _said(capsys)
    fit(Classifier(mlp(width=8)), callback)
    assert "m = 682 parameters, H = 16 freedoms" in _said(capsys)


STATISTICS = {
    "unit": {"ecopt/clipped", "ecopt/dormant_units"},
    "path": {"ecopt/min_beta", "ecopt/max_beta", "ecopt/guarded_paths", "ecopt/dormant_units"},
}


def _logged(path: Path) -> list[dict[str, str]]:
    (file,) = path.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


@RULES
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
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
        assert 0 < last["ecopt/min_beta"] < 1 < last["ecopt/max_beta"]
    else:
        assert 0 < last["ecopt/clipped"] < 1
    assert last == pytest.approx({f"ecopt/{name}": value for name, value in vars(statistics).items()}, rel=1e-6)


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


# The rest of the Trainer ----------------------------------------------------------------------------------------------


@RULES
def test_gradients_are_accumulated_and_clipped_as_ever(rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule), accumulate_grad_batches=2, gradient_clip_val=0.05)
    optimizer = wrapped(net, sgd(net), rule=rule)
    for epoch in range(2):
        if epoch:
            optimizer.refresh()
        data = batches()
        for pair in (data[:2], data[2:]):
            optimizer.zero_grad()
            for x, y in pair:
                (F.cross_entropy(net(x), y) / 2).backward()
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05
            optimizer.step()
    assert same(weights(ours), weights(net))


class Evaluated(Classifier):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])


def test_validation_testing_and_prediction_are_left_alone() -> None:
    def evaluate(*callbacks: Any) -> tuple[Any, ...]:
        module, run = Evaluated(mlp()), trainer(*callbacks)
        results = run.validate(module, loader(), verbose=False), run.test(module, loader(), verbose=False)
        return *results, torch.cat(run.predict(module, loader())), weights(module), is_clean(module)

    callback = EquivalentClassOptimization()
    *ours, found = evaluate(callback)
    *plain, expected = evaluate()
    assert ours[:2] == plain[:2]
    assert torch.equal(ours[2], plain[2])
    assert same(ours[3], plain[3])
    assert found
    assert expected
    assert callback.group is None


def test_validation_during_fit_changes_nothing() -> None:
    ours, reference = Evaluated(mlp()), Classifier(mlp())
    run = trainer(quiet(), val_check_interval=2)
    run.fit(ours, loader(), loader(1))
    fit(reference, quiet())
    assert same(weights(ours), weights(reference))


def test_one_callback_serves_several_fits() -> None:
    callback = quiet()
    fit(Classifier(mlp(seed=3, width=8)), callback)
    second, reference = Classifier(mlp()), Classifier(mlp())
    fit(second, callback)
    fit(reference, quiet())
    assert same(weights(second), weights(reference))
    assert callback.group is not None
    assert callback.group.num_units == 32


@RULES
def test_one_trainer_fits_the_same_module_again(rule: str) -> None:
    module, run = Classifier(mlp()), trainer(quiet(rule=rule))
    run.fit(module, loader())
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    run.fit_loop.max_epochs = 4
    run.fit(module, loader())
    # configure_optimizers is called again, so momentum starts anew.
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(module), weights(net))
    assert is_clean(module)


@RULES
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
def test_a_fast_dev_run_takes_its_one_step(example: Tensor | None, rule: str) -> None:
    module, net = Classifier(mlp(), example=example), mlp()
    fit(module, quiet(rule=rule), fast_dev_run=True)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(count=1), epochs=1)
    assert same(weights(module), weights(net))
    assert is_clean(module)


class SkipsFirst(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.current_epoch == 0 and batch_idx == 0:
            return None
        return super().training_step(batch, batch_idx)


@RULES
def test_the_first_batch_may_be_skipped(rule: str) -> None:
    callback, module, net = quiet(rule=rule), SkipsFirst(mlp()), mlp()
    fit(module, callback, log_every_n_steps=1, max_epochs=1)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches()[1:], epochs=1)
    assert same(weights(module), weights(net))
    assert callback.group is not None
    assert is_clean(module)


class Raises(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.net(batch[0])
        raise ArithmeticError("the user's own")


@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
def test_a_training_step_that_raises_leaves_the_module_clean(example: Tensor | None) -> None:
    module, before = Raises(mlp(), example=example), weights(mlp())
    with pytest.raises(ArithmeticError, match="the user's own"):
        fit(module, quiet())
    assert is_clean(module)
    assert same(weights(module), before)


def test_a_fit_without_a_step_leaves_the_module_clean() -> None:
    module = Classifier(mlp())
    fit(module, quiet(), max_epochs=0)
    assert is_clean(module)
    assert same(weights(module), weights(mlp()))


class OwnStep(Classifier):
    """Sets ``training_step`` on the instance, as some users do."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.training_step = self.other_step

    def other_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_training_step_of_the_instance_is_watched_and_kept() -> None:
    module, reference, callback = OwnStep(), Classifier(mlp()), quiet()
    own = vars(module)["training_step"]
    fit(module, callback)
    fit(reference, quiet())
    assert callback.group is not None
    assert vars(module)["training_step"] == own
    assert same(weights(module), weights(reference))


@RULES
def test_frozen_parameters_are_not_rescaled(rule: str) -> None:
    def frozen() -> nn.Sequential:
        net = mlp()
        net[0].requires_grad_(False)
        return net

    module, callback = Classifier(frozen()), quiet(rule=rule)
    fit(module, callback)
    assert callback.group is not None
    assert callback.group.num_units == 16
    assert same(weights(module.net[0]), weights(mlp()[0]))
    assert not same(weights(module.net[2]), weights(mlp()[2]))


# The promise ----------------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
@pytest.mark.parametrize("network", [mlp, _normalised], ids=["mlp", "batch norm"])
def test_two_members_of_a_class_end_in_the_same_function(network: Any, example: Tensor | None, rule: str) -> None:
    images = digits()[0].double()

    def run(log_scale: Tensor, *callbacks: Any) -> Tensor:
        net = network().double()
        scaling_group(net, images[:2]).act_(log_scale)
        start = net.eval()(images).detach()
        module = Classifier(net, lambda m: sgd(m, weight_decay=1e-3), example)
        fit(module, *callbacks, precision="64-true", max_epochs=5, data=loader(8))
        return torch.stack([start, net.eval()(images).detach()])

    units = scaling_group(network(), EXAMPLE.expand(2, 64)).num_units
    torch.manual_seed(5)
    log_scale = torch.randn(units)
    (start, ours), (start_too, ours_too) = run(torch.zeros(units), quiet(rule=rule)), run(log_scale, quiet(rule=rule))
    torch.testing.assert_close(start, start_too, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, ours_too, rtol=0, atol=1e-8)
    # What is compared moves, and plain SGD tells the two apart.
    assert (ours - start).abs().max() > 1
    assert (run(torch.zeros(units))[1] - run(log_scale)[1]).abs().max() > 1e-2


@RULES
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_depends_on_the_class_alone_where_the_example_is_traced(algorithm: str, rule: str) -> None:
    torch.manual_seed(0)
    ends = []
    for spread in (0.0, 1.0):
        net = mlp().double()
        group = scaling_group(net, EXAMPLE.double())
        group.act_(spread * torch.randn(group.num_units, dtype=torch.float64))
        module = Classifier(net, example=EXAMPLE.double())
        options = {"gradient_clip_val": 0.002, "gradient_clip_algorithm": algorithm}
        fit(module, quiet(rule=rule), precision="64-true", **options)
        ends.append(net(digits()[0].double()).detach())
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-10
    start = mlp().double()(digits()[0].double()).detach()
    assert float((ends[0] - start).norm() / start.norm()) > 1e-3
