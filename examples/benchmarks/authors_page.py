"""The runs of ``authors.py``, and the page that is written of them."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from outcomes import Interval

STARTS = ("torch", "skeleton")
TITLES = {
    "SGD": "SGD",
    "paper": "EC-SGD (the paper's setting)",
    "paths": "EC-SGD (paths)",
    "units": "EC-SGD (units)",
}
WORDS = {"torch": "torch's", "skeleton": "skeleton of ones"}
COURSE = (1, 3, 10, 30, 100, 200, 300)  # epochs
THEIRS = {"EC-SGD, seed 0": "97.64", "SGD, seed 5": "97.37"}  # the last lines of the logs in their repository

INTRODUCTION = """\
# The authors' experiment, repeated

Written by `authors.py` from the lines of JSON in `authors.jsonl`, which its runs have written:

```bash
python examples/benchmarks/authors.py --data FOLDER --out examples/benchmarks/authors.jsonl --jobs 2 --minutes 60
```

An MLP 784-64-64-64-64-10 without biases on MNIST, all 60,000 images, SGD without momentum, batches of 64, rate
0.1 exp(-0.01 epoch), 300 epochs, as in the [public code](https://github.com/MSRA-COLT/gsgd) of the authors of EC-SGD,
whose logs have one run of EC-SGD and one of SGD. Their code sets the skeleton weights to one at the start, for SGD as
well; here that start is one of two. Accuracies are in per cent of the 10,000 test images. Nothing was chosen by them
but the *best*; ± is half of a 95 % interval (Student's t over the seeds); seconds are those of one processor.

{runs} runs, {hours:.1f} hours of one processor; {where}.
"""

LATE = """\
## Why the unit rule loses late what it gained

```bash
A="python examples/benchmarks/authors.py --data FOLDER --out examples/benchmarks/authors.jsonl"
$A --seeds 1 --starts torch --epochs 30 --contenders SGD units
$A --seeds 1 --starts torch --epochs 30 --contenders SGD units --decay 0.1
$A --seeds 1 --starts torch --epochs 30 --contenders units --rate 0.01
```

Over SGD the rule multiplies a row's gradient by lr rho / sqrt(q), and q is the running mean of the square of that same
gradient. So a step has the relative length lr, however small gradients have become. SGD's step ends with its gradient:
once the training images are fitted it hardly moves, at any rate (column *moved*). The unit rule moves on by lr, in
directions that are the noise of the batches, and the training loss has a floor that the rate sets. The table has one
seed. The authors' rate is still at exp(-0.3) = 74 % of its start when 30 epochs are over, and there the rule is behind
SGD. When the rate falls ten times as fast, in 30 epochs to the value that theirs has after 300, the rule ends close to
its best epoch, and level with SGD. A tenth of the rate from the start on is no way out. Norms do not
explain it: they grow in all runs, which makes relative steps shorter, as rho is kept from the start. But steps that do
not vanish go on to raise margins, so that the test loss rises while the accuracy stays. Some of the loss is none: the
*best* is the largest of many noisy values. The unit rule wants a rate that ends near zero, as a cosine does.
"""


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        contender: one of those of ``authors.py``.
        start: ``"torch"``, as torch initialises; ``"skeleton"``, then with skeleton weights of one.
        seed: of the weights and of the order of the images.
        epochs: passes over the training images.
        rate: learning rate before it falls.
        decay: the rate in epoch e = 1, 2 ... is rate * exp(-decay * e).
    """

    contender: str
    start: str
    seed: int
    epochs: int = 300
    rate: float = 0.1
    decay: float = 0.01

    @property
    def name(self) -> str:
        """For the file in which an unfinished run is kept."""
        return "-".join(map(str, asdict(self).values()))


@dataclass
class Result:
    """What came of a run, epoch by epoch.

    Args:
        run: which.
        test: accuracy on the 10,000 test images, in per cent.
        test_loss: cross entropy there.
        loss: mean cross entropy of the batches of the epoch.
        norm: Euclidean norm of all weights.
        moved: Euclidean distance from the weights of the epoch before, relative to the norm.
        seconds: processor time of all epochs.
    """

    run: Run
    test: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    seconds: float = 0.0


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


def groups(results: dict[Run, Result]) -> dict[Run, list[Result]]:
    """The results of all seeds, under the run of seed 0."""
    found: dict[Run, list[Result]] = {}
    for run in sorted(results, key=lambda run: (STARTS.index(run.start), [*TITLES].index(run.contender), run.seed)):
        found.setdefault(replace(run, seed=0), []).append(results[run])
    return found


def table(head: str, rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    titles = head.split(" | ")
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _row(run: Run, found: list[Result]) -> list[str]:
    best = [max(result.test) for result in found]
    return [
        TITLES[run.contender],
        str(len(found)),
        Interval.of([result.test[-1] for result in found]).text(2),
        Interval.of(best).text(2),
        f"{statistics.median(result.test.index(max(result.test)) + 1 for result in found):g}",
        f"{statistics.mean(result.loss[-1] for result in found):.2g}",
        f"{statistics.mean(result.test_loss[-1] for result in found):.2g}",
        f"{statistics.mean(result.norm[-1] / result.norm[0] for result in found):.2f}",
        f"{100 * statistics.mean(result.moved[-1] for result in found):.2g} %",
        f"{sum(result.seconds for result in found) / sum(len(result.test) for result in found):.2f}",
    ]


COLUMNS = (
    "seeds | test at the end | best epoch's test | which | training loss | test loss | norm, end / epoch 1 | "
    "moved in the last epoch | s / epoch"
)


def authors_table(found: dict[Run, list[Result]]) -> list[str]:
    """The authors' schedule, from both starts."""
    rows = [[WORDS[run.start], *_row(run, results)] for run, results in found.items()]
    theirs = [["theirs: skeleton of ones", name, "1", value, *[""] * 7] for name, value in THEIRS.items()]
    return table(f"start | contender | {COLUMNS}", rows + theirs)


def course_table(found: dict[Run, list[Result]]) -> list[str]:
    """Mean test accuracy on the way."""
    rows = [
        [WORDS[run.start], TITLES[run.contender]]
        + [f"{statistics.mean(one.test[epoch - 1] for one in results):.2f}" for epoch in COURSE]
        for run, results in found.items()
    ]
    return table(f"start | contender | {' | '.join(map(str, COURSE))}", rows)


def difference_table(found: dict[Run, list[Result]]) -> list[str]:
    """What a contender adds to SGD, and the start to the contender, seed by seed."""
    rows = []
    for run in found:
        against = [replace(run, contender="SGD")] if run.contender != "SGD" else []
        against += [replace(run, start="torch")] if run.start == "skeleton" else []
        for other in against:
            ends = {result.run.seed: result.test[-1] for result in found.get(other, ())}
            pairs = [one.test[-1] - ends[one.run.seed] for one in found[run] if one.run.seed in ends]
            if pairs:
                names = [f"{TITLES[each.contender]}, {WORDS[each.start]}" for each in (run, other)]
                rows.append([*names, str(len(pairs)), Interval.of(pairs).text(2)])
    return table("this | less this | pairs of a seed | test accuracy at the end", rows)


def schedule_table(found: dict[Run, list[Result]]) -> list[str]:
    """Runs with other schedules."""
    rows = [
        [f"{run.rate:g} exp(-{run.decay:g} epoch), {run.epochs} epochs", WORDS[run.start], *_row(run, results)]
        for run, results in sorted(found.items(), key=lambda item: (item[0].decay, item[0].rate))
    ]
    return table(f"rate | start | contender | {COLUMNS}", rows)


def page(path: Path) -> str:
    """``AUTHORS.md``, from the lines of a file.

    Raises:
        ValueError: if a line is not one of this benchmark's.
    """
    results = read_results(path)
    found = groups(results)
    schedule = (Run.epochs, Run.rate, Run.decay)
    main = {run: one for run, one in found.items() if (run.epochs, run.rate, run.decay) == schedule}
    others = {run: one for run, one in found.items() if run not in main}
    seen = sorted({line for line in path.read_text().splitlines() if "run" not in json.loads(line)})
    hours = sum(result.seconds for result in results.values()) / 3600
    where = "; ".join(", ".join(f"{name} {value}" for name, value in json.loads(line).items()) for line in seen)
    lines = [INTRODUCTION.format(runs=len(results), hours=hours, where=where), *authors_table(main), ""]
    if main:
        lines += ["Mean test accuracy after some epochs:", "", *course_table(main), ""]
        lines += ["Differences, seed by seed:", "", *difference_table(main), ""]
    if others:
        lines += [LATE, *schedule_table(others), ""]
    return "\n".join(lines)
