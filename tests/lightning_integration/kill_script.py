"""What test_kill runs: runs that are killed between two steps, and then the same runs again.

    python -m tests.lightning_integration.kill_script started FOLDER
    python -m tests.lightning_integration.kill_script again FOLDER

Each run has a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing.spawn import ProcessException
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from lightning_ecopt import ec_adamw, ec_sgd
from tests.lightning_integration.modules import mlp, quiet, sgd, trainer
from tests.lightning_integration.runs import TakenUp

EPOCHS, SAVED_EVERY, KILLED_AT = 3, 3, 8


class Killed(Callback):
    """Kills the process between two steps, as a scheduler of a cluster would do."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


class Begins(Callback):
    """Takes down in a file at which step a run begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.global_step))


def scheduled(optimizer: Optimizer) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.95), "interval": "step"}}


@dataclass(frozen=True)
class Run:
    """A run that goes on from the last checkpoint in its folder, if there is one.

    Args:
        optimizer: what ``configure_optimizers`` makes.
        rule: of the callback; ``None`` goes without.
        processes: how many processes train.
    """

    optimizer: Callable[[Any], Optimizer]
    rule: str | None
    processes: int = 1

    def go(self, folder: Path, *callbacks: Callback, seed: int = 0) -> None:
        """Train; what the run ends with is its last checkpoint."""
        torch.set_num_threads(1)
        folder.mkdir(parents=True, exist_ok=True)
        ours = [] if self.rule is None else [quiet(rule=self.rule)]
        saves = ModelCheckpoint(
            folder, filename="{step}", save_top_k=-1, every_n_train_steps=SAVED_EVERY, save_last=True
        )
        several = {} if self.processes == 1 else {"strategy": "ddp_fork", "devices": self.processes}
        fitting = trainer(
            *ours, *callbacks, Begins(folder / "begins"), saves, max_epochs=EPOCHS, enable_checkpointing=True, **several
        )
        module = TakenUp(mlp(seed), lambda m: scheduled(self.optimizer(m)))
        try:
            fitting.fit(module, ckpt_path="last")
        except ProcessException:  # one of several was killed, and so is the one that waits for them
            os.kill(os.getpid(), signal.SIGKILL)


def adamw(module: Any) -> AdamW:
    return AdamW(module.parameters(), lr=0.01)


RUNS = {
    "SGD, unit": Run(sgd, "unit"),
    "SGD, path": Run(sgd, "path"),
    "AdamW, unit": Run(adamw, "unit"),
    "AdamW, path": Run(adamw, "path"),
    "ec_sgd, unit": Run(lambda m: ec_sgd(m, lr=0.1, momentum=0.9, refresh_interval=4), None),
    "ec_adamw, path": Run(lambda m: ec_adamw(m, lr=0.01, rule="path", refresh_interval=7), None),
    "AdamW, path, two processes": Run(adamw, "path", processes=2),
}


def in_processes(folder: Path, *callbacks: Callback, seed: int = 0) -> dict[str, int]:
    """Go all runs, each in a process of its own; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = {
        name: context.Process(target=run.go, args=(folder / name, *callbacks), kwargs={"seed": seed})
        for name, run in RUNS.items()
    }
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    return {name: process.exitcode or 0 for name, process in processes.items()}


def main(what: str, folder: Path) -> None:
    if what == "started":
        for name, code in in_processes(folder / "killed", Killed()).items():
            (folder / "killed" / name / "code").write_text(str(code))
    else:
        # Another seed shows that everything comes from the checkpoint.
        codes = in_processes(folder / "killed", seed=9), in_processes(folder / "whole")
        assert not any(code for run in codes for code in run.values()), codes


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
