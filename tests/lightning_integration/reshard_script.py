"""What test_resharding runs: two processes train and leave checkpoints, from which four and then one go on.

python -m tests.lightning_integration.reshard_script FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, multiprocessing, nn

from tests.lightning_integration import fsdp1_lightning_script as fsdp1
from tests.lightning_integration.fsdp1_script import weights
from tests.lightning_integration.fsdp_script import NO_CALLS, whole
from tests.lightning_integration.fsdp_training_script import adamw, fit, scheduled
from tests.lightning_integration.modules import quiet

BASES: dict[str, Callable[[Any], Any]] = {"SGD": scheduled, "AdamW": adamw}
#: The processes that train first, and those that go on.
FIRST, NEXT = 2, (4, 1)


@dataclass(frozen=True)
class Run:
    """A run in some number of processes.

    Args:
        strategy: ``"DDP"``, ``"FSDP1"`` or ``"FSDP2"``.
        rule: of the callback.
        base: a name in ``BASES``.
        whole_file: whether a checkpoint is one file. One process without a strategy can read those of DDP and of FSDP2;
            FSDP1 has its own names for the state of the base optimizer.
    """

    strategy: str
    rule: str
    base: str
    whole_file: bool = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many processes can go on."""
        return NEXT if self.whole_file and self.strategy != "FSDP1" else NEXT[:1]

    def train(self, size: int, folder: Path) -> dict[str, Any]:
        """Train for two epochs and leave checkpoints, or from the one after the first epoch if others have."""
        first, options = size == FIRST, {}
        fitting = fsdp1.fit if self.strategy == "FSDP1" else fit
        if self.strategy == "DDP":
            options = {"strategy": "ddp", "devices": size} if size > 1 else {}
        elif self.strategy == "FSDP1":
            options = {"processes": size, "full": self.whole_file, "strategy": {"auto_wrap_policy": {nn.Linear}}}
        else:
            options = {"processes": size, "whole_file": self.whole_file}
        saves = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]
        module, run = fitting(
            quiet(rule=self.rule),
            *(saves if first else []),
            configure=BASES[self.base],
            seed=0 if first else 9,
            ckpt=None if first else folder / "epoch=0.ckpt",
            **options,
        )
        of = weights(run.strategy.model) if self.strategy == "FSDP1" else whole(dict(module.named_parameters()))
        return {"weights": of, "steps": run.global_step}


RUNS = {
    **{f"DDP, {base}, {rule}": Run("DDP", rule, base) for base, rule in zip(BASES, ("unit", "path"), strict=True)},
    **{
        f"{strategy}, {base}, {kind}": Run(strategy, "unit", base, whole_file=kind == "file")
        for strategy, kinds in (("FSDP1", ("folder", "file")), ("FSDP2", ("file", "folder")))
        for base, kind in zip(BASES, kinds, strict=True)
    },
}
CHOSEN = {name: run for name, run in RUNS.items() if not (NO_CALLS and run.strategy == "FSDP2")}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(size)}
    if size > 1:
        distributed.init_process_group(
            "gloo", timeout=timedelta(seconds=120), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
        )
    fsdp1.stay_on_the_cpu()
    chosen = {name: run for name, run in CHOSEN.items() if size in (FIRST, *run.sizes)}
    found = {name: run.train(size, folder / name) for name, run in chosen.items()}
    if rank == 0:
        torch.save(found, folder / f"{size}.pt")
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    for processes in (FIRST, *NEXT):
        multiprocessing.start_processes(
            main, args=(processes, Path(sys.argv[1])), nprocs=processes, start_method="fork"
        )
