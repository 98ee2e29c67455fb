"""When and why does optimisation in the equivalent-class space train better?

Every contender is trained on every task at the rates of one common grid, refined around its best, with the same
schedule and number of steps. The best rate is the one of the best validation score: accuracy on images, loss on text.
At it more seeds are trained, and starts whose hidden units are rescaled by exp(N(0, 1)); a form of another contender
is also trained at the best rate of that, at one rate for all tasks, as its entry in the grid says, and at rates
farther out, until it is worse than the best of that. Test data play no part in any choice. Every run is one line of
JSON, and runs whose line is there are not repeated, so that the grid may be run in as many sittings as it takes::

    python examples/benchmarks/accuracy.py --data FOLDER --out results.jsonl --jobs 2 --minutes 50
    python examples/benchmarks/report.py results.jsonl --out examples/benchmarks

FOLDER holds ``mnist.npz`` and ``cifar10.npz`` in Keras layout, or torchvision's copies, and ``tinyshakespeare.txt``.
``--scale full`` is the grid for days of a GPU, ``--grid gpu.yaml`` that of ``gpu.sh`` for minutes, and ``--grid
settings.yaml`` the one by which the defaults of the path rule were chosen. ``--tasks`` and ``--contenders`` restrict a
sitting to some of the grid's. A line names its task and its contender: begin a new file when what these names stand for
has changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import pages
from grid import Contender, Grid, Task, add_grid_options, chosen_grid
from pages import conditions
from training import Result, Run, train

Results = Mapping[Run, Result]


def read_results(path: Path) -> dict[Run, Result]:
    """The runs of a file of JSON lines.

    Raises:
        ValueError: if a line is not one of this benchmark's.
    """
    return pages.read_results(path, "run", lambda run, **rest: Result(Run(**run), **rest))


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


# The search of the best rate -----------------------------------------------------------------------------------------


def half_way(first: float, second: float) -> float:
    """The geometric mean of two rates, to two digits."""
    return float(f"{math.sqrt(first * second):.2g}")


def gains(grid: Grid, task: str, contender: str, rates: Iterable[float], results: Results) -> dict[float, float]:
    """Mean gains on validation data over the seeds of the search, of the rates that have them all."""
    gain = grid.tasks[task].metric.gain
    found = {}
    for rate in rates:
        runs = [Run(task, contender, rate, seed) for seed in range(grid.search_seeds)]
        if all(run in results for run in runs):
            found[rate] = mean(gain(results[run].validation) for run in runs)
    return found


def best_rate(found: Mapping[float, float]) -> float:
    """The rate of the largest gain."""
    return max(found, key=lambda rate: found[rate])


def walk(
    rates: Sequence[float], known: Mapping[float, float], hopeless: float, level: float = math.inf
) -> tuple[dict[float, float], set[float]]:
    """From the middle rate outwards, a step in both directions at a time.

    A direction ends at the first rate that is worse than the best so far by more than ``hopeless``, and below
    ``level``.

    Args:
        rates: in ascending order.
        known: gains of those that have been trained.
        hopeless: difference of gains.
        level: a gain.

    Returns:
        The gains of the rates that the walk has come to, in ascending order of the rates, and the rates that have to be
        trained before it can go on: it is over if there are none.
    """
    middle = len(rates) // 2
    if rates[middle] not in known:
        return {}, {rates[middle]}
    found = {rates[middle]: known[rates[middle]]}
    ends = {-1: middle, 1: middle}
    while True:
        enough = min(max(found.values()) - hopeless, level)
        open_ends = {step: k for step, k in ends.items() if found[rates[k]] >= enough and 0 <= k + step < len(rates)}
        following = {step: rates[k + step] for step, k in open_ends.items()}
        trained = {step: rate for step, rate in following.items() if rate in known}
        if not trained:
            return dict(sorted(found.items())), set(following.values())
        for step, rate in trained.items():
            found[rate] = known[rate]
            ends[step] += step


def search(grid: Grid, task: str, contender: str, results: Results) -> tuple[dict[float, float], set[float]]:
    """The gains of the rates among which the best is chosen, and the rates to try next; there are none at the end.

    These are the rates of a walk outwards from the middle of the grid, whose directions end at a hopeless rate, and
    then the rates half-way (of the logarithms) from the best to its two neighbours. Rates that are trained for another
    reason, as the best rate of the plain form, are not among them: all contenders search by the same rule.
    """
    rates = grid.rates_of(task)
    found, following = walk(rates, gains(grid, task, contender, rates, results), grid.tasks[task].metric.hopeless)
    if grid.refine and not following:
        top = rates.index(best_rate(found))
        around = {half_way(rates[top], rates[k]) for k in (top - 1, top + 1) if 0 <= k < len(rates)}
        found |= gains(grid, task, contender, around, results)
        following = around - set(found)
    return dict(sorted(found.items())), following


def plain_level(grid: Grid, task: str, contender: str, results: Results) -> float | None:
    """The least gain that counts as level with the best of the plain form.

    Returns:
        ``None`` if the contender is no form of another, or the search of the other is not over.
    """
    plain = grid.plain(task, contender)
    found, following = search(grid, task, plain, results) if plain is not None else ({}, set())
    return max(found.values()) - grid.tasks[task].metric.close if found and not following else None


def search_range(grid: Grid, task: str, contender: str, results: Results) -> tuple[dict[float, float], set[float]]:
    """The gains from which the range of good rates is read, and the rates to try next for it.

    A form may be better than its plain form's best even where it is hopelessly worse than its own. So when both
    searches are over, the form's walk goes on until it falls behind the plain form's best. The rates that are added so
    count for the range alone; the best rate remains that of the search.
    """
    found, following = search(grid, task, contender, results)
    level = plain_level(grid, task, contender, results)
    if following or level is None:
        return found, set()
    rates = grid.rates_of(task)
    known = gains(grid, task, contender, rates, results)
    farther, following = walk(rates, known, grid.tasks[task].metric.hopeless, level)
    return dict(sorted((found | farther).items())), following


def chosen_rate(grid: Grid, task: str, contender: str, results: Results) -> float | None:
    """The best rate; ``None`` if the search is not over."""
    found, following = search(grid, task, contender, results)
    return None if following else best_rate(found)


# What to run, in order of use ----------------------------------------------------------------------------------------


def searches(grid: Grid, task: str, contender: str, results: Results) -> Iterator[Run]:
    """The next runs by which the best rate is chosen, then those for the range of good rates, until there are none."""
    following = search(grid, task, contender, results)[1] or search_range(grid, task, contender, results)[1]
    for rate in sorted(following):
        for seed in range(grid.search_seeds):
            yield Run(task, contender, rate, seed)


def compared_rates(grid: Grid, task: str, contender: str, results: Results) -> dict[str, float]:
    """The rates at which all seeds are trained, as far as they are known.

    Returns:
        ``best``, its own; ``plain``, the best one of what it is a form of; ``default``, the one for all tasks.
    """
    plain = grid.plain(task, contender)
    rates = {
        "best": chosen_rate(grid, task, contender, results),
        "plain": plain and chosen_rate(grid, task, plain, results),
        "default": grid.contenders[contender].default_rate,
    }
    return {kind: rate for kind, rate in rates.items() if rate is not None}


def finals(grid: Grid, task: str, contender: str, results: Results) -> Iterator[Run]:
    """All seeds at the rates that are compared, seed by seed."""
    rates = compared_rates(grid, task, contender, results)
    for seed in range(grid.seeds):
        for kind, rate in rates.items():
            yield Run(task, contender, rate, seed)
            if kind == "best" and grid.contenders[contender].rescaled:
                yield Run(task, contender, rate, seed, scale=1.0)


def wanted(grid: Grid, results: Results) -> Iterator[Run]:
    """All runs that are known to be needed, those first whose results say most.

    Tier by tier: first the searches of all tasks, then the compared rates of all tasks, a seed at a time.
    """
    for tier in sorted({contender.tier for contender in grid.contenders.values()}):
        pairs = list(grid.pairs(tier))
        for pair in pairs:
            yield from searches(grid, *pair, results)
        by_seed: dict[int, list[Run]] = {seed: [] for seed in range(grid.seeds)}
        for pair in pairs:
            for run in finals(grid, *pair, results):
                by_seed[run.seed].append(run)
        yield from itertools.chain.from_iterable(by_seed.values())


# A sitting -----------------------------------------------------------------------------------------------------------


class Inline(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _work(run: Run, task: Task, contender: Contender, warmup: float, folder: str, device: str, threads: int) -> Result:
    torch.set_num_threads(threads)
    return train(run, task, contender, warmup, folder, device)


def run_grid(
    grid: Grid,
    folder: str,
    out: Path,
    jobs: int = 1,
    device: str = "cpu",
    only_tasks: Collection[str] | None = None,
    only_contenders: Collection[str] | None = None,
    minutes: float = math.inf,
) -> None:
    """Add the runs of the grid that are not in ``out`` yet.

    Args:
        grid: all runs.
        folder: of the data.
        out: file of JSON lines.
        jobs: runs at a time, each in a process of its own.
        device: to train on.
        only_tasks: those of which runs are begun.
        only_contenders: those of which runs are begun.
        minutes: after which no run is begun.
    """
    results = read_results(out)
    deadline = time.monotonic() + 60 * minutes
    threads = max(1, torch.get_num_threads() // jobs)
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else Inline()
    running: dict[Future[Result], Run] = {}

    def missing() -> Iterator[Run]:
        for run in wanted(grid, results):
            chosen = run.task in (only_tasks or grid.tasks) and run.contender in (only_contenders or grid.contenders)
            if chosen and run not in results and run not in running.values():
                yield run

    with out.open("a") as file, executor:
        file.write(json.dumps(conditions(torch.device(device))) + "\n")
        while True:
            while len(running) < jobs and time.monotonic() < deadline and (run := next(missing(), None)):
                task, contender = grid.tasks[run.task], grid.contenders[run.contender]
                running[executor.submit(_work, run, task, contender, grid.warmup, folder, device, threads)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                results[running.pop(future)] = result
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                print(line(result, grid.tasks[result.run.task]), flush=True)
        print(f"{sum(1 for _ in missing())} runs are known to be missing.")


def line(result: Result, task: Task) -> str:
    """A run, as it is shown when it ends."""
    run = result.run
    start = ", rescaled" if run.scale else ""
    score = f"{task.metric.text(result.validation)} {task.metric.unit}"
    return f"{run.task}: {run.contender}, rate {run.rate:g}, seed {run.seed}{start}: {score}, {result.seconds:.1f} s"


def names(text: str) -> list[str]:
    """Of ``A,B``."""
    return [name.strip() for name in text.split(",")]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", type=names, help="only these: A,B")
    parser.add_argument("--contenders", type=names, help="only these: X,Y")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run is begun")
    add_grid_options(parser)
    chosen = parser.parse_args()
    try:
        grid = chosen_grid(chosen)
        for given, known in ((chosen.tasks, grid.tasks), (chosen.contenders, grid.contenders)):
            unknown = set(given or ()) - set(known)
            if unknown:
                raise ValueError(f"The grid has no {sorted(unknown)}, but {', '.join(known)}.")
        run_grid(
            grid, chosen.data, chosen.out, chosen.jobs, chosen.device, chosen.tasks, chosen.contenders, chosen.minutes
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
