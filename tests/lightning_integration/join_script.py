"""Two processes train by ``DistributedDataParallel``, with different numbers of batches, which ``join`` evens out."""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_ecopt import ECSGD
from tests.lightning_integration.modules import Batch, batches, mlp, weights

#: How many batches each of two ranks has.
COUNTS = {"level": (3, 3), "uneven": (5, 2), "one has none": (4, 0), "begun before": (4, 2)}


def step(module: nn.Module, optimizer: ECSGD, data: list[Batch]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def train_one(rank: int, folder: Path, rule: str, name: str) -> None:
    module = DistributedDataParallel(mlp(rank))
    optimizer = ECSGD(module.parameters(), lr=0.05, momentum=0.9, rule=rule, refresh_interval=1)
    own = batches(8)[4 * rank :][: COUNTS[name][rank]]
    # The ranks may have found their group together by the time that one of them runs out.
    early = int(name == "begun before")
    step(module, optimizer, own[:early])
    with module.join():
        step(module, optimizer, own[early:])
    units = 0 if optimizer.group is None else optimizer.group.num_units
    torch.save({"weights": weights(module.module), "units": units}, folder / f"{name}-{rank}.pt")


def train(rank: int, folder: Path, rule: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for name in COUNTS:
        train_one(rank, folder, rule, name)
    # The last module to hold the process group would wait, with Python's lock, for a thread that may need the lock.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(train, (Path(sys.argv[1]), sys.argv[2]), nprocs=2)
