"""Calls with arguments of another kind are errors that say what was meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_ecopt import (
    ECSGD,
    ECAdamW,
    ECMuon,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    ec_adamw,
    ec_muon,
    ec_sgd,
    scaling_group,
)
from tests.networks import mlp

NET, X = mlp(4, 6, 3), torch.randn(2, 4)
GROUP = scaling_group(NET, X)
PARAMS = list(NET.parameters())


def sgd() -> SGD:
    return SGD(PARAMS, lr=0.1)


Calls = dict[str, tuple[Callable[[], Any], str]]
WITH_MODULE: Calls = {
    "parameters": (lambda: ec_sgd(NET.parameters()), "ec_sgd(model, lr=0.1)"),
    "a list of parameters": (lambda: ec_sgd(PARAMS), "ECSGD(parameters, lr=0.1)"),
    "a rate": (lambda: ec_sgd(NET, 0.2), "ec_sgd(model, lr=0.2)"),
    "a group": (lambda: ec_sgd(NET, GROUP), "ec_sgd(model, lr=0.1)"),
    "swapped": (lambda: ec_sgd(PARAMS, NET), "ec_sgd(model, params, lr=0.1)"),
    "an optimizer": (lambda: ec_sgd(sgd()), "EquivalentClassOptimizer(optimizer, group)"),
    "AdamW of parameters": (lambda: ec_adamw(NET.parameters()), "ec_adamw(model, lr=0.1)"),
    "AdamW, a rate": (lambda: ec_adamw(NET, 1), "ec_adamw(model, lr=1)"),
    "Muon of parameters": (lambda: ec_muon(NET.parameters()), "ec_muon(model, lr=0.1)"),
}
WITH_OPTIMIZER: Calls = {
    "a class": (lambda: EquivalentClassOptimizer(SGD, GROUP), "EquivalentClassOptimizer(SGD(model.parameters(), ...)"),
    "a module": (lambda: EquivalentClassOptimizer(sgd(), NET), "optimizer, scaling_group(model, inputs))"),
    "inputs": (lambda: EquivalentClassOptimizer(sgd(), X), "optimizer, scaling_group(model, inputs))"),
    "parameters": (
        lambda: EquivalentClassOptimizer(NET.parameters()),
        "SGD(model.parameters(), lr=0.1), scaling_group",
    ),
    "a module alone": (lambda: EquivalentClassOptimizer(NET), "SGD(model.parameters(), lr=0.1), scaling_group"),
    "swapped": (lambda: EquivalentClassOptimizer(GROUP, sgd()), "EquivalentClassOptimizer(optimizer, group)"),
    "swapped, a module": (lambda: EquivalentClassOptimizer(NET, sgd()), "(optimizer, scaling_group(model, inputs))"),
    "bind": (lambda: ECSGD(PARAMS).bind(NET), "optimizer.bind(scaling_group(model, inputs))"),
    "a rule": (lambda: EquivalentClassOptimizer(sgd(), "path"), "optimizer, scaling_group(model, inputs))"),
}
WITH_PARAMETERS: Calls = {
    "a module": (lambda: ECSGD(NET), "ec_sgd(model, lr=0.1)"),
    "AdamW, a module": (lambda: ECAdamW(NET), "ec_adamw(model, lr=0.1)"),
    "Muon, a module": (lambda: ECMuon(NET), "ec_muon(model, lr=0.1)"),
    "a group": (lambda: ECSGD(PARAMS, GROUP), "optimizer.bind(group)"),
    "an optimizer": (lambda: ECSGD(sgd()), "EquivalentClassOptimizer(optimizer, group)"),
    "a class": (lambda: ECSGD(SGD, PARAMS), "ECSGD(model.parameters(), lr=0.1)"),
    "a module second": (lambda: ECSGD(PARAMS, NET), "ECSGD(model.parameters(), lr=0.1)"),
    "swapped": (lambda: ECSGD(0.1, PARAMS), "ECSGD(model.parameters(), lr=0.1)"),
}
OTHERS: Calls = {
    "group of parameters": (lambda: scaling_group(PARAMS, X), "scaling_group(model, inputs)"),
    "swapped": (lambda: scaling_group(X, NET), "scaling_group(model, inputs)"),
    "lazy": (lambda: ECSGD(nn.LazyLinear(3).parameters()), "Call the model once with a batch"),
    "lazy module": (lambda: ec_sgd(nn.LazyLinear(3)), "EquivalentClassOptimization callback"),
}
CALLS = [
    pytest.param(*call, id=f"{kind}: {name}")
    for kind, calls in {"ec": WITH_MODULE, "wrap": WITH_OPTIMIZER, "class": WITH_PARAMETERS, "": OTHERS}.items()
    for name, call in calls.items()
]


@pytest.mark.parametrize(("call", "meant"), CALLS)
def test_an_error_says_the_call_that_was_meant(call: Callable[[], Any], meant: str) -> None:
    with pytest.raises(TypeError, match=re.escape(meant)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ECSGD(PARAMS, refresh_interval=0), "ECSGD: refresh_interval must be 'auto', 'epoch', a positive"),
        (lambda: ec_adamw(NET, skeleton="min"), "ECAdamW: skeleton must be 'max' or 'diagonal', got 'min'"),
        (lambda: EquivalentClassOptimizer(sgd(), GROUP, free_start=None), "EquivalentClassOptimizer: free_start must"),
        (lambda: EquivalentClassOptimizer(sgd(), GROUP, state_powers=3), "state_powers must be a mapping, got 3"),
        (
            lambda: EquivalentClassOptimization(rule="x"),
            "EquivalentClassOptimization: rule must be 'unit', 'path' or 'paper'",
        ),
        (lambda: EquivalentClassOptimization(NET), "rule must be 'unit', 'path' or 'paper', got Sequential"),
        (lambda: EquivalentClassOptimization(0), "EquivalentClassOptimization: rule must be"),
        (
            lambda: EquivalentClassOptimization(refresh_interval="x"),
            "EquivalentClassOptimization: refresh_interval must",
        ),
        (lambda: setattr(ECSGD(PARAMS), "rule", "x"), "ECSGD: rule must be 'unit', 'path' or 'paper', got 'x'"),
    ],
)
def test_an_error_of_an_option_names_the_option_and_who_has_it(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    optimizer = ECSGD(PARAMS, np.float32(0.1), refresh_interval=np.int64(3), max_path_ratio=np.float32(2))
    assert optimizer.refresh_interval == 3
    ECSGD(PARAMS, torch.tensor(0.1))
