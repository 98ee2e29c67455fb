"""What test_nodes runs: two nodes of two processes each; one of the nodes is killed, and comes back.

    python -m tests.lightning_integration.node_script FOLDER NAME

A node is what ``torchrun --nnodes 2 --nproc-per-node 2 --max-restarts 1`` starts: an agent, which meets those of other
nodes and starts workers. Here agents are forked, as imports would take most of the time. In the midst of the run the
workers of one node stop between two steps, so that those of the other node wait for them in a collective. Then the
agent of the node and its workers are killed, and a new agent is started, as a cluster does. The agent that is left
notices, and both start their workers again. At the end the same run is made without a kill.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from lightning_ecopt import ec_sgd
from tests.lightning_integration.fsdp_script import whole
from tests.lightning_integration.kill_script import Begins
from tests.lightning_integration.modules import EXAMPLE, mlp, quiet, sgd, trainer
from tests.lightning_integration.runs import Shuffled, TakenUp

NODES, WORKERS = 2, 2
EPOCHS, SAVED_EVERY, KILLED_AT = 3, 3, 8
#: The node that is killed: the other one keeps the store in which nodes meet.
MORTAL = 1
#: A node that is silent for so many seconds counts as dead.
SILENCE = 10


@dataclass
class Place:
    """Where a run leaves its files, and where it is stopped.

    Args:
        folder: of the run.
        kills: whether the run is to be killed once.
    """

    folder: Path
    kills: bool

    def stop(self, step: int) -> None:
        """Wait to be killed, if it is time and this is the node."""
        is_mortal = self.kills and os.environ["NODE"] == str(MORTAL)
        if is_mortal and step == KILLED_AT and not (self.folder / "killed").exists():
            (self.folder / f"stopped-{os.environ['LOCAL_RANK']}").touch()
            time.sleep(300)

    def leave(self, tensors: dict[str, Any]) -> None:
        """Write what a rank ends with, once all ranks have come to the end."""
        distributed.barrier()
        torch.save(tensors, self.folder / f"end-{os.environ['RANK']}.pt")
        distributed.barrier()


class Stops(Callback):
    """Stops the Trainer of a node that is to be killed, between two steps."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.place.stop(trainer.global_step)


# Runs -----------------------------------------------------------------------------------------------------------------


class Exact(TakenUp):
    """Computes in float64, in which Lightning does not convert modules that are sharded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


class Sharded(Exact):
    """Is sharded over all processes."""

    def configure_model(self) -> None:
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)


@dataclass(frozen=True)
class Fit:
    """A Trainer, which goes on from the last checkpoint in its folder, if there is one.

    Args:
        base: what ``configure_optimizers`` makes.
        rule: of the callback.
        is_sharded: whether parameters are (FSDP2), or each process has them all (DDP).
    """

    base: Callable[[Any], Optimizer]
    rule: str
    is_sharded: bool = False

    def go(self, place: Place, seed: int) -> None:
        """Train, and leave the weights."""
        saves = ModelCheckpoint(place.folder, every_n_train_steps=SAVED_EVERY, save_last=True)
        # Otherwise DDP makes other buckets after its first step, and gradients are summed in another order.
        strategy = ModelParallelStrategy(NODES * WORKERS, 1) if self.is_sharded else "ddp_find_unused_parameters_true"
        run = trainer(
            quiet(rule=self.rule),
            Stops(place),
            Begins(place.folder / "begins"),
            saves,
            max_epochs=EPOCHS,
            enable_checkpointing=True,
            strategy=strategy,
            num_nodes=NODES,
            devices=WORKERS,
        )
        module = (Sharded if self.is_sharded else Exact)(mlp(seed).double(), self.base, EXAMPLE)
        run.fit(module, ckpt_path="last")
        place.leave({"weights": whole(dict(module.named_parameters())), "steps": run.global_step})


@dataclass(frozen=True)
class Loop:
    """A loop of plain torch with DDP, whose first step after a kill sums gradients in another order.

    Args:
        optimizer: makes the optimizer.
    """

    optimizer: Callable[[Any], Optimizer]

    def go(self, place: Place, seed: int) -> None:
        """Train, and leave the weights."""
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        rank = distributed.get_rank()
        net = mlp(seed).double()
        module = DistributedDataParallel(net)
        optimizer, step, last = self.optimizer(module), 0, place.folder / "last.pt"
        if last.exists():
            saved = torch.load(last)
            step = saved["step"]
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        if rank == 0:
            (place.folder / "begins").write_text(str(step))
        data = Shuffled(TakenUp.STEPS_PER_EPOCH, rank, NODES * WORKERS)
        for epoch in range(EPOCHS):
            data.set_epoch(epoch)
            for number, (x, y) in enumerate(data):
                if epoch * len(data) + number < step:
                    continue
                optimizer.zero_grad()
                F.cross_entropy(module(x.double()), y).backward()
                optimizer.step()
                step += 1
                place.stop(step)
                if step % SAVED_EVERY == 0 and rank == 0:
                    state = {"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(state, last.with_suffix(".part"))
                    last.with_suffix(".part").rename(last)
        place.leave({"weights": whole(dict(net.named_parameters())), "steps": step})


def adamw(module: Any) -> AdamW:
    return AdamW(module.parameters(), lr=0.01)


RUNS: dict[str, Fit | Loop] = {
    "DDP, SGD, unit": Fit(sgd, "unit"),
    "FSDP2, AdamW, unit": Fit(adamw, "unit", is_sharded=True),
    "loop, ec_sgd, path": Loop(lambda m: ec_sgd(m, lr=0.1, momentum=0.9, rule="path", refresh_interval=4)),
}


def work(name: str, place: Place) -> None:
    """What each worker does; a run begins again with another seed, so that all comes from the checkpoint."""
    torch.set_num_threads(1)
    RUNS[name].go(place, seed=9 if (place.folder / "killed").exists() else 0)


# Nodes ----------------------------------------------------------------------------------------------------------------


def run_agent(number: int, port: int, name: str, place: Place) -> None:
    """What the agent of a node does."""
    dynamic_rendezvous.get_method_name = lambda *_: ""  # for logs; it reads all modules, which outlasts a heartbeat
    # If nodes share the first store, those that meet again do not tell a new one where it is, which waits for that.
    os.environ |= {"NODE": str(number), "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    config = LaunchConfig(
        min_nodes=NODES,
        max_nodes=NODES,
        nproc_per_node=WORKERS,
        run_id="nodes",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"keep_alive_interval": 1, "keep_alive_max_attempt": SILENCE, "is_host": number != MORTAL},
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(place.folder / "logs")),
    )
    elastic_launch(config, work)(name, place)


class Node:
    """An agent and its workers.

    Args:
        number: of the node.
        port: of the store in which the nodes meet.
        name: of the run.
        place: of the run.
    """

    def __init__(self, number: int, port: int, name: str, place: Place) -> None:
        self.agent = get_context("fork").Process(target=run_agent, args=(number, port, name, place))
        self.agent.start()

    def kill(self) -> None:
        """Kill the agent and its workers: none of them gets to clean up."""
        for process in (psutil.Process(self.agent.pid), *psutil.Process(self.agent.pid).children(recursive=True)):
            process.kill()
        self.agent.join()


def run_nodes(name: str, place: Place) -> None:
    """Train, and kill one node in the midst of it if the run is to be killed."""
    place.folder.mkdir()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    nodes = [Node(number, port, name, place) for number in range(NODES)]
    try:
        while any(node.agent.is_alive() for node in nodes):
            if len(list(place.folder.glob("stopped-*"))) == WORKERS and not (place.folder / "killed").exists():
                (place.folder / "killed").touch()
                nodes[MORTAL].kill()
                nodes[MORTAL] = Node(MORTAL, port, name, place)
            time.sleep(0.05)
    finally:
        for node in nodes:
            node.agent.terminate()
    codes = [node.agent.exitcode for node in nodes]
    assert codes == [0] * NODES, codes


if __name__ == "__main__":
    for way in ("killed", "whole"):
        run_nodes(sys.argv[2], Place(Path(sys.argv[1]) / way, kills=way == "killed"))
