"""Two processes train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ecopt import EquivalentClassOptimization
from tests.lightning_integration.modules import RULES, Classifier, fit, mlp, same, weights

ROOT = Path(__file__).parents[2]
NAMES = ["first step", "example"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """For each rule and way of finding the group the results of both ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.lightning_integration.ddp_script", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {
        (rule, name): [torch.load(folder / f"{rule}-{name}-{rank}.pt") for rank in (0, 1)]
        for rule, name in product(("unit", "path"), NAMES)
    }


def _weights(result: dict[str, Any]) -> list[Tensor]:
    return list(result["weights"].values())


@RULES
@pytest.mark.parametrize("name", NAMES)
def test_ranks_that_start_apart_end_bit_identical(results: dict[tuple[str, str], Any], name: str, rule: str) -> None:
    first, second = results[rule, name]
    assert first["units"] == second["units"] == 32
    assert first["steps"] == second["steps"] == 12
    assert not same(weights(mlp(seed=0)), weights(mlp(seed=1)))
    assert same(_weights(first), _weights(second))


@RULES
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_where_one_does(results: dict[tuple[str, str], Any], name: str, rule: str) -> None:
    module = Classifier(mlp(seed=0))
    fit(module, EquivalentClassOptimization(rule=rule, verbose=False), max_epochs=3)
    # The gradient is the same mean over 32 examples, summed in another order: it differs by some 1e-7 of its size, and
    # a dozen steps with momentum add that up.
    for ours, theirs in zip(weights(module), _weights(results[rule, name][0]), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * ours.norm()
    plain = Classifier(mlp(seed=0))
    fit(plain, max_epochs=3)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(weights(plain), weights(module), strict=True))
    assert apart > 1e-3


@RULES
def test_both_ways_of_finding_the_group_give_the_same_weights(results: dict[tuple[str, str], Any], rule: str) -> None:
    assert same(_weights(results[rule, "first step"][0]), _weights(results[rule, "example"][0]))
