"""Runs in processes of their own: starting them, data that they can take up again, and whether two ended alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.lightning_integration.modules import Batch, Classifier, digits

ROOT = Path(__file__).parents[2]


def launch(script: str, *arguments: object) -> str:
    """Run a script of this folder with one thread in each process; what it prints.

    Fails after ten minutes with the stacks of all its processes.
    """
    # What another launcher has left would make the script one of its ranks.
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"tests.lightning_integration.{script}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


class Shuffled:
    """Batches of digits in an order of each epoch's own, which a checkpoint takes up where they were left.

    Args:
        length: batches in an epoch.
        rank: of the process, which takes every ``world``-th example of a batch of 32.
        world: the number of processes.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.rank, self.world = length, rank, world
        self.epoch = self.position = 0
        self.sampler = self  # which Lightning tells the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if self.position == len(self):
            self.position = 0
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.epoch)).split(32)
        while self.position < len(self):
            chosen = order[self.position][self.rank :: self.world]
            self.position += 1
            yield images[chosen], labels[chosen]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TakenUp(Classifier):
    """Trains with shuffled epochs of five batches, and a checkpoint knows where it was."""

    STEPS_PER_EPOCH = 5

    def train_dataloader(self) -> Shuffled:
        return Shuffled(self.STEPS_PER_EPOCH, self.trainer.global_rank, self.trainer.world_size)


def saved_by_rows(base: str) -> set[str]:
    """What the rule "unit" saves of the rows, with SGD or with a base whose name tells that it is Adam or RMSprop."""
    has_own_size = any(name in base.lower() for name in ("adam", "rmsprop"))
    return {"second", "seen"} | ({"own"} if has_own_size else {"rho", "reference"})


def differences(one: Any, two: Any) -> list[str]:
    """Where two nested states do not agree bit for bit."""
    first, second = _flat(one), _flat(two)
    return [
        where
        for where in sorted({*first, *second})
        if where not in first or where not in second or not _equal(first[where], second[where])
    ]


def _flat(state: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)
