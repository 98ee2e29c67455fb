"""The figure of the accuracy benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from outcomes import Outcome

STYLES = {  # the plain form dashed, its equivalent-class form solid, in one colour
    "SGD-M": "C0o--",
    "EC-SGD (units)": "C0o-",
    "AdamW": "C1o--",
    "EC-AdamW (units)": "C1o-",
    "Muon": "C2o--",
    "EC-Muon": "C2o-",
}
SHOWN = 15  # times what counts as close, below the best


def plot(found: Mapping[str, Mapping[str, Outcome]], path: Path) -> None:
    """Validation score over the learning rate, one panel for each task that has been run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = {task: {n: o for n, o in outcomes.items() if o.by_rate} for task, outcomes in found.items()}
    found = {task: outcomes for task, outcomes in found.items() if outcomes}
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    handles = {}
    for axis, (task, outcomes) in zip(axes.flat, found.items(), strict=False):
        names = set(STYLES) & set(outcomes) or set(outcomes)
        for name in sorted(names, key=list(outcomes).index):
            rates = sorted(outcomes[name].by_rate.items())
            handles[name] = axis.semilogx(*zip(*rates, strict=True), STYLES.get(name, "o-"), markersize=3)[0]
        metric = next(iter(outcomes.values())).metric
        best = max(max(outcome.searched.values(), default=-math.inf) for outcome in outcomes.values())
        limits = [metric.gain(best - SHOWN * metric.close), metric.gain(best + metric.close)]
        axis.set(title=task, ylim=sorted(limits), ylabel=f"validation {metric.name}, {metric.unit}")
    for axis in list(axes.flat)[len(found) :]:
        axis.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))
    figure.supxlabel("learning rate")
    figure.savefig(path, dpi=120)
    plt.close(figure)
