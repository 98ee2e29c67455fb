"""SGD and, with one line more, EC-SGD on scikit-learn's handwritten digits, over the learning rate.

Without arguments, ``python examples/digits.py`` trains an MLP with six hidden layers at six learning rates, with three
optimizers: SGD, EC-SGD in path coordinates (the paper's) and EC-SGD with steps relative to units (the default of the
callback). It does so from two starts: an ordinary one, and the same function with every hidden unit rescaled by
exp(N(0, 1)). It prints a table and writes ``digits.png``. ``--seeds 5`` gives means and standard deviations over five
seeds, ``--readme README.md`` also writes the table between the markers of that file. With a subcommand it is a
LightningCLI program::

    python examples/digits.py fit --config examples/digits.yaml
    python examples/digits.py fit --model MLP --trainer.callbacks+=lightning_ecopt.EquivalentClassOptimization
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from pages import between_markers, edge, processor, table

from lightning_ecopt import EquivalentClassOptimization, scaling_group

EPOCHS = 12
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
CLOSE = 2.0  # points of accuracy that count as level with the best rate
PROCESSES = 2  # of one thread each
SUBCOMMANDS = {"fit", "validate", "test", "predict"}
STYLES = ("-", "--")  # of curves from the ordinary and from the rescaled start

# What is compared: the callbacks that the Trainer gets.
CONTENDERS: dict[str, Callable[[], list[Callback]]] = {
    "SGD": lambda: [],
    "EC-SGD (paths)": lambda: [EquivalentClassOptimization(rule="path", verbose=False)],
    "EC-SGD (units)": lambda: [EquivalentClassOptimization(verbose=False)],
}


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
    """Six hidden layers of 64, with He's initialisation.

    With torch's own the signal shrinks from layer to layer, and SGD hardly begins to learn in a few epochs.
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        hidden = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
        super().__init__(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10)), lr, momentum)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


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


class Run(NamedTuple):
    """One training run."""

    contender: str
    rescaled: bool
    lr: float
    seed: int
    epochs: int


class Outcome(NamedTuple):
    """What came of a run: losses of all steps, test accuracy in per cent, seconds of all epochs."""

    run: Run
    losses: list[float]
    accuracy: float
    seconds: list[float]


def train(run: Run) -> Outcome:
    """Train and test with Lightning; the contenders differ in their callbacks alone."""
    L.seed_everything(run.seed, verbose=False)
    model = MLP(run.lr)
    if run.rescaled:
        group = scaling_group(model, torch.zeros(1, 1, 8, 8))
        group.act_(torch.randn(group.num_units))  # the same function, other weights
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=run.epochs,
        callbacks=[recorder, *CONTENDERS[run.contender]()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    data = Digits(seed=run.seed)
    L.seed_everything(run.seed, verbose=False)  # the same order of batches in every run
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    return Outcome(run, recorder.losses, 100 * result["test_accuracy"], recorder.seconds)


def quieten() -> None:
    """Let one process train on one thread, and leave the screen to the progress bar."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # among others of rates that are far out, which are tried on purpose


def train_all(runs: Sequence[Run], console: Console) -> list[Outcome]:
    """Two runs at a time, behind one progress bar."""
    # The processes are forked where Python does that by default: spawned ones would import Lightning anew, which takes
    # each of them seven seconds. They are started before the progress bar's thread.
    with ProcessPoolExecutor(PROCESSES, initializer=quieten) as pool:
        outcomes = pool.map(train, runs)
        return list(track(outcomes, f"{len(runs)} runs with Lightning", total=len(runs), console=console))


class Curve(NamedTuple):
    """All runs of one contender from one start."""

    contender: str
    rescaled: bool
    outcomes: list[Outcome]

    @property
    def rates(self) -> list[float]:
        return sorted({outcome.run.lr for outcome in self.outcomes})

    def at(self, lr: float) -> list[float]:
        """Test accuracy at a rate, for each seed."""
        return [outcome.accuracy for outcome in self.outcomes if outcome.run.lr == lr]

    def mean(self, lr: float) -> float:
        return statistics.mean(self.at(lr))

    def best_rate(self) -> float:
        return max(self.rates, key=self.mean)

    def epoch_seconds(self) -> float:
        """The mean over the epochs of a run but the first, in which the network is traced; the median over the runs."""
        return statistics.median(statistics.mean(outcome.seconds[1:] or outcome.seconds) for outcome in self.outcomes)

    def width(self) -> str:
        """Largest over smallest rate within ``CLOSE`` of the best, by interpolation between the logarithms of rates.

        It starts with ``>`` if the ends of the grid are within.
        """
        points = [(math.log(rate), self.mean(rate)) for rate in self.rates]
        top = self.rates.index(self.best_rate())
        level = points[top][1] - CLOSE
        below, below_is_found = edge(points[top::-1], level)
        above, above_is_found = edge(points[top:], level)
        factor = math.exp(above - below)
        return f"{'' if below_is_found and above_is_found else '> '}{factor:.{0 if factor > 10 else 1}f}"


def curves_of(outcomes: Sequence[Outcome]) -> list[Curve]:
    """One for each contender and start, SGD from the ordinary one first."""
    kinds = [(contender, rescaled) for contender in CONTENDERS for rescaled in (False, True)]
    return [Curve(*kind, [o for o in outcomes if (o.run.contender, o.run.rescaled) == kind]) for kind in kinds]


def rows_of(curves: Sequence[Curve]) -> list[list[str]]:
    """The table, its header first."""
    users = curves[0].best_rate()
    rows = [["optimizer", "start", "best, %", "range", f"at {users:g}, %", "s/epoch", "ratio"]]
    for curve in curves:
        best, seconds = curve.best_rate(), curve.epoch_seconds()
        plain = curves[curve.rescaled].epoch_seconds()
        rows.append(
            [
                curve.contender,
                "rescaled" if curve.rescaled else "ordinary",
                f"{_mean(curve.at(best))} at {best:g}",
                curve.width(),
                _mean(curve.at(users)),
                f"{seconds:.3f}",
                f"{seconds / plain:.2f}",
            ]
        )
    return rows


def _mean(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def notes_of(curves: Sequence[Curve]) -> list[str]:
    """What was trained, and on what: a line each."""
    runs = [outcome.run for outcome in curves[0].outcomes]
    seeds, users = len({run.seed for run in runs}), curves[0].best_rate()
    group = scaling_group(MLP(), torch.zeros(1, 1, 8, 8))
    return [
        f"Test accuracy after {runs[0].epochs} epochs at constant rates with momentum {MLP().momentum:g}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}. Range: largest over smallest rate within {CLOSE:g} points of the "
        f"best. {users:g} is SGD's best rate from the ordinary start. Seconds are means "
        f"over the epochs but the first, in which the network is traced, and medians over interleaved runs.",
        f"m = {group.num_parameters:,} parameters, H = {group.num_units:,} freedoms, m - H = {group.dimension:,}.",
        f"torch {torch.__version__}, lightning {L.__version__}, {PROCESSES} processes of one thread, {processor()}.",
    ]


def title_of(curves: Sequence[Curve]) -> str:
    """What to see in the figure: how much the other start changes, at the rate that a user of SGD has."""
    users = curves[0].best_rate()
    pairs = zip(curves[::2], curves[1::2], strict=True)
    changes = [f"{one.contender} {other.mean(users) - one.mean(users):+.1f}" for one, other in pairs]
    return (
        "The same function with rescaled units (dashed): SGD trains differently,\n"
        "EC-SGD as before, until float32 rounding has grown, which it does fast at high rates.\n"
        f"Points of accuracy gained at SGD's best rate: {', '.join(changes)}"
    )


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Mean test accuracy over the learning rate, with its standard deviation over the seeds if there are several."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    colours = dict(zip(CONTENDERS, ("tab:blue", "tab:orange", "tab:red"), strict=True))
    for curve in curves:
        rates, colour = curve.rates, colours[curve.contender]
        means = [curve.mean(rate) for rate in rates]
        label = None if curve.rescaled else curve.contender
        axis.semilogx(rates, means, STYLES[curve.rescaled], color=colour, marker="o", markersize=4, label=label)
        if len(curve.at(rates[0])) > 1:
            spread = [statistics.stdev(curve.at(rate)) for rate in rates]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axvline(curves[0].best_rate(), color="grey", linewidth=0.8, linestyle=":", label="SGD's best rate")
    for style, start in zip(STYLES, ("ordinary start", "same function, units rescaled"), strict=True):
        axis.plot([], [], style, color="black", label=start)
    axis.set(xlabel="learning rate", ylabel="test accuracy, %", ylim=(0, 101))
    axis.set_title(title_of(curves), fontsize=9)
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(curves: Sequence[Curve], console: Console, path: Path) -> None:
    """Print the table and its notes."""
    header, *rows = rows_of(curves)
    shown = Table(title="Six hidden layers of 64 on scikit-learn's digits", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in header:
        shown.add_column(column)
    for number, row in enumerate(rows):
        shown.add_row(*row, end_section=number % 2 == 1)
    console.print(shown)
    for note in [*notes_of(curves), f"Test accuracy over the learning rate: {path.resolve()}"]:
        console.print(note, highlight=False, soft_wrap=True)


def compare(seeds: int = 1, path: Path = Path("digits.png"), readme: Path | None = None) -> list[Outcome]:
    """Train everything, print the table and write the figure, and the table into a file if there is one.

    Raises:
        ValueError: before anything is trained, if the file has no place for the table.
    """
    if readme is not None:
        between_markers(readme, "digits", [])
    # The runs that are compared in time are trained next to one another.
    runs = [
        Run(contender, rescaled, lr, seed, EPOCHS)
        for seed in range(seeds)
        for lr in RATES
        for rescaled in (False, True)
        for contender in CONTENDERS
    ]
    console = Console()
    outcomes = train_all(runs, console)
    curves = curves_of(outcomes)
    show(curves, console, path)
    plot(curves, path)
    if readme is not None:
        header, *rows = rows_of(curves)
        readme.write_text(between_markers(readme, "digits", [*table(header, rows), *notes_of(curves)]))
    return outcomes


def main() -> None:
    """The comparison, or a LightningCLI program if there is a subcommand."""
    if SUBCOMMANDS & set(sys.argv[1:]):
        LightningCLI(Classifier, Digits, subclass_mode_model=True, seed_everything_default=0)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--readme", type=Path, help="file with the two markers, to fill in the table")
    arguments = parser.parse_args()
    try:
        compare(arguments.seeds, readme=arguments.readme)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
