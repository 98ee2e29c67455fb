"""The callback and the optimizers from the command line and from a configuration file."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional as F

from lightning_ecopt import (
    ECSGD,
    ECAdamW,
    ECMuon,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    ScalingGroup,
    ec_muon,
    ec_sgd,
)
from tests.lightning_integration.modules import RULES, Batch, Classifier, fit, loader, mlp, same, sgd, weights
from tests.optim.training import needs_muon

NAME = "lightning_ecopt.EquivalentClassOptimization"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.max_epochs=2",
]
FLAGS = {
    "unit": [
        f"--trainer.callbacks+={NAME}",
        "--trainer.callbacks.rule=unit",
        "--trainer.callbacks.refresh_interval=3",
        "--trainer.callbacks.representative=current",
        "--trainer.callbacks.implementation=wrapped",
        "--trainer.callbacks.verbose=false",
    ],
    "path": [
        f"--trainer.callbacks+={NAME}",
        "--trainer.callbacks.rule=path",
        "--trainer.callbacks.refresh_interval=3",
        "--trainer.callbacks.max_path_ratio=1.5",
        "--trainer.callbacks.free_start=0.5",
        "--trainer.callbacks.skeleton=diagonal",
        "--trainer.callbacks.verbose=false",
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "unit": {
        "rule": "unit",
        "refresh_interval": 3,
        "representative": "current",
        "implementation": "wrapped",
        "verbose": False,
    },
    "path": {
        "rule": "path",
        "refresh_interval": 3,
        "max_path_ratio": 1.5,
        "free_start": 0.5,
        "skeleton": "diagonal",
        "verbose": False,
    },
}


class Pipeline(Classifier):
    """A module as a command line can make it."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(mlp(), lambda m: sgd(m, lr=rate))

    def train_dataloader(self) -> Any:
        return loader()


def cli(*args: str, run: bool = True) -> LightningCLI:
    return LightningCLI(Pipeline, args=list(args), run=run, save_config_callback=None, seed_everything_default=0)


def _callback(made: LightningCLI) -> EquivalentClassOptimization:
    (callback,) = [one for one in made.trainer.callbacks if isinstance(one, EquivalentClassOptimization)]
    return callback


def _expected(rule: str) -> list[torch.Tensor]:
    module = Pipeline()
    fit(module, EquivalentClassOptimization(**OPTIONS[rule]))
    return weights(module)


@RULES
def test_flags_add_the_callback_with_its_options_to_a_run(rule: str) -> None:
    made = cli("fit", *QUIET, *FLAGS[rule])
    assert isinstance(made.trainer.optimizers[0], EquivalentClassOptimizer)
    assert _callback(made).group is not None
    assert same(weights(made.model), _expected(rule))


@RULES
def test_a_file_adds_the_callback_with_its_options_to_a_run(tmp_path: Path, rule: str) -> None:
    path = tmp_path / "config.yaml"
    config = {"trainer": {"callbacks": [{"class_path": NAME, "init_args": OPTIONS[rule]}]}}
    path.write_text(yaml.safe_dump(config))
    made = cli("fit", "--config", str(path), *QUIET)
    assert same(weights(made.model), _expected(rule))


@RULES
@pytest.mark.parametrize(("spelled", "refreshes"), [("epoch", 2), ("null", 1), ("4", 2), ("3", 3)])
def test_refresh_is_a_word_a_number_or_null(
    monkeypatch: pytest.MonkeyPatch, spelled: str, refreshes: int, rule: str
) -> None:
    flags = [f"--trainer.callbacks.rule={rule}", f"--trainer.callbacks.refresh_interval={spelled}"]
    made = cli(*QUIET, f"--trainer.callbacks+={NAME}", *flags, run=False)
    found: list[int] = []
    balance_ = ScalingGroup.balance_

    def spy(group: ScalingGroup, *args: Any) -> torch.Tensor:
        found.append(made.trainer.global_step)
        return balance_(group, *args)

    monkeypatch.setattr(ScalingGroup, "balance_", spy)
    made.trainer.fit(made.model)
    assert len(found) == refreshes


@RULES
def test_the_printed_configuration_shows_the_callback_and_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli("fit", *QUIET, *FLAGS[rule], "--print_config")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    (entry,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert entry["class_path"] == NAME
    defaults = {name: one.default for name, one in signature(EquivalentClassOptimization).parameters.items()}
    assert defaults.keys() > OPTIONS[rule].keys()
    assert entry["init_args"] == {**defaults, **OPTIONS[rule]}
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert same(weights(cli("fit", "--config", str(path)).model), _expected(rule))


PAPER: dict[str, Any] = {
    "rule": "path",
    "refresh_interval": None,
    "representative": "current",
    "skeleton": "diagonal",
    "max_path_ratio": None,
    "free_start": 1.0,
}


def test_the_papers_setting_has_one_word_that_a_printed_configuration_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--trainer.callbacks+={NAME}", "--trainer.callbacks.rule=paper", "--trainer.callbacks.verbose=false"]
    with pytest.raises(SystemExit):
        cli("fit", *QUIET, *flags, "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)  # with the defaults of all other options
    made = cli("fit", "--config", str(path))
    optimizer = made.trainer.optimizers[0]
    assert {name: getattr(optimizer, name) for name in PAPER} == PAPER
    module = Pipeline()
    fit(module, EquivalentClassOptimization(**PAPER, verbose=False))
    assert same(weights(made.model), weights(module))
    assert not same(weights(made.model), _expected("path"))


@pytest.mark.parametrize(
    "option", ["rule=paths", "refresh_interval=often", "skeleton=none", "max_path_ratio=wide", "max_path_ratio=0.5"]
)
def test_wrong_options_are_refused_with_their_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        cli("fit", *QUIET, f"--trainer.callbacks+={NAME}", f"--trainer.callbacks.{option}")
    assert option.partition("=")[0] in capsys.readouterr().err + str(refused.value)


# The optimizer by its name -------------------------------------------------------------------------------------------


class WithoutOptimizer(LightningModule):
    """A module that leaves its optimizer to the command line."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader()


NAMED = ["--optimizer=lightning_ecopt.ECSGD", "--optimizer.lr=0.1", "--optimizer.momentum=0.9"]


def named(*args: str, kind: type[LightningCLI] = LightningCLI) -> LightningCLI:
    return kind(WithoutOptimizer, args=list(args), save_config_callback=None, seed_everything_default=0)


def _in_code(refresh_interval: int | None, rule: str) -> list[torch.Tensor]:
    module = Pipeline()
    module._configure = lambda m: ec_sgd(m, lr=0.1, momentum=0.9, rule=rule, refresh_interval=refresh_interval)
    fit(module)
    return weights(module)


@needs_muon
@pytest.mark.parametrize("bound", ["by the callback", "by the first step"])
def test_muon_by_name_is_muon_in_code(bound: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"optimizer": {"class_path": "lightning_ecopt.ECMuon", "init_args": {"lr": 0.02}}}
    if bound == "by the callback":
        config["trainer"] = {"callbacks": [{"class_path": NAME, "init_args": {"verbose": False}}]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    made = named("fit", "--config", str(path), *QUIET)
    assert type(made.trainer.optimizers[0]) is ECMuon
    module = Pipeline()
    module._configure = lambda m: ec_muon(m, lr=0.02)
    fit(module)
    assert same(weights(made.model), weights(module))


@RULES
def test_an_optimizer_by_name_is_bound_by_the_first_step(rule: str) -> None:
    made = named("fit", *QUIET, *NAMED, f"--optimizer.rule={rule}", "--optimizer.refresh_interval=3")
    assert type(made.trainer.optimizers[0]) is ECSGD
    assert same(weights(made.model), _in_code(3, rule))


def test_an_optimizer_by_name_takes_the_word_for_the_papers_setting() -> None:
    optimizer = named("fit", *QUIET, *NAMED, "--optimizer.rule=paper").trainer.optimizers[0]
    assert {name: getattr(optimizer, name) for name in PAPER} == PAPER
    with pytest.raises(ValueError, match=r"rule='paper' sets free_start to 1\.0, got 3\.0"):
        named("fit", *QUIET, *NAMED, "--optimizer.rule=paper", "--optimizer.free_start=3.0")


def test_an_optimizer_by_name_is_bound_by_the_callback_and_keeps_its_options() -> None:
    flags = [
        f"--trainer.callbacks+={NAME}",
        "--trainer.callbacks.verbose=false",
        "--trainer.callbacks.refresh_interval=null",
    ]
    made = named("fit", *QUIET, *NAMED, "--optimizer.rule=path", "--optimizer.refresh_interval=3", *flags)
    assert made.trainer.optimizers[0].group is _callback(made).group
    assert same(weights(made.model), _in_code(3, "path"))


def test_the_printed_configuration_of_a_named_optimizer_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    with pytest.raises(SystemExit):
        named("fit", *QUIET, *NAMED, *scheduler, "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    entry = yaml.safe_load(path.read_text())["optimizer"]
    assert entry["class_path"] == "lightning_ecopt.ECSGD"
    own, options = (signature(kind).parameters.keys() for kind in (ECSGD, EquivalentClassOptimizer))
    assert entry["init_args"].keys() == (own | options) - {"params", "optimizer", "group", "options"}
    made = named("fit", "--config", str(path))
    assert same(weights(made.model), weights(named("fit", *QUIET, *NAMED, *scheduler).model))
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


class Linked(LightningCLI):
    """One number sets the rate of the optimizer, and one the refreshes of the callback."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args(ECAdamW)
        parser.add_lightning_class_args(EquivalentClassOptimization, "ecopt")
        parser.add_argument("--every", type=int, default=2)
        parser.link_arguments("model.rate", "optimizer.lr")
        parser.link_arguments("every", "ecopt.refresh_interval")


def test_arguments_can_be_linked() -> None:
    made = named("fit", *QUIET, "--model.rate=0.003", "--every=7", "--ecopt.verbose=false", kind=Linked)
    assert type(made.trainer.optimizers[0]) is ECAdamW
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == 0.003
    assert _callback(made)._options.refresh_interval == 7


@pytest.mark.parametrize("option", ["rule=paths", "free_start=-1", "nesterov=maybe"])
def test_wrong_options_of_a_named_optimizer_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        named("fit", *QUIET, *NAMED, f"--optimizer.{option}")
    assert option.partition("=")[0] in capsys.readouterr().err + str(refused.value)
