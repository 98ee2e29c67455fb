"""What does it cost to find the scaling group of a network of real size?

Each architecture is traced in a process of its own: once for the first call and its memory, then ``--repeats`` times,
in training mode. The committed figures, ``tracing.jsonl`` and ``TRACING.md``, were made by::

    python examples/benchmarks/tracing.py --out examples/benchmarks

Memory is resident memory at its peak in the first call less that before it: weights and imported modules are there
before, and what the call itself imports is counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from architectures import ARCHITECTURES, Architecture
from pages import conditions, in_words

from lightning_ecopt import ScalingGroup, scaling_group


@dataclass(frozen=True)
class Cost:
    """What tracing one architecture costs.

    Args:
        name: of the architecture.
        units: freedoms H.
        parameters: number of scalar parameters m.
        integers: how many the group holds to number its units.
        first: seconds of the first call.
        seconds: of the calls after it.
        forward: seconds of plain forward calls without gradients; none without weights.
        peak: bytes of resident memory that the first call added at its peak.
    """

    name: str
    units: int
    parameters: int
    integers: int
    first: float
    seconds: list[float]
    forward: list[float]
    peak: int

    @property
    def verdict(self) -> str:
        """``met`` or ``missed``, by the median; empty without a target."""
        target = ARCHITECTURES[self.name].target
        if target is None:
            return ""
        return "met" if statistics.median(self.seconds) <= target else "missed"


def count_integers(group: ScalingGroup) -> int:
    """Elements of all tensors and arrays that the group holds, but for the parameters themselves."""
    held: dict[int, int] = {}
    seen: set[int] = {id(group.parameters)}
    waiting: list[Any] = [group]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, str | nn.Parameter):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor | np.ndarray):
            held[id(item)] = item.numel() if isinstance(item, Tensor) else item.size
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, Sequence):
            waiting.extend(item)
        elif dataclasses.is_dataclass(item):
            waiting.extend(getattr(item, field.name) for field in dataclasses.fields(item))
    return sum(held.values())


def peak_memory(*, reset: bool = False) -> int:
    """The most bytes that have been resident since the last ``reset``.

    Where the peak cannot be reset (other systems than Linux), it is that of the whole process.
    """
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        refs.write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return round(time.perf_counter() - began, 5)


def measure(name: str, repeats: int) -> Cost:
    """Trace one architecture in this process."""
    architecture = ARCHITECTURES[name]
    with torch.device(architecture.device):
        net, example = architecture.build(), architecture.example()
    groups = []
    before = peak_memory(reset=True)
    first = timed(lambda: groups.append(scaling_group(net, example)))
    peak = peak_memory() - before
    group = groups.pop()
    sizes = (group.num_units, group.num_parameters, count_integers(group))
    del group
    seconds = [timed(lambda: scaling_group(net, example)) for _ in range(repeats)]
    forward = []
    if architecture.device != "meta":
        with torch.no_grad():
            forward = [timed(lambda: net(example)) for _ in range(repeats + 1)][1:]
    return Cost(name, *sizes, first, seconds, forward, peak)


def measure_apart(name: str, repeats: int) -> Cost:
    """Trace one architecture in a process of its own.

    Raises:
        RuntimeError: if that fails.
    """
    command = [sys.executable, __file__, "--only", name, "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed, see above")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def all_conditions() -> dict[str, Any]:
    """Versions, hardware and threads."""
    return {
        **conditions(torch.device("cpu")),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def spread(seconds: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def row(cost: Cost) -> str:
    """One line of the table."""
    architecture: Architecture = ARCHITECTURES[cost.name]
    ratio = statistics.median(cost.seconds) / statistics.median(cost.forward) if cost.forward else None
    cells = [
        architecture.title,
        f"{cost.parameters:,}",
        f"{cost.units:,}",
        f"{cost.integers:,}",
        f"{100 * cost.integers / cost.parameters:.3g} %",
        f"{cost.integers / cost.units:.1f}" if cost.units else "",
        f"{cost.first:.3g}",
        spread(cost.seconds),
        "" if architecture.target is None else f"{architecture.target:g}",
        cost.verdict,
        spread(cost.forward) if cost.forward else "",
        "" if ratio is None else f"{ratio:.2g}",
        f"{cost.peak / 2**20:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def report(costs: Sequence[Cost], options: str, where: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    return "\n".join(
        [
            "# Results of the tracing benchmark",
            "",
            "Time and memory of `scaling_group(module, example)`, one image or 16 tokens at a time; "
            "the docstring of `tracing.py` says how they are taken. Made by",
            "",
            "```sh",
            f"python examples/benchmarks/tracing.py --out FOLDER{options}",
            "```",
            "",
            f"with {in_words(where)}.",
            "",
            "*H* is the number of units, *integers* what the group holds to number them. Seconds are the median (range)"
            f" of {len(costs[0].seconds) if costs else 0} calls after the first, *forward* those of the plain forward"
            " call on the CPU without gradients, *ratio* that of the medians. *Memory* is the resident memory that the"
            " first call adds at its peak, in MiB. A target is met if the median is within it.",
            "",
            "| architecture | parameters m | H | integers | of m | per unit | first call, s | seconds | target, s | "
            "| forward, s | ratio | memory |",
            "|---|" + "---:|" * 8 + "---|" + "---:|" * 3,
            *map(row, costs),
            "",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write to; without it, one architecture is printed")
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), help="some of the architectures")
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    names = arguments.only or list(ARCHITECTURES)
    if arguments.out is None:
        if len(names) > 1:
            parser.error("--out is needed for more than one architecture")
        print(json.dumps(dataclasses.asdict(measure(names[0], arguments.repeats))))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    where = all_conditions()
    costs, failures = [], []
    with (arguments.out / "tracing.jsonl").open("w") as file:
        file.write(json.dumps(where) + "\n")
        for name in names:
            try:
                cost = measure_apart(name, arguments.repeats)
            except RuntimeError as error:
                failures.append(str(error))
                continue
            costs.append(cost)
            file.write(json.dumps(dataclasses.asdict(cost)) + "\n")
            file.flush()
            print(f"{name}: {spread(cost.seconds)} s {cost.verdict}", flush=True)
    options = f" --repeats {arguments.repeats}" + (" --only " + " ".join(arguments.only) if arguments.only else "")
    (arguments.out / "TRACING.md").write_text(report(costs, options, where))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
