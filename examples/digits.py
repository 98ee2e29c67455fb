"""SGD and, with one line more, EC-SGD on scikit-learn's handwritten digits.

Without arguments, ``python examples/digits.py`` trains an MLP and a small CNN four times each: with and without the
callback, from an ordinary start and from the same function with every hidden unit rescaled by exp(N(0, 1)). It prints a
table and writes ``digits.png``; ``--seeds 5`` does it with five seeds. With a subcommand it is a LightningCLI program::

    python examples/digits.py fit --config examples/digits.yaml
    python examples/digits.py fit --model MLP --trainer.callbacks+=lightning_ecopt.EquivalentClassOptimization
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ecopt import EquivalentClassOptimization, scaling_group

EPOCHS = 12


class Digits(L.LightningDataModule):
    """1,797 grey images of 8 x 8 pixels: 1,400 to train on, the others to test."""

    def __init__(self, batch_size: int = 50, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(self.seed))
        images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
        labels = torch.tensor(digits.target)[order]
        self.train_set = TensorDataset(images[:1400], labels[:1400])
        self.test_set = TensorDataset(images[1400:], labels[1400:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, 397)


class Classifier(L.LightningModule):
    """An ordinary LightningModule: it knows nothing of equivalent classes."""

    def __init__(self, net: nn.Module, lr: float, momentum: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.momentum = momentum
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class MLP(Classifier):
    """64-128-128-10."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
        layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        super().__init__(nn.Sequential(*layers), lr, momentum)


class CNN(Classifier):
    """Two convolutions and a linear layer."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        super().__init__(net, lr, momentum)


class Recorder(Callback):
    """Keeps the training loss of every step and the seconds of every epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


@dataclass
class Run:
    """One training run and what came of it."""

    model: type[Classifier]
    rescaled: bool
    equivalent_class: bool
    seed: int
    losses: list[float] = field(default_factory=list)
    accuracy: float = float("nan")
    epoch_seconds: float = float("nan")

    @property
    def kind(self) -> tuple[type[Classifier], bool, bool]:
        return self.model, self.rescaled, self.equivalent_class

    @property
    def name(self) -> str:
        return ("EC-SGD" if self.equivalent_class else "SGD") + (", rescaled start" if self.rescaled else "")

    def train(self) -> None:
        L.seed_everything(self.seed, verbose=False)
        model = self.model()
        if self.rescaled:
            group = scaling_group(model, torch.zeros(1, 1, 8, 8))
            group.act_(torch.randn(group.num_units))  # the same function, other weights
        recorder = Recorder()
        callbacks = [recorder, RichProgressBar(leave=False)]
        if self.equivalent_class:
            callbacks.append(EquivalentClassOptimization(verbose=False))  # the one line
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        data = Digits(seed=self.seed)
        L.seed_everything(self.seed, verbose=False)  # the same order of batches in every run
        trainer.fit(model, data)
        (result,) = trainer.test(model, data, verbose=False)
        self.losses = recorder.losses
        self.accuracy = result["test_accuracy"]
        self.epoch_seconds = statistics.median(recorder.seconds[1:])  # the first epoch also traces the network


def main_table(runs: list[Run]) -> Table:
    """Means, and standard deviations, over the seeds."""
    seeds = len({run.seed for run in runs})
    table = Table(title=f"scikit-learn digits, {EPOCHS} epochs, {seeds} seed{'s' if seeds > 1 else ''}")
    for column in ("network", "optimizer and start", "test accuracy", "m", "H", "m - H", "s / epoch", "ratio"):
        table.add_column(column, justify="left" if column in ("network", "optimizer and start") else "right")
    kinds = list(dict.fromkeys(run.kind for run in runs))
    for kind in kinds:
        members = [run for run in runs if run.kind == kind]
        plain = [run.epoch_seconds for run in runs if run.kind == (*kind[:2], False)]
        seconds = [run.epoch_seconds for run in members]
        model = members[0].model
        group = scaling_group(model(), torch.zeros(1, 1, 8, 8))
        table.add_row(
            model.__name__,
            members[0].name,
            _mean([100 * run.accuracy for run in members], "{:.1f}") + " %",
            f"{group.num_parameters:,}",
            f"{group.num_units:,}",
            f"{group.dimension:,}",
            _mean(seconds, "{:.3f}"),
            f"{statistics.mean(seconds) / statistics.mean(plain):.2f}",
            end_section=kind is kinds[-1] or kinds[kinds.index(kind) + 1][0] is not model,
        )
    return table


def _mean(values: list[float], form: str) -> str:
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} +- {form.format(statistics.stdev(values))}"


def plot(runs: list[Run], path: Path) -> None:
    """Four training curves for each network, of the first seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(run.model for run in runs))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), sharey=True, layout="constrained")
    window = 20
    for axis, model in zip(axes, models, strict=True):
        for run in runs:
            if run.model is model and run.seed == runs[0].seed:
                smooth = torch.tensor(run.losses).unfold(0, window, 1).mean(1)
                colours = ("tab:orange", "tab:red") if run.equivalent_class else ("tab:blue", "tab:cyan")
                style = {"color": colours[run.rescaled], "linestyle": (0, (4, 4)) if run.rescaled else "-"}
                axis.semilogy(range(window, len(run.losses) + 1), smooth, label=run.name, **style)
        axis.set(title=model.__name__, xlabel="step")
        axis.legend()
    axes[0].set_ylabel(f"training loss (mean of {window} steps)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(seeds: int = 1, path: Path = Path("digits.png")) -> list[Run]:
    """Train everything, print the table and write the figure."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    console = Console()
    # The runs that are compared in time follow one another.
    runs = [
        Run(model, rescaled, ec, seed)
        for model in (MLP, CNN)
        for seed in range(seeds)
        for rescaled in (False, True)
        for ec in (False, True)
    ]
    for number, run in enumerate(runs, 1):
        console.print(f"[{number}/{len(runs)}] {run.model.__name__}: {run.name}, seed {run.seed}", markup=False)
        run.train()
    console.print(main_table(runs))
    versions = f"torch {torch.__version__}, lightning {L.__version__}, {torch.get_num_threads()} threads"
    console.print(
        f"{versions}, {platform.machine()}. Training curves: {path.resolve()}", highlight=False, soft_wrap=True
    )
    plot(runs, path)
    return runs


def main() -> None:
    """The comparison, or a LightningCLI program if there is a subcommand."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("--seeds"):
        LightningCLI(Classifier, Digits, subclass_mode_model=True, seed_everything_default=0)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    compare(parser.parse_args().seeds)


if __name__ == "__main__":
    main()
