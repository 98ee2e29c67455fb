"""The callback from the command line and from a configuration file."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, ScalingGroup
from tests.lightning_integration.modules import RULES, Classifier, fit, loader, mlp, same, sgd, weights

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
        "--trainer.callbacks.refresh=3",
        "--trainer.callbacks.representative=current",
        "--trainer.callbacks.verbose=false",
    ],
    "path": [
        f"--trainer.callbacks+={NAME}",
        "--trainer.callbacks.rule=path",
        "--trainer.callbacks.refresh=3",
        "--trainer.callbacks.max_path_ratio=1.5",
        "--trainer.callbacks.free_start=0.5",
        "--trainer.callbacks.skeleton=diagonal",
        "--trainer.callbacks.verbose=false",
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "unit": {"rule": "unit", "refresh": 3, "representative": "current", "verbose": False},
    "path": {
        "rule": "path",
        "refresh": 3,
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
    flags = [f"--trainer.callbacks.rule={rule}", f"--trainer.callbacks.refresh={spelled}"]
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


@pytest.mark.parametrize(
    "option", ["rule=paths", "refresh=often", "skeleton=none", "max_path_ratio=wide", "max_path_ratio=0.5"]
)
def test_wrong_options_are_refused_with_their_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        cli("fit", *QUIET, f"--trainer.callbacks+={NAME}", f"--trainer.callbacks.{option}")
    assert option.partition("=")[0] in capsys.readouterr().err + str(refused.value)
