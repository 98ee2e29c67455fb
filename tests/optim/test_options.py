"""Options stand in several signatures, for people and for command lines; all of them say the same."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from torch import nn

from lightning_ecopt import (
    ECSGD,
    ECAdamW,
    ECMuon,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    MuonAdamW,
    ec_adamw,
    ec_muon,
    ec_sgd,
)
from lightning_ecopt.optim.named import AdamWArguments, MuonArguments, SGDArguments
from lightning_ecopt.optim.options import OptionArguments, Options, interval_is_over
from tests.optim.training import needs_muon

NAMES = [field.name for field in fields(Options)]


@pytest.mark.parametrize("kind", [EquivalentClassOptimizer, ECSGD, ECAdamW, ECMuon, EquivalentClassOptimization])
def test_defaults_and_types_are_those_of_the_options(kind: Any) -> None:
    parameters, hints = inspect.signature(kind).parameters, get_type_hints(kind.__init__)
    its_own, options = get_type_hints(Options), Options()
    for name in NAMES:
        assert (parameters[name].default or {}) == (getattr(options, name) or {})
        assert hints[name] == its_own[name]


@pytest.mark.parametrize("length", [1, 28, 127, 128, 129, 200, None])
def test_automatic_refreshes_come_with_epochs_and_not_too_often(length: int | None) -> None:
    refreshes, last, before = [0], 0, 0 if length else None
    for step in range(1, 2000):
        epoch = None if length is None else step // length
        if interval_is_over("auto", step - last, before, epoch):
            refreshes, last = [*refreshes, step], step
        before = epoch
    apart = 500 if length is None else length * math.ceil(128 / length)
    assert refreshes == list(range(0, 2000, apart))


OPTIMIZERS = [EquivalentClassOptimizer, ECSGD, ECAdamW, ECMuon, MuonAdamW, ec_sgd, ec_adamw, ec_muon]


@pytest.mark.parametrize("kind", [Options, EquivalentClassOptimization, *OPTIMIZERS])
def test_every_option_has_a_sentence(kind: Any) -> None:
    documented = inspect.getdoc(kind) or ""
    for name, parameter in inspect.signature(kind).parameters.items():
        stars = "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""
        assert f"\n    {stars}{name}: " in documented, name


def test_keyword_arguments_for_type_checkers_are_those_of_the_classes() -> None:
    assert set(OptionArguments.__annotations__) == set(NAMES)
    for arguments, kind in ((SGDArguments, ECSGD), (AdamWArguments, ECAdamW), (MuonArguments, ECMuon)):
        own = set(inspect.signature(kind).parameters) - {"params", "lr"}
        assert {name for base in arguments.__mro__ for name in getattr(base, "__annotations__", {})} | set(NAMES) == own


@pytest.mark.parametrize("make", [ec_sgd, ec_adamw, pytest.param(ec_muon, marks=needs_muon)])
def test_a_misspelt_option_is_an_error(make: Any) -> None:
    with pytest.raises(TypeError, match="momentun"):
        make(nn.Linear(2, 2), lr=0.1, momentun=0.9)


CALLS = """
import torch
from lightning_ecopt import ECSGD, ECAdamW, ECMuon, EquivalentClassOptimization, ec_adamw, ec_muon, ec_sgd

net = torch.nn.Linear(2, 2)
ec_sgd(net, lr=0.1, momentum=0.9, rule="path")
ec_adamw(net, lr=0.1, betas=(0.9, 0.99), refresh_interval=None)
ECSGD(net.parameters(), lr=0.1, implementation="eager")
ec_sgd(net, lr=0.1, momentun=0.9)  # wrong
ec_adamw(net, lr=0.1, rule="paths")  # wrong
ECSGD(net.parameters(), refresh=5)  # wrong
ECAdamW(net.parameters(), lr="0.1")  # wrong
ec_muon(net, lr=0.1, adjust_lr_fn="original", rule="unit")
ec_muon(net, lr=0.1, maximize=True)  # wrong
ECMuon(net.parameters(), adjust_lr_fn="rms")  # wrong
EquivalentClassOptimization(interval=5)  # wrong
"""


@pytest.mark.full
def test_a_misspelt_option_is_an_error_for_mypy(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "calls.py"
    program.write_text(CALLS)
    told, _, _ = api.run(["--no-error-summary", str(program)])
    found = {int(line.split(":")[1]) for line in told.splitlines() if ": error: " in line}
    assert found == {number for number, line in enumerate(CALLS.splitlines(), 1) if "# wrong" in line}, told
