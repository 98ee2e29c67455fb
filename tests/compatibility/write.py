"""Write the checkpoints of this folder, which later versions must go on from: ``python -m tests.compatibility.write``.

They were written by version 0.1.0.dev0 before its modules got their present names (commit b7b8d28). Do not write them
again: a checkpoint of a new format gets a file of its own. Where runs with the rule ``"unit"`` end was computed anew
when lr got its present meaning; the states from which they go on were not.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, scaling_group

FOLDER = Path(__file__).parent
RULES = ("unit", "path")
BASES: dict[str, Any] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
}
STEPS, MORE_STEPS, REFRESH_INTERVAL = 7, 6, 5


def data() -> tuple[Tensor, Tensor]:
    """Sixteen samples of six numbers, and their classes; computed without a random number generator."""
    grid = torch.arange(96, dtype=torch.float64).view(16, 6)
    return (grid * 0.7).sin() + (grid * grid * 0.13).cos(), torch.arange(16) % 3


def network() -> nn.Module:
    """A network of 18 units; its weights come from no random number generator, which may change."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.LayerNorm(8), nn.Linear(8, 2), nn.ReLU(),
        nn.Linear(2, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.copy_((torch.arange(p.numel(), dtype=torch.float64) * (1.1 + number) + 0.3).cos().view_as(p))
    return net


def optimizer_of(net: nn.Module, base: str, rule: Any) -> EquivalentClassOptimizer:
    """The optimizer whose state is saved."""
    group = scaling_group(net, data()[0])
    return EquivalentClassOptimizer(BASES[base](net.parameters()), group, rule=rule, refresh_interval=REFRESH_INTERVAL)


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> None:
    """Take some steps, each on all samples."""
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


class Module(LightningModule):
    """The same in a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return BASES["sgd"](self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*data()), 4)


def trainer(rule: Any, epochs: int) -> Trainer:
    """One that trains with the callback and keeps quiet."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=epochs,
        callbacks=[EquivalentClassOptimization(rule=rule, refresh_interval="epoch", verbose=False)],
    )


def weights(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def main() -> None:
    """Write all files: a state in the middle of a run, and the weights at its end."""
    for rule in RULES:
        for base in BASES:
            net = network()
            optimizer = optimizer_of(net, base, rule)
            train(net, optimizer, STEPS)
            saved = {"model": weights(net), "optimizer": copy.deepcopy(optimizer.state_dict())}
            train(net, optimizer, MORE_STEPS)
            torch.save({**saved, "end": weights(net)}, FOLDER / f"{rule}-{base}.pt")
        module = Module()
        first = trainer(rule, 2)
        first.fit(module)
        first.save_checkpoint(FOLDER / f"{rule}.ckpt")
        module = Module()
        trainer(rule, 4).fit(module)
        torch.save(weights(module), FOLDER / f"{rule}-end.pt")


if __name__ == "__main__":
    main()
