"""Two processes train by ``DistributedDataParallel`` in loops of plain torch: ``join``, ``no_sync``, uneven inputs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_ecopt import ECSGD, ec_sgd
from tests.lightning_integration.modules import Batch, batches, mlp, weights


class Fickle(nn.Module):
    """Wraps a network; on all ranks but the first, the first call shows other operations than all further ones."""

    def __init__(self, net: nn.Sequential, rank: int) -> None:
        super().__init__()
        self.net, self.squashes = net, rank > 0

    def forward(self, x: Tensor) -> Tensor:
        squashes, self.squashes = self.squashes, False
        hidden = self.net[:3](x)
        return self.net[4](torch.tanh(hidden) if squashes else torch.relu(hidden))


def by_name(net: nn.Module, rule: str) -> ECSGD:
    return ECSGD(net.parameters(), lr=0.05, rule=rule, refresh_interval=2)


def of_module(net: nn.Module, rule: str) -> ECSGD:
    return ec_sgd(net, lr=0.05, rule=rule, refresh_interval=2)


@dataclass(frozen=True)
class Loop:
    """A loop over the batches of each rank, without momentum, as plain ranks differ with it once they have joined.

    Args:
        counts: how many batches the two ranks have in an epoch.
        epochs: their number, each in a ``join`` context of its own.
        early: of the first epoch's batches, the number of those ahead of the context.
        joins: whether there are contexts.
        accumulates: how many batches make a step; gradients are exchanged for the last of them.
        optimizer: made for the network and the name of the rule.
        is_fickle: whether the first call of the second rank shows fewer freedoms.
    """

    counts: tuple[int, int]
    epochs: int = 1
    early: int = 0
    joins: bool = True
    accumulates: int = 1
    optimizer: Callable[[nn.Module, str], ECSGD] = by_name
    is_fickle: bool = False

    def train(self, rank: int, rule: str) -> dict[str, Any]:
        """Train as one of two ranks; the weights after each epoch."""
        net: nn.Module = Fickle(mlp(rank), rank).double() if self.is_fickle else mlp(rank).double()
        module = DistributedDataParallel(net)
        optimizer = self.optimizer(net, rule)
        own, ends = data(rank)[: self.counts[rank]], []
        for epoch in range(self.epochs):
            early = self.early if epoch == 0 else 0
            self._steps(module, optimizer, own[:early])
            context: AbstractContextManager[Any] = module.join() if self.joins else nullcontext()
            with context:
                self._steps(module, optimizer, own[early:])
            ends.append(weights(net))
        units = 0 if optimizer.group is None else optimizer.group.num_units
        return {"weights": ends, "units": units}

    def _steps(self, module: DistributedDataParallel, optimizer: ECSGD, own: Sequence[Batch]) -> None:
        for number, (x, y) in enumerate(own, 1):
            is_last = number % self.accumulates == 0
            context: AbstractContextManager[Any] = nullcontext() if is_last else module.no_sync()
            with context:
                F.cross_entropy(module(x), y).backward()
            if is_last:
                optimizer.step()
                optimizer.zero_grad()

    def follow(self, rule: str) -> list[list[Tensor]]:
        """What both ranks do, in one process."""
        net = mlp(0).double()
        optimizer, ends = self.optimizer(net, rule), []
        for epoch in range(self.epochs):
            for number in range(max(self.counts)):
                if self.joins and (epoch or self.early) and number == (0 if epoch else self.early):
                    optimizer.load_rule_state(None)  # as ranks do that may have missed steps
                parts = [data(rank)[number] for rank in (0, 1) if number < self.counts[rank]]
                sum(F.cross_entropy(net(x), y) / 2 for x, y in parts).backward()
                if (number + 1) % self.accumulates == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append(weights(net))
        return ends


def data(rank: int) -> list[Batch]:
    """The batches that a rank has at most."""
    return batches(10, dtype=torch.float64)[5 * rank :][:5]


LOOPS = {
    "level": Loop((3, 3)),
    "uneven": Loop((5, 2)),
    "one has none": Loop((4, 0)),
    "begun before": Loop((4, 2), early=1),
    "uneven epochs": Loop((5, 2), epochs=3),
    "uneven epochs, ec_sgd": Loop((2, 5), epochs=3, optimizer=of_module),
    "no_sync": Loop((4, 4), joins=False, accumulates=2),
    "no_sync, ec_sgd": Loop((4, 4), joins=False, accumulates=2, optimizer=of_module),
    "other first calls": Loop((4, 4), joins=False, optimizer=of_module, is_fickle=True),
}


def train(rank: int, folder: Path, rule: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for name, loop in LOOPS.items():
        torch.save(loop.train(rank, rule), folder / f"{name}-{rank}.pt")
    # The last module to hold the process group would wait, with Python's lock, for a thread that may need the lock.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(train, (Path(sys.argv[1]), sys.argv[2]), nprocs=2, start_method="fork")
