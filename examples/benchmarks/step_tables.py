"""Targets and tables of ``step_overhead.py``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pages import between_markers, in_words, read_conditions, table
from rich.table import Table
from step_cases import IMPLEMENTATIONS, NETWORKS, OPTIMIZERS, PARTS, RULES, Case, Result, read_results

EPOCH = 500  # steps from one refresh to the next
LEGEND = """Written by `step_overhead.py --report` from the lines of JSON that it wrote before; its docstring says how.

Two copies of a network with the same gradients take their steps in turn; *base* is the faster one of `fused` and
`foreach`. A *ratio* is the median over neighbouring runs, with its quartiles, times are medians. *Held* is the memory
of all tensors and arrays that can be reached from the equivalent-class optimizer, the scaling group among them, but for
weights, gradients, buffers and the state of the base optimizer. *Peak* is by how much more a step allocates at its peak
than one of the base. Both are shares of the memory of the parameters. *Launches* of a step, base to equivalent-class
form, are all events of the device, such as kernels and copies; on the CPU the outermost ATen operations, among which
those in C do not count. The *first step* balances, compiles (on a GPU, without what was compiled before) and makes the
state of the base optimizer; a *refresh* is what a step takes longer than others if all units were rescaled by exp(N(0,
0.1)) before it, the median of three. It is compared with 500 training steps of the base at the batch that is given.
*Steps*, beside the measured ratio of whole training steps, which also varies with everything else in them, is the
difference of the steps alone as a share of a training step of the base; *bf16* is autocast to bfloat16. The *host time*
of a step on an accelerator ends when the call returns, ten in a row; *waits* counts operations in ten steps, none a
refresh or just behind one, for which the host waits until the GPU is done. The *pause* at the start of a fit is from a
new optimizer to the end of its first step, the trace included, where nothing is compiled any more.

What has a target is *met* or *missed*.
"""


def any_result(result: Result) -> bool:
    """All results of a part."""
    return True


@dataclass(frozen=True)
class Target:
    """What a figure should not exceed, on a CPU and on an accelerator.

    Args:
        title: in the table.
        part: of the cases that it is meant for.
        figure: name of a function of :class:`Figures`.
        cpu: limit; ``None`` if it is not meant for a CPU.
        accelerator: limit; ``None`` if it is not meant for an accelerator.
        is_meant_for: says of a result of the part whether it is one of those.
    """

    title: str
    part: str
    figure: str
    cpu: float | None
    accelerator: float | None
    is_meant_for: Callable[[Result], bool] = any_result

    def limit(self, result: Result) -> float | None:
        """``None`` where it is not meant for the result."""
        if result.case.part != self.part or not self.is_meant_for(result):
            return None
        return self.cpu if result.case.device == "cpu" else self.accelerator


def is_large_with(optimizer: str, rule: str) -> Callable[[Result], bool]:
    """Results of large networks with an optimizer and a rule."""

    def holds(result: Result) -> bool:
        case = result.case
        return (case.optimizer, case.rule) == (optimizer, rule) and NETWORKS[case.network].is_large

    return holds


TARGETS = (
    Target("EC-SGD with momentum (units), step alone", "step", "ratio", 1.6, 1.5, is_large_with("sgd-m", "unit")),
    Target("EC-SGD with momentum (paths), step alone", "step", "ratio", 1.7, 1.7, is_large_with("sgd-m", "path")),
    Target("EC-AdamW (units), step alone", "step", "ratio", 1.6, 1.5, is_large_with("adamw", "unit")),
    Target("EC-AdamW (paths), step alone", "step", "ratio", 1.7, 1.7, is_large_with("adamw", "path")),
    Target(
        "whole training step, batch 128 (CNN)",
        "training",
        "ratio",
        1.02,
        None,
        lambda result: result.batch == 128 and NETWORKS[result.case.network].is_cnn,
    ),
    Target(
        "whole training step, bf16",
        "training",
        "ratio",
        None,
        1.01,
        lambda result: result.autocast and NETWORKS[result.case.network].is_large,
    ),
    Target("host time of ResNet-50, ms", "host", "host", None, 1.0, lambda result: result.case.network == "resnet50"),
    Target("waits for the device in ten steps", "host", "waits", None, 0),
    Target("memory held, share of the parameters", "step", "held", 0.01, 0.01),
    Target("memory at the peak of a step, share of the parameters", "step", "peak", 0.015, 0.015),
    Target(f"refresh, share of {EPOCH} training steps", "step", "refresh", 0.01, 0.01),
)


class Figures:
    """Figures of results, some of which need other results."""

    def __init__(self, results: Iterable[Result]) -> None:
        def order(result: Result) -> list[int]:
            names = ("network", "optimizer", "rule", "implementation")
            tables: tuple[Iterable[str], ...] = (NETWORKS, OPTIMIZERS, RULES, IMPLEMENTATIONS)
            return [list(table).index(getattr(result.case, name)) for table, name in zip(tables, names, strict=True)]

        self.results = sorted(results, key=lambda result: (result.case.device, *order(result)))

    def find(self, **wanted: str) -> list[Result]:
        """Results of cases with these entries."""
        return [r for r in self.results if all(getattr(r.case, name) == value for name, value in wanted.items())]

    def ratio(self, result: Result) -> float:
        """Of the times."""
        return statistics.median(result.ratios)

    def host(self, result: Result) -> float:
        """Milliseconds of the equivalent-class form."""
        return 1e3 * statistics.median(result.ec)

    def waits(self, result: Result) -> int | None:
        """For the device, in ten steps; ``None`` on a CPU."""
        return result.waits

    def held(self, result: Result) -> float:
        """Relative to the parameters."""
        assert result.extras is not None
        return result.extras.held / result.extras.parameters

    def peak(self, result: Result) -> float:
        """By how much a step's peak is above that of the base, relative to the parameters."""
        assert result.extras is not None
        base, ec = result.extras.peaks
        return max(0, ec - base) / result.extras.parameters

    def refresh(self, result: Result) -> float | None:
        """Relative to an epoch of plain training; ``None`` where no training of this network was measured."""
        assert result.extras is not None
        case = result.case
        training = self.find(part="training", device=case.device, network=case.network)
        same = [r for r in training if r.case.optimizer == case.optimizer] or training
        return result.extras.refresh / (EPOCH * statistics.median(same[0].base)) if same else None

    def added(self, training: Result) -> str:
        """By how much the steps alone differ, as a share of a whole training step of the base."""
        for step in self.find(**{**asdict(training.case), "part": "step"}):
            difference = statistics.median(step.ec) - statistics.median(step.base)
            return f"{100 * difference / statistics.median(training.base):.3g} %"
        return ""

    def verdict(self, figure: str, result: Result) -> str:
        """``met`` or ``missed``; empty without a target."""
        value = getattr(self, figure)(result)
        for target in TARGETS:
            limit = target.limit(result)
            if target.figure == figure and limit is not None and value is not None:
                return "met" if value <= limit else "missed"
        return ""

    def judged(self, figure: str, result: Result) -> str:
        """The figure with its verdict."""
        value = getattr(self, figure)(result)
        if value is None:
            return ""
        if figure == "ratio":
            text = spread(result.ratios)
        else:
            text = f"{value:.4g}" if figure in ("host", "waits") else f"{100 * value:.3g} %"
        return " ".join(filter(None, (text, self.verdict(figure, result))))


@dataclass(frozen=True)
class Tabulated:
    """A table, for the terminal and in Markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> list[str]:
        return table(self.header, self.rows)

    def rich(self) -> Table:
        shown = Table(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            shown.add_row(*row)
        return shown


def spread(ratios: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def launches(result: Result) -> str:
    """Those of the base and of the equivalent-class form."""
    assert result.extras is not None
    return "{} to {}".format(*result.extras.launches)


def target_table(figures: Figures) -> Tabulated:
    """How many figures meet each target, and the one that is farthest from it."""
    rows = []
    for target, device in itertools.product(TARGETS, dict.fromkeys(r.case.device for r in figures.results)):
        figure = getattr(figures, target.figure)
        meant = [r for r in figures.find(device=device) if target.limit(r) is not None]
        values = {r.case: value for r in meant if (value := figure(r)) is not None}
        if values:
            limit = target.cpu if device == "cpu" else target.accelerator
            met = sum(value <= limit for value in values.values())
            worst = max(values, key=lambda case: values[case])
            named = f"{values[worst]:.3g}: {NETWORKS[worst.network].title}, {described(worst)}"
            rows.append([target.title, device, f"{limit:g}", str(met), str(len(values) - met), named])
    return Tabulated("Targets", ["target", "device", "at most", "met", "missed", "largest"], rows)


def described(case: Case) -> str:
    """Optimizer, rule and implementation."""
    return ", ".join((OPTIMIZERS[case.optimizer].title, case.rule, case.implementation))


def device_tables(figures: Figures, device: str) -> list[Tabulated]:
    """The tables of all results of a device; tables without a row are left out."""
    rows: dict[str, list[list[str]]] = {part: [] for part in (*PARTS, "once")}
    for r in figures.find(device=device):
        start = [NETWORKS[r.case.network].title, described(r.case), r.setting]
        times = [f"{1e3 * statistics.median(seconds):.4g}" for seconds in (r.base, r.ec)]
        row = [*start, *times, figures.judged("ratio", r)]
        if r.case.part == "training":
            batch = f"{r.batch}, bf16" if r.autocast else str(r.batch)
            row = [*start, batch, *row[3:], figures.added(r)]
        elif r.case.part == "host":
            row = [*start, times[0], figures.judged("host", r), row[-1], figures.judged("waits", r)]
        elif r.extras is not None:
            row += [figures.judged("held", r), figures.judged("peak", r), launches(r)]
            seconds = [f"{value:.3g}" for value in (r.extras.tracing, r.extras.first, r.extras.refresh)]
            rows["once"].append([*start[:2], f"{r.extras.units:,}", *seconds, figures.judged("refresh", r)])
        rows[r.case.part].append(row)
    start, times = ["network", "optimizer, rule, implementation", "base"], ["base, ms", "EC, ms", "ratio"]
    tables = [
        Tabulated(f"Optimizer step alone, {device}", [*start, *times, "held", "peak", "launches"], rows["step"]),
        Tabulated(f"Host time of a step, {device}", [*start, *times, "waits"], rows["host"]),
        Tabulated(f"Whole training step, {device}", [*start, "batch", *times, "steps"], rows["training"]),
        Tabulated(f"Pause at the start of a fit, {device}", [*start, *times], rows["pause"]),
        Tabulated(
            f"Start and refresh, {device}",
            [*start[:2], "H", "tracing, s", "first step, s", "refresh, s", f"of {EPOCH} training steps"],
            rows["once"],
        ),
    ]
    return [one for one in tables if one.rows]


# The README and the page about speed ----------------------------------------------------------------------------------


SHOWN = ("sgd-m", "adamw")
TRAINED = ("bf16", "CNNs, batch 128")  # whose training steps have a target, on an accelerator and on a CPU
NOT_MEASURED = "not measured"


def sentences(figures: Figures) -> list[str]:
    """For the README: how many times as long steps take on large networks, a line for each device."""

    def ranges(part: str, device: str, rule: str) -> str:
        where = {"device": device, "implementation": "auto", "rule": rule}
        found = {one: ratios(figures, part, {**where, "optimizer": one}).partition(",")[0] for one in SHOWN}
        return " and ".join(f"{found[one] or NOT_MEASURED} ({OPTIMIZERS[one].title})" for one in SHOWN)

    return [
        f"On large networks ({device}) an optimizer step takes {ranges('step', device, 'unit')} times as long as that "
        f"of torch, fused; with the rule `path` {ranges('step', device, 'path')} times. A whole training step takes "
        f"{ranges('training', device, 'unit')} times as long where it has a target ({TRAINED[device == 'cpu']})."
        for device in dict.fromkeys(r.case.device for r in figures.results)
    ]


def short_table(figures: Figures) -> Tabulated:
    """For the page about speed: a row for each figure of a device, a column for each optimizer and rule."""
    columns = list(itertools.product(SHOWN, RULES))
    header = ["device", "", *(f"{OPTIMIZERS[optimizer].title}, {rule}" for optimizer, rule in columns)]
    parts: dict[str, Callable[[Figures, dict[str, str]], str]] = {
        "step alone": lambda found, case: ratios(found, "step", case),
        "whole training step": lambda found, case: ratios(found, "training", case),
        "small MLP, step alone": small_ratio,
        "host time of ResNet-50, ms": host_time,
        "pause of ResNet-18, s": pause,
    }
    rows = []
    for device in dict.fromkeys(r.case.device for r in figures.results):
        for title, cell in parts.items():
            if device == "cpu" and cell is host_time:  # there it is the time of the step
                continue
            where = {"device": device, "implementation": "auto"}
            cases = [{**where, "optimizer": optimizer, "rule": rule} for optimizer, rule in columns]
            rows.append([device, title, *(cell(figures, case) or NOT_MEASURED for case in cases)])
    return Tabulated("In short", header, rows)


def ratios(figures: Figures, part: str, case: dict[str, str]) -> str:
    """The range of the ratios that have a target, and how many meet it."""
    judged = [r for r in figures.find(part=part, **case) if figures.verdict("ratio", r)]
    if not judged:
        return ""
    values, met = list(map(figures.ratio, judged)), sum(figures.verdict("ratio", r) == "met" for r in judged)
    span = list(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
    return f"{' to '.join(span)}, {met} of {len(judged)} met"


def small_ratio(figures: Figures, case: dict[str, str]) -> str:
    """The ratio of the small MLP."""
    return "; ".join(spread(r.ratios) for r in figures.find(part="step", network="mlp-small", **case))


def host_time(figures: Figures, case: dict[str, str]) -> str:
    """Those of the base and of the equivalent-class form."""
    found = figures.find(part="host", network="resnet50", **case)
    return "; ".join(f"{1e3 * statistics.median(r.base):.2g} to {figures.judged('host', r)}" for r in found)


def pause(figures: Figures, case: dict[str, str]) -> str:
    """By how much longer it is than that of the base; and the first step on a GPU, where it compiles."""
    where = {"network": "resnet18", **case}
    pauses = [statistics.median(r.ec) - statistics.median(r.base) for r in figures.find(part="pause", **where)]
    steps = [] if case["device"] == "cpu" else figures.find(part="step", **where)
    firsts = [r.extras.first for r in steps if r.extras is not None]
    return "; ".join([*(f"{one:.2g}" for one in pauses), *(f"{one:.2g} if it compiles" for one in firsts)])


# The page -------------------------------------------------------------------------------------------------------------


def write_report(results_path: Path, folder: Path, readme: Path | None = None, speed: Path | None = None) -> None:
    """Write ``STEP_OVERHEAD.md``, the sentences of a README and the table of a page about speed.

    Raises:
        ValueError: if there are no results, or a file has no place for them.
    """
    results = read_results(results_path)
    if not results:
        raise ValueError(f"{results_path} holds no results: measure first.")
    figures = Figures(results.values())
    texts = {
        path: between_markers(path, name, lines)
        for path, name, lines in (
            (readme, "cost", sentences(figures)),
            (speed, "step overhead", short_table(figures).markdown()),
        )
        if path is not None
    }
    lines = ["# Results of the step-overhead benchmark", "", LEGEND, "Measured with", ""]
    lines += [f"- {in_words(one)}" for one in read_conditions(results_path)]
    lines += ["", *target_table(figures).markdown()]
    for device in dict.fromkeys(r.case.device for r in figures.results):
        for one in device_tables(figures, device):
            lines += [f"## {one.title}", "", *one.markdown()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "STEP_OVERHEAD.md").write_text("\n".join(lines))
    for path, text in texts.items():
        path.write_text(text)
