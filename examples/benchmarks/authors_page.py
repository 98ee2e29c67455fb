"""The runs of ``authors.py``, and the page that is written of them."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages
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
# The authors' experiment

Written by `authors.py` from the lines of JSON in `authors.jsonl`, which its runs have written:

```bash
python examples/benchmarks/authors.py --data FOLDER --out examples/benchmarks/authors.jsonl --jobs 2 --minutes 60
```

An MLP 784-64-64-64-64-10 without biases on MNIST, all 60,000 images, SGD without momentum, batches of 64, as in the
[public code](https://github.com/MSRA-COLT/gsgd) of the authors of EC-SGD. They train for 300 epochs at the rate
0.1 exp(-0.01 epoch). Accuracies are in per cent of the 10,000 test images, by which nothing was chosen but the *best*
epoch; seconds are those of one processor.

{runs} runs, {hours:.1f} hours of one processor; {where}.
"""

REPEATED = """\
## The authors' schedule

The logs of the authors have one run of EC-SGD and one of SGD. Their code sets the skeleton weights to one at the start,
for SGD as well; *torch's* is the start as torch initialises. ± is half of a 95 % interval (Student's t over the seeds).
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
directions that are the noise of the batches, and the training loss has a floor that the rate sets. The authors' rate is
still at exp(-0.3) = 74 % of its start when 30 epochs are over, and there the rule is behind SGD. When the rate falls
ten times as fast, in 30 epochs to the value that theirs has after 300, the rule ends close to its best epoch, and level
with SGD. A tenth of the rate from the start on is no way out. Norms do not explain it: they grow in all runs, which
makes relative steps shorter, as rho is kept from the start. But steps that do not vanish go on to raise margins, so
that the test loss rises while the accuracy stays. Part of the gap to the *best* is selection: it is the largest of
many noisy values. The unit rule wants a rate that ends near zero, as a cosine does.
"""

OTHERS = """\
## Other schedules
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


AUTHORS_SCHEDULE: dict[str, Any] = {name: getattr(Run, name) for name in ("epochs", "rate", "decay")}
#: Those that the section on late losses speaks of.
LATE_RUNS = [
    *(Run(contender, "torch", 0, 30, 0.1, decay) for decay in (0.01, 0.1) for contender in ("SGD", "units")),
    Run("units", "torch", 0, 30, 0.01, 0.01),
]


@dataclass
class Result:
    """What came of a run, epoch by epoch.

    Args:
        run: which.
        test: accuracy on the 10,000 test images, in per cent.
        test_loss: cross entropy there.
        loss: mean cross entropy of the batches of the epoch.
        norm: Euclidean norm of all weights, of the balanced member of their class.
        moved: Euclidean distance between the balanced members before and after the epoch, relative to the norm.
        seconds: processor time of the training.
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
    return pages.read_results(path, "run", lambda run, **rest: Result(Run(**run), **rest))


def groups(results: dict[Run, Result]) -> dict[Run, list[Result]]:
    """The results of all seeds, under the run of seed 0."""
    found: dict[Run, list[Result]] = {}
    for run in sorted(results, key=lambda run: (STARTS.index(run.start), [*TITLES].index(run.contender), run.seed)):
        found.setdefault(replace(run, seed=0), []).append(results[run])
    return found


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
    "contender",
    "seeds",
    "test at the end",
    "best epoch's test",
    "which",
    "training loss",
    "test loss",
    "norm, end / epoch 1",
    "moved in the last epoch",
    "s / epoch",
)


def authors_table(found: dict[Run, list[Result]]) -> list[str]:
    """The authors' schedule, from both starts."""
    rows = [[WORDS[run.start], *_row(run, results)] for run, results in found.items()]
    theirs = [["theirs: skeleton of ones", name, "1", value, *[""] * 7] for name, value in THEIRS.items()]
    return pages.table(["start", *COLUMNS], rows + theirs)


def course_table(found: dict[Run, list[Result]]) -> list[str]:
    """Mean test accuracy on the way."""
    rows = [
        [WORDS[run.start], TITLES[run.contender]]
        + [f"{statistics.mean(one.test[epoch - 1] for one in results):.2f}" for epoch in COURSE]
        for run, results in found.items()
    ]
    return pages.table(["start", "contender", *map(str, COURSE)], rows)


DIFFERENCES = ("this", "less this", "pairs of a seed", "test accuracy at the end")


def difference_rows(found: dict[Run, list[Result]]) -> list[list[str]]:
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
    return rows


def schedule_table(found: dict[Run, list[Result]]) -> list[str]:
    """Runs with other schedules."""
    rows = [
        [f"{run.rate:g} exp(-{run.decay:g} epoch), {run.epochs} epochs", WORDS[run.start], *_row(run, results)]
        for run, results in sorted(found.items(), key=lambda item: (item[0].decay, item[0].rate))
    ]
    return pages.table(["rate", "start", *COLUMNS], rows)


def page(path: Path) -> str:
    """``AUTHORS.md``, from the lines of a file: sections for whose numbers there are no runs are left out.

    Raises:
        ValueError: if a line is not one of this benchmark's.
    """
    results = read_results(path)
    found = groups(results)
    repeated = {run: one for run, one in found.items() if run == replace(run, **AUTHORS_SCHEDULE)}
    late = {run: found[run] for run in LATE_RUNS} if all(run in found for run in LATE_RUNS) else {}
    others = {run: one for run, one in found.items() if run not in repeated and run not in late}
    where = "; ".join(map(pages.in_words, pages.read_conditions(path)))
    hours = sum(result.seconds for result in results.values()) / 3600
    lines = [INTRODUCTION.format(runs=len(results), hours=hours, where=where)]
    if repeated:
        lines += [REPEATED, *authors_table(repeated)]
        lines += ["Mean test accuracy after some epochs:", "", *course_table(repeated)]
        differences = difference_rows(repeated)
        if differences:
            lines += ["Differences, seed by seed:", "", *pages.table(DIFFERENCES, differences)]
    for text, runs in ((LATE, late), (OTHERS, others)):
        if runs:
            lines += [text, *schedule_table(runs)]
    return "\n".join(lines)
