"""What test_ddp runs in two processes: both rules and ways of finding the group, and every rank's weights in files."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ecopt import EquivalentClassOptimization
from tests.lightning_integration.modules import EXAMPLE, Classifier, fit, loader, mlp


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Ranks start from different weights: DDP makes them equal before training, and the callback must not come earlier.
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for rule, (name, example) in product(("unit", "path"), (("first step", None), ("example", EXAMPLE))):
        module = Classifier(mlp(seed=rank), example=example)
        callback = EquivalentClassOptimization(rule=rule, verbose=False)
        # Each rank takes every other example, so that a global batch is 32 consecutive ones; the sampler that Lightning
        # would choose shuffles.
        everything = loader().dataset
        sampler = DistributedSampler(everything, num_replicas=2, rank=rank, shuffle=False)
        data = DataLoader(everything, batch_size=16, sampler=sampler)
        run = fit(module, callback, data=data, strategy="ddp", devices=2, max_epochs=3, use_distributed_sampler=False)
        assert callback.group is not None
        state = {"weights": module.state_dict(), "units": callback.group.num_units, "steps": run.global_step}
        torch.save(state, folder / f"{rule}-{name}-{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
