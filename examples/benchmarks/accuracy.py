"""When and why does optimisation in the equivalent-class space train better?

Every contender is trained on every task at the rates of one common grid, refined around its best, with the same
schedule and number of steps. The best rate is the one of the best mean validation accuracy; with it more seeds are
trained, and starts whose hidden units are rescaled by exp(N(0, 1)). Test images play no part in any choice. Every run
is one line of JSON, and runs whose line is there are not repeated::

    python examples/benchmarks/accuracy.py --data FOLDER --out results.jsonl --jobs 2
    python examples/benchmarks/report.py results.jsonl --out examples/benchmarks

FOLDER holds ``mnist.npz`` and ``cifar10.npz`` in Keras layout, or torchvision's copies. ``--scale full`` is the grid
for a GPU, ``--grid settings.yaml`` the one that the defaults were chosen by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimizer, scaling_group, set_skeleton_to_one_

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import peers  # noqa: E402
import tasks  # noqa: E402

POINTS = 20  # of a training curve
HOPELESS = 5.0  # per cent of accuracy below the best rate, where the search ends


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long.

    Args:
        network: name and arguments of one of :data:`tasks.NETWORKS`.
        data: arguments of :func:`tasks.load` but the folder.
        batch_size: images in a step.
        epochs: passes over the training images.
        target: running training accuracy, in per cent, the steps to which are reported.
        contenders: if they are not all of the grid's.
    """

    network: dict[str, Any]
    data: dict[str, Any]
    batch_size: int
    epochs: int
    target: float
    contenders: list[str] | None = None

    def net(self) -> nn.Module:
        arguments = dict(self.network)
        return tasks.NETWORKS[arguments.pop("name")](**arguments)


@dataclass(frozen=True)
class Contender:
    """How it is trained.

    Args:
        base: ``sgd``, ``adamw`` or ``path_sgd``.
        options: of the base.
        ec: options of the EquivalentClassOptimizer around it, if there is one.
        centralize: whether gradients are centralised (Yong et al., arXiv:2004.01461).
        enorm: whether ENorm follows each step.
        path_condition: whether the start is rescaled by PathCond.
        unit_skeleton: whether the start has skeleton weights of one, as the authors of EC-SGD have.
        rescaled: whether it is trained from a rescaled start, too.
    """

    base: str
    options: dict[str, Any] = field(default_factory=dict)
    ec: dict[str, Any] | None = None
    centralize: bool = False
    enorm: bool = False
    path_condition: bool = False
    unit_skeleton: bool = False
    rescaled: bool = False


@dataclass(frozen=True)
class Grid:
    """All that is run.

    Args:
        rates: the common grid of learning rates.
        seeds: number of seeds at the best rate.
        search_seeds: number of those by which it is chosen.
        warmup: share of the steps in which the rate rises.
        tasks: by name.
        contenders: by name.
        refine: whether the rates half-way from the best to its neighbours are tried, too.
    """

    rates: list[float]
    seeds: int
    search_seeds: int
    warmup: float
    tasks: dict[str, Task]
    contenders: dict[str, Contender]
    refine: bool = True

    @classmethod
    def read(cls, path: Path) -> Grid:
        """From a YAML file.

        Raises:
            ValueError: if it names something that there is not.
        """
        raw = yaml.safe_load(path.read_text())
        try:
            parts = {
                "tasks": {name: Task(**entries) for name, entries in raw.pop("tasks").items()},
                "contenders": {name: Contender(**entries) for name, entries in raw.pop("contenders").items()},
            }
            grid = cls(**raw, **parts)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a grid of this benchmark: {error}") from error
        for name, task in grid.tasks.items():
            unknown = set(task.contenders or ()) - set(grid.contenders)
            if unknown:
                raise ValueError(f"{path}: task {name} names contenders that there are not: {sorted(unknown)}")
        return grid

    def of(self, task: str) -> list[str]:
        """The contenders of a task."""
        return self.tasks[task].contenders or list(self.contenders)


@dataclass(frozen=True)
class Run:
    """One training run; ``scale`` is the standard deviation of the log-scales of the rescaled start, or 0."""

    task: str
    contender: str
    rate: float
    seed: int
    scale: float = 0.0


@dataclass(frozen=True)
class Result:
    """What came of a run. Accuracies are in per cent; the loss is the mean of the last tenth of the steps.

    ``curve`` is the mean training accuracy of each twentieth of the steps.
    """

    run: Run
    validation: float
    test: float
    loss: float
    curve: list[float]
    seconds: float


class Method:
    """A contender's optimizer, with what it does around each step."""

    def __init__(self, contender: Contender, net: nn.Module, example: Tensor, rate: float) -> None:
        if contender.path_condition:
            peers.path_condition_(net, example)
        parameters = list(net.parameters())
        self._after: Callable[[], None] = lambda: None
        self._centralized = [p for p in parameters if p.ndim > 1] if contender.centralize else []
        self.optimizer: torch.optim.Optimizer
        if contender.base == "path_sgd":
            self.optimizer = peers.PathSGD(net, example, lr=rate, **contender.options)
        else:
            kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[contender.base]
            self.optimizer = kind(parameters, lr=rate, **contender.options)
        if contender.enorm:
            self._after = peers.ENorm(scaling_group(net, example), self.optimizer).step
        self._refresh: Callable[[], None] = lambda: None
        if contender.ec is not None:
            options = dict(contender.ec)
            every_epoch = options.setdefault("refresh_interval", "epoch") == "epoch"
            if every_epoch:
                options["refresh_interval"] = None
            wrapped = EquivalentClassOptimizer(self.optimizer, scaling_group(net, example), **options)
            self.optimizer = wrapped
            if every_epoch:
                self._refresh = wrapped.refresh

    def start_epoch(self) -> None:
        """As the callback does."""
        self._refresh()

    def step(self) -> None:
        """After the gradients are there."""
        for p in self._centralized:
            assert p.grad is not None
            p.grad.sub_(p.grad.flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1)))
        self.optimizer.step()
        self._after()


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to zero."""
    first = max(1, round(warmup * total))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def train(run: Run, task: Task, contender: Contender, warmup: float, folder: str, device: torch.device) -> Result:
    """One run. It ends early where nothing was learned in the first third, or the loss is no number any more."""
    data = tasks.load(folder=folder, **task.data)
    images, labels = (part.to(device) for part in data.train)
    torch.manual_seed(run.seed)
    net = task.net()
    if contender.unit_skeleton:
        set_skeleton_to_one_(scaling_group(net, data.train[0][:2]))
    generator = torch.Generator().manual_seed(run.seed)
    if run.scale:
        group = scaling_group(net, data.train[0][:2])
        group.act_(run.scale * torch.randn(group.num_units, generator=generator.manual_seed(1000 + run.seed)))
        generator.manual_seed(run.seed)
    net.to(device)
    method = Method(contender, net, images[:2], run.rate)
    steps = len(images) // task.batch_size
    total = steps * task.epochs
    span = math.ceil(total / POINTS)
    losses, hits = torch.zeros(2, total, device=device)
    began = time.perf_counter()
    done = 0
    hopeless = False
    for _ in range(task.epochs):
        method.start_epoch()
        order = torch.randperm(len(images), generator=generator).to(device)
        for batch in order[: steps * task.batch_size].split(task.batch_size):
            for options in method.optimizer.param_groups:
                options["lr"] = run.rate * schedule(done, total, warmup)
            method.optimizer.zero_grad()
            outputs = net(images[batch])
            loss = F.cross_entropy(outputs, labels[batch])
            loss.backward()
            method.step()
            losses[done] = loss.detach()
            hits[done] = (outputs.detach().argmax(1) == labels[batch]).float().mean()
            done += 1
            if done % span == 0:
                recent = float(losses[done - span : done].mean())
                hopeless = not math.isfinite(recent) or (done > total // 3 and recent > 0.995 * math.log(10))
                if hopeless:
                    break
        if hopeless:
            break
    seconds = round(time.perf_counter() - began, 2)
    curve = [round(100 * float(part.mean()), 2) for part in hits.split(span)]
    if hopeless:
        return Result(run, 10.0, 10.0, math.log(10), curve, seconds)
    net.eval()
    return Result(
        run,
        accuracy(net, data.validation, device),
        accuracy(net, data.test, device),
        float(losses[-max(1, total // 10) :].mean()),
        curve,
        seconds,
    )


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor], device: torch.device) -> float:
    """In per cent."""
    with torch.no_grad():
        right = [
            (net(images.to(device)).argmax(1).cpu() == labels).sum()
            for images, labels in zip(data[0].split(1000), data[1].split(1000), strict=True)
        ]
    return 100 * float(torch.stack(right).sum()) / len(data[1])


# The grid ------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[Run, Result]:
    """The runs of a file of JSON lines.

    Raises:
        ValueError: if a line is not one of this benchmark's.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            raw = json.loads(line)
            if "run" not in raw:
                continue  # the conditions
            result = Result(**{**raw, "run": Run(**raw["run"])})
        except (ValueError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is no result of this benchmark ({error}); remove it.") from error
        found[result.run] = result
    return found


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def score(grid: Grid, task: str, contender: str, rate: float, results: Mapping[Run, Result]) -> float | None:
    """Mean validation accuracy over the seeds of the search; ``None`` where one is missing."""
    runs = [Run(task, contender, rate, seed) for seed in range(grid.search_seeds)]
    return mean(results[run].validation for run in runs) if all(run in results for run in runs) else None


def search(
    grid: Grid, task: str, contender: str, results: Mapping[Run, Result]
) -> tuple[dict[float, float], set[float]]:
    """The scores of the rates that were tried, and the rates to try next.

    From the middle of the grid outwards; a direction ends where a rate is ``HOPELESS`` worse than the best. Then the
    best is refined: the rates half-way (of the logarithms) to its two neighbours are tried as well.
    """
    scores = {
        rate: found
        for rate in {run.rate for run in results if (run.task, run.contender) == (task, contender)}
        if (found := score(grid, task, contender, rate, results)) is not None
    }
    rates = sorted(grid.rates)
    middle = len(rates) // 2
    following = set()
    for direction in (rates[middle:], rates[: middle + 1][::-1]):
        for rate in direction:
            if rate not in scores:
                following.add(rate)
                break
            best = best_rate(scores)
            beyond = best <= rate if direction[0] < direction[-1] else best >= rate
            if beyond and scores[rate] < scores[best] - HOPELESS:
                break
    if grid.refine and not following:
        top = max(range(len(rates)), key=lambda k: scores.get(rates[k], -math.inf))
        around = [rates[k] for k in (top - 1, top + 1) if 0 <= k < len(rates)]
        following = {float(f"{math.sqrt(rates[top] * rate):.2g}") for rate in around} - set(scores)
    return dict(sorted(scores.items())), following


def searches(grid: Grid, task: str, results: Mapping[Run, Result]) -> Iterator[Run]:
    """The next runs by which rates are chosen, until there are none."""
    for seed in range(grid.search_seeds):
        for contender in grid.of(task):
            for rate in search(grid, task, contender, results)[1]:
                yield Run(task, contender, rate, seed)


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate of the best score."""
    return max(scores, key=lambda rate: scores[rate])


def finals(grid: Grid, task: str, results: Mapping[Run, Result]) -> Iterator[Run]:
    """The runs at the chosen rates."""
    for seed in range(grid.seeds):
        for contender in grid.of(task):
            rate = best_rate(search(grid, task, contender, results)[0])
            yield Run(task, contender, rate, seed)
            if grid.contenders[contender].rescaled:
                yield Run(task, contender, rate, seed, scale=1.0)


def conditions(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": name}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _work(job: tuple[Run, Task, Contender, float, str, str, int]) -> Result:
    run, task, contender, warmup, folder, device, threads = job
    torch.set_num_threads(threads)
    return train(run, task, contender, warmup, folder, torch.device(device))


def run_grid(grid: Grid, folder: str, out: Path, jobs: int, device: str) -> None:
    """All runs of the grid that are not in ``out`` yet, ``jobs`` at a time."""
    results = read_results(out)
    threads = max(1, torch.get_num_threads() // jobs)
    with out.open("a") as file, contextlib.ExitStack() as stack:
        over: Callable[..., Iterator[Result]] = map
        if jobs > 1:
            over = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs)).imap_unordered
        file.write(json.dumps(conditions(torch.device(device))) + "\n")
        for name, task in grid.tasks.items():
            for stage in (searches, finals):
                while missing := [run for run in stage(grid, name, results) if run not in results]:
                    work = [
                        (run, task, grid.contenders[run.contender], grid.warmup, folder, device, threads)
                        for run in missing
                    ]
                    for number, result in enumerate(over(_work, work), 1):
                        results[result.run] = result
                        file.write(json.dumps(asdict(result)) + "\n")
                        file.flush()
                        print(
                            f"{name} {number}/{len(work)}: {result.run.contender}, rate {result.run.rate:g}, "
                            f"seed {result.run.seed}: {result.validation:.1f} %",
                            flush=True,
                        )


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """``--scale`` and ``--grid``."""
    parser.add_argument("--scale", choices=("default", "full"), default="default", help="which of the two grids")
    parser.add_argument("--grid", type=Path, help="another grid, in YAML")


def chosen_grid(arguments: argparse.Namespace) -> Grid:
    """The grid that the options name."""
    return Grid.read(arguments.grid or HERE / f"{arguments.scale}.yaml")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_grid_options(parser)
    arguments = parser.parse_args()
    try:
        run_grid(chosen_grid(arguments), arguments.data, arguments.out, arguments.jobs, arguments.device)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
