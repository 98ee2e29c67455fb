"""The experiment of the authors of EC-SGD (Meng et al., arXiv:1802.03713), repeated.

Their public code trains an MLP 784-64-64-64-64-10 without biases on all 60,000 images of MNIST, by SGD without momentum
in batches of 64 and at the rate 0.1 exp(-0.01 epoch), for 300 epochs. Its logs have one run of EC-SGD and one of SGD;
in both the skeleton weights are one at the start. Here each contender is trained from that start and from torch's own::

    python examples/benchmarks/authors.py --data FOLDER --out examples/benchmarks/authors.jsonl --jobs 2 --minutes 60

FOLDER holds ``mnist.npz`` in Keras layout. Each run becomes one line of JSON, and ``AUTHORS.md`` beside ``--out`` is
written anew from all lines. After ``--minutes`` the runs that are under way are saved in the folder ``authors.runs``
beside ``--out``; the same command goes on from there, and ends with the same bits as if it had not stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimizer, scaling_group, set_skeleton_to_one_

sys.path.insert(0, str(Path(__file__).parent))

from authors_page import STARTS, Result, Run, page, read_results
from pages import conditions

SIZES = (784, 64, 64, 64, 64, 10)
BATCH = 64
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels, as in the authors' code
SAVE_EVERY = 120.0  # seconds
#: Options of the EquivalentClassOptimizer around SGD, if there is one.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "SGD": None,
    "paper": {"rule": "paper"},
    "paths": {"rule": "path", "refresh_interval": "epoch"},
    "units": {"rule": "unit", "refresh_interval": "epoch"},
}
Split = tuple[Tensor, Tensor]


def load(folder: str) -> tuple[Split, Split]:
    """Images ``[N, 784]``, standardised, and labels ``[N]``: to train on, and to test on.

    Raises:
        FileNotFoundError: if there is no ``mnist.npz``.
    """
    path = Path(folder) / "mnist.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Give --data a folder with mnist.npz in Keras layout (x_train, y_train, x_test, "
            "y_test); nothing is downloaded."
        )

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        x = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
        return (x - MEAN) / DEVIATION, torch.from_numpy(labels.astype(np.int64))

    with np.load(path) as stored:
        train, test = (split(stored[f"x_{part}"], stored[f"y_{part}"]) for part in ("train", "test"))
    return train, test


class Training:
    """A run, as far as it has come."""

    def __init__(self, run: Run, train: Split, test: Split) -> None:
        self.run, self.result = run, Result(run)
        self._train, self._test = train, test
        torch.manual_seed(run.seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((train[0].shape[1], *SIZES[1:]), SIZES[1:], strict=False):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
        self._net = nn.Sequential(*layers[:-1])
        self._example = train[0][:2]
        group = scaling_group(self._net, self._example)
        if run.start == "skeleton":
            set_skeleton_to_one_(group)
        self._optimizer: torch.optim.Optimizer = torch.optim.SGD(self._net.parameters(), lr=run.rate)
        options = CONTENDERS[run.contender]
        if options is not None:
            self._optimizer = EquivalentClassOptimizer(self._optimizer, group, **options)
            self._optimizer.follow_epochs(lambda: len(self.result.test))

    @property
    def is_over(self) -> bool:
        return len(self.result.test) >= self.run.epochs

    def epoch(self) -> None:
        """Train for one epoch, and test."""
        epoch = len(self.result.test) + 1
        for options in self._optimizer.param_groups:
            options["lr"] = self.run.rate * math.exp(-self.run.decay * epoch)
        # The order depends on nothing that would have to be saved.
        generator = torch.Generator().manual_seed(10_000 * self.run.seed + epoch)
        images, labels = self._train
        before, losses = self._weights(), []
        began = time.process_time()
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            self._optimizer.zero_grad()
            loss = F.cross_entropy(self._net(images.index_select(0, batch)), labels.index_select(0, batch))
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        self.result.seconds += time.process_time() - began
        self._note(float(torch.stack(losses).mean()), before)

    def _weights(self) -> Tensor:
        """Those of the balanced member of the class ``[m]``, which refreshes and rescalings leave where it is."""
        net = copy.deepcopy(self._net)
        scaling_group(net, self._example).balance_()
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    @torch.no_grad()
    def _note(self, loss: float, before: Tensor) -> None:
        images, labels = self._test
        outputs, weights = self._net(images), self._weights()
        self.result.test.append(round(100 * float((outputs.argmax(1) == labels).float().mean()), 2))
        self.result.test_loss.append(_short(float(F.cross_entropy(outputs, labels))))
        self.result.loss.append(_short(loss))
        self.result.norm.append(_short(float(weights.norm())))
        self.result.moved.append(_short(float((weights - before).norm() / weights.norm())))

    def save(self, path: Path) -> None:
        """Save all that :meth:`load` needs to go on, or nothing at all."""
        part = path.with_suffix(".part")
        result = {name: value for name, value in vars(self.result).items() if name != "run"}
        torch.save({"net": self._net.state_dict(), "sgd": self._optimizer.state_dict(), "result": result}, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` has saved."""
        saved = torch.load(path, weights_only=True)
        self.result = Result(self.run, **saved["result"])
        self._net.load_state_dict(saved["net"])
        self._optimizer.load_state_dict(saved["sgd"])


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def train(run: Run, data: tuple[Split, Split], folder: Path, deadline: float) -> Result | None:
    """One run; ``None`` if it is not over at the deadline (of ``time.time()``), and kept in ``folder``."""
    if time.time() >= deadline:
        return None
    path = folder / f"{run.name}.pt"
    training = Training(run, *data)
    if path.exists():
        training.load(path)
    saved = time.time()
    while not training.is_over:
        if time.time() >= deadline:
            training.save(path)
            return None
        training.epoch()
        if time.time() > saved + SAVE_EVERY and not training.is_over:
            training.save(path)
            saved = time.time()
    return training.result


# All runs ------------------------------------------------------------------------------------------------------------


def wanted(arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs that the options ask for: seed by seed, so that what is there can be compared at any time."""
    schedule = (arguments.epochs, arguments.rate, arguments.decay)
    for seed in range(arguments.seeds):
        for start in arguments.starts:
            for contender in arguments.contenders:
                yield Run(contender, start, seed, *schedule)


def _work(job: tuple[Run, str, Path, float]) -> tuple[Run, Result | None]:
    run, data, folder, deadline = job
    torch.set_num_threads(1)
    if time.time() >= deadline:
        return run, None
    if data not in _loaded:
        _loaded[data] = load(data)
    return run, train(run, _loaded[data], folder, deadline)


_loaded: dict[str, tuple[Split, Split]] = {}  # of this process


def run_all(arguments: argparse.Namespace) -> None:
    """All runs that are not in ``--out`` yet, ``--jobs`` at a time, until ``--minutes`` are over."""
    results = read_results(arguments.out)
    folder = arguments.out.with_suffix(".runs")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * arguments.minutes
    jobs = [(run, arguments.data, folder, deadline) for run in wanted(arguments) if run not in results]
    with arguments.out.open("a") as file, contextlib.ExitStack() as stack:
        over: Any = map
        if arguments.jobs > 1:
            over = stack.enter_context(multiprocessing.get_context("spawn").Pool(arguments.jobs)).imap_unordered
        file.write(json.dumps(conditions(torch.device("cpu"))) + "\n")
        left = len(jobs)
        for run, result in over(_work, jobs):
            if result is None:
                continue
            left -= 1
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            (folder / f"{run.name}.pt").unlink(missing_ok=True)
            print(
                f"{run.contender} from {run.start}, seed {run.seed}: {result.test[-1]:.2f} %, {left} left", flush=True
            )
    if not any(folder.iterdir()):
        folder.rmdir()
    print(f"{left} of {len(jobs)} runs are left: the same command goes on." if left else "All runs are there.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--minutes", type=float, default=math.inf, help="length of this sitting")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each contender from each start")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), metavar="START")
    parser.add_argument("--epochs", type=int, default=Run.epochs)
    parser.add_argument("--rate", type=float, default=Run.rate, help="learning rate before it falls")
    parser.add_argument("--decay", type=float, default=Run.decay, help="the rate falls by exp(-decay) in each epoch")
    arguments = parser.parse_args()
    try:
        run_all(arguments)
        arguments.out.with_name("AUTHORS.md").write_text(page(arguments.out))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
