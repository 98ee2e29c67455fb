"""What the runs of the accuracy benchmark say of one contender on one task, and of two of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from accuracy import best_rate, compared_rates, gains, plain_level, search, search_range
from grid import Grid, Metric
from pages import edge
from scipy import stats
from training import Result, Run

SIGNIFICANT = 0.05


class Interval(NamedTuple):
    """A mean and half of its 95 % interval, by Student's t; NaN of one value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0], math.nan)
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), float(half))

    def text(self, digits: int) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:.{digits}f}{half}"


#: How a table shows the verdicts.
MARKS = {"ahead": "**", "behind": "*", "level": "", "unknown": ""}


class Difference(NamedTuple):
    """Mean gain of the first over the second, positive if it is better, and p of Welch's test (NaN of one seed)."""

    gain: float
    p: float
    metric: Metric

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], metric: Metric) -> Difference:
        gain = metric.gain(statistics.mean(first) - statistics.mean(second))
        if len(first) < 2 or len(second) < 2:
            return cls(gain, math.nan, metric)
        if statistics.pvariance(first) == statistics.pvariance(second) == 0:
            return cls(gain, 1.0 if gain == 0 else 0.0, metric)
        return cls(gain, float(stats.ttest_ind(first, second, equal_var=False).pvalue), metric)

    @property
    def verdict(self) -> str:
        """``ahead``, ``behind``, ``level``, or ``unknown`` of one seed."""
        if math.isnan(self.p):
            return "unknown"
        if not self.p < SIGNIFICANT:
            return "level"
        return "ahead" if self.gain > 0 else "behind"

    def text(self) -> str:
        value = f"{self.gain:+.{self.metric.digits}f}"
        mark = MARKS[self.verdict]
        p = "one seed" if math.isnan(self.p) else f"p = {self.p:.2g}"
        return f"{mark}{value}{mark} ({p})"


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """Those that are significant although so many were looked at (S. Holm, Scand. J. Statist. 6 (1979))."""
    known = sorted((one for one in differences if not math.isnan(one.p)), key=lambda one: one.p)
    passed = [one.p <= SIGNIFICANT / (len(known) - number) for number, one in enumerate(known)]
    return known[: passed.index(False) if False in passed else None]


class Factor(NamedTuple):
    """A factor, such as that of the largest over the smallest good rate.

    Args:
        value: positive.
        mark: ``>`` or ``<`` if it is only known to be larger or smaller than the value, ``~`` if not even that.
    """

    value: float
    mark: str = ""

    def text(self, digits: int) -> str:
        return f"{self.mark} {self.value:.{digits}f}".strip()

    def __truediv__(self, other: Factor) -> Factor:
        inverse = {"<": ">", ">": "<"}
        return Factor(self.value / other.value, _common_mark([self.mark, inverse.get(other.mark, other.mark)]))

    @classmethod
    def mean(cls, factors: Sequence[Factor]) -> Factor:
        """The geometric mean."""
        logarithms = [math.log(factor.value) for factor in factors]
        return cls(math.exp(statistics.mean(logarithms)), _common_mark([factor.mark for factor in factors]))


def _common_mark(marks: Iterable[str]) -> str:
    """What is known of a product of factors with these marks."""
    found = set(marks) - {""}
    return found.pop() if len(found) == 1 else "~" if found else ""


class Outcome:
    """What one contender reached on one task, as far as it was run.

    Attributes:
        rates: that are compared, by kind; without ``best`` if its search is not over.
        by_rate: validation scores of all rates that have all seeds of the search.
        searched: gains of the rates among which the best is chosen.
    """

    def __init__(self, grid: Grid, results: Mapping[Run, Result], task: str, contender: str) -> None:
        self.metric = grid.tasks[task].metric
        self._runs = [r for r in results.values() if (r.run.task, r.run.contender) == (task, contender)]
        self.searched, _ = search(grid, task, contender, results)
        self._around, self._wanted_around = search_range(grid, task, contender, results)
        self._plain_level = plain_level(grid, task, contender, results)
        self.rates = compared_rates(grid, task, contender, results)
        tried = sorted({result.run.rate for result in self._runs if not result.run.scale})
        found = gains(grid, task, contender, tried, results)
        self.by_rate = {rate: self.metric.gain(gain) for rate, gain in found.items()}
        self.wants_rescaled = grid.contenders[contender].rescaled
        self.seeds = grid.seeds
        self._has_plain = grid.plain(task, contender) is not None
        self._points = max((len(r.curve) for r in results.values() if r.run.task == task), default=0)

    def runs(self, kind: str = "best", rescaled: bool = False) -> list[Result]:
        """The runs at one of the compared rates, by seed."""
        rate = self.rates.get(kind)
        chosen = [r for r in self._runs if r.run.rate == rate and bool(r.run.scale) is rescaled]
        return sorted(chosen, key=lambda result: result.run.seed)

    def tests(self, kind: str = "best", rescaled: bool = False) -> list[float]:
        """Test scores at one of the compared rates."""
        return [result.test for result in self.runs(kind, rescaled)]

    def missing(self) -> str:
        """What has not been run, in words; empty if nothing."""
        if not self._runs:
            return "not run"
        if "best" not in self.rates:
            return "the search is not over"
        wanted = {kind: len(self.tests(kind)) for kind in self.rates}
        if self._has_plain and "plain" not in self.rates:
            wanted["plain"] = 0
        if self.wants_rescaled:
            wanted["rescaled"] = len(self.tests(rescaled=True))
        seeds = [f"{kind} {number} of {self.seeds}" for kind, number in wanted.items() if number < self.seeds]
        rates = [f"{rate:g}" for rate in sorted(self._wanted_around)]
        parts = {"seeds": seeds, "rates for the range": rates}
        return "; ".join(f"{name}: {', '.join(values)}" for name, values in parts.items() if values)

    def width(self) -> Factor:
        """Largest over smallest rate at which it is close to its own best."""
        return self._width(max(self.searched.values()) - self.metric.close)

    def width_as_plain(self) -> Factor | None:
        """Largest over smallest rate at which it is at least close to the plain form's best; ``< 1`` if at none.

        Returns:
            ``None`` if it is no form of another contender, or the best rate of that is not known.
        """
        return None if self._plain_level is None else self._width(self._plain_level)

    def _width(self, level: float) -> Factor:
        """Of the rates around the best whose gain is at the level, by interpolation between logarithms of rates."""
        points = [(math.log(rate), gain) for rate, gain in self._around.items()]
        top = list(self._around).index(best_rate(self.searched))
        if points[top][1] < level:
            return Factor(1.0, "<")
        (high, high_is_found), (low, low_is_found) = edge(points[top:], level), edge(points[top::-1], level)
        return Factor(math.exp(high - low), "" if high_is_found and low_is_found else ">")

    def steps_to(self, loss: float) -> float:
        """Share of the steps, in per cent, after which the running training loss is down at ``loss`` (median).

        The curve of a run that was given up is shorter: all steps are those of the longest one of the task.
        """
        shares = []
        for result in self.runs():
            reached = (k for k, value in enumerate(result.curve, 1) if value is not None and value <= loss)
            shares.append(100 * next(reached, math.inf) / self._points)
        return statistics.median(shares)

    def mean(self, name: str) -> float:
        """Mean of a number of the runs at the best rate: ``seconds``, ``state_bytes`` or ``loss``."""
        return statistics.mean(getattr(result, name) for result in self.runs())


def outcomes_of(grid: Grid, results: Mapping[Run, Result]) -> dict[str, dict[str, Outcome]]:
    """By task and contender."""
    return {task: {name: Outcome(grid, results, task, name) for name in grid.of(task)} for task in grid.tasks}


def one_rate(grid: Grid, found: Mapping[str, Mapping[str, Outcome]], contender: str) -> tuple[float, dict[str, float]]:
    """The rate that is best for all tasks together, and by how much it falls behind the best of each, on validation.

    It is the one with the least largest loss, in units of what counts as close; of those tried on every task.
    """
    mine = {task: outcomes[contender] for task, outcomes in found.items() if contender in outcomes}
    common = set.intersection(*(set(outcome.searched) for outcome in mine.values()))
    lost = {
        rate: {task: outcome.searched[rate] - max(outcome.searched.values()) for task, outcome in mine.items()}
        for rate in common
    }
    if not lost:
        return math.nan, {}
    best = best_rate({rate: min(lost[rate][task] / mine[task].metric.close for task in mine) for rate in lost})
    return best, lost[best]
