"""What does a step in the equivalent-class space cost beside the step of the base optimizer?

Two copies of a network with the same gradients take their steps in turn, base, equivalent-class form, base and so on,
so that whatever else the machine does falls on both. The base is in its fastest setting, ``fused`` or ``foreach``,
which is measured first. Every combination is one line of JSON, ``step_overhead.jsonl``, and those whose line is there
are not repeated. With ``--report`` nothing is measured: ``STEP_OVERHEAD.md`` and, with ``--readme`` and ``--speed``,
what two pages say are written from the lines that are there::

    python examples/benchmarks/step_overhead.py --out examples/benchmarks
    python examples/benchmarks/step_overhead.py --out examples/benchmarks --report \\
        --readme README.md --speed docs/speed.md

``STEP_OVERHEAD.md`` says what each of the figures is. ``gpu.sh`` runs this on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pages import conditions  # noqa: E402
from step_cases import (  # noqa: E402
    IMPLEMENTATIONS,
    NETWORKS,
    OPTIMIZERS,
    PARTS,
    RULES,
    Base,
    Case,
    Extras,
    Result,
    read_results,
)
from step_memory import held_bytes, usage  # noqa: E402
from step_tables import Figures, device_tables, spread, target_table, write_report  # noqa: E402

from lightning_ecopt import EquivalentClassOptimizer, scaling_group  # noqa: E402

SPREAD = 0.1  # of the logarithms of scales before a refresh
REFRESHES = 3
WARM_UP = 6  # the first step, and those behind it at which gradients and weights are looked at
PROBES = 7  # runs by which the fastest setting is chosen
LEAST_SECONDS = 0.02  # of a run; shorter steps are repeated within it
MOST_STEPS = 50
FEW_STEPS = 10  # which a GPU can have in its queue, so that a step does not wait for a place there


# Measurements ---------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU does not need it."""
    torch.get_device_module(device).synchronize()


def timed(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one of several calls in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return float(f"{(time.perf_counter() - began) / times:.5g}")


def alternate(calls: Sequence[Callable[[], object]], device: torch.device, runs: int) -> list[list[float]]:
    """Seconds of each call, ``runs`` times, in turn, after a warm-up."""
    for _, call in itertools.product(range(WARM_UP), calls):
        call()
    times = max(1, min(MOST_STEPS, math.ceil(LEAST_SECONDS / timed(calls[0], device))))
    rounds = [[timed(call, device, times) for call in calls] for _ in range(runs)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def fastest_setting(net: nn.Module, base: Base, device: torch.device) -> str:
    """``fused`` or ``foreach``, whichever takes less time where both are supported."""
    steps = {}
    for setting in ("fused", "foreach"):
        with contextlib.suppress(RuntimeError):  # not on this device
            step = base.make(net, setting).step
            step()
            steps[setting] = step
    seconds = alternate(list(steps.values()), device, PROBES)
    return min(zip(map(statistics.median, seconds), steps, strict=True))[1]


def set_gradients(net: nn.Module) -> None:
    """Random ones, of a size that keeps their squares far from what float32 cannot hold."""
    for p in net.parameters():
        p.grad = 1e-2 * torch.randn_like(p)


def twin(net: nn.Module) -> nn.Module:
    """A copy with copies of the gradients."""
    other = copy.deepcopy(net)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return other


def equivalent(
    case: Case, net: nn.Module, setting: str, device: torch.device
) -> tuple[EquivalentClassOptimizer, float]:
    """The equivalent-class form, and the seconds that tracing took."""
    example = NETWORKS[case.network].inputs(2).to(device)
    groups = []
    seconds = timed(lambda: groups.append(scaling_group(net, example)), device)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec = EquivalentClassOptimizer(
        base,
        groups[0],
        rule=case.rule,  # type: ignore[arg-type]
        refresh_interval=None,
        implementation=case.implementation,  # type: ignore[arg-type]
    )
    return ec, seconds


def seconds_of_refreshes(ec: EquivalentClassOptimizer, device: torch.device) -> list[float]:
    """Of some steps before which all units were rescaled, with others between: not every step is one of those."""
    found = []
    for _ in range(REFRESHES):
        timed(ec.step, device, WARM_UP)
        assert ec.group is not None
        ec.group.act_(SPREAD * torch.randn(ec.group.num_units, device=device))
        ec.refresh()
        found.append(timed(ec.step, device))
    return found


def measure_step(case: Case, net: nn.Module, setting: str, device: torch.device, runs: int) -> Result:
    """The optimizer step alone."""
    other = twin(net)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec, tracing = equivalent(case, other, setting, device)
    first = timed(ec.step, device)
    seconds = alternate([base.step, ec.step], device, runs)
    (base_peak, base_launches), (ec_peak, ec_launches) = (usage(call, device) for call in (base.step, ec.step))
    refresh = max(0.0, statistics.median(seconds_of_refreshes(ec, device)) - statistics.median(seconds[1]))
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    peaks, launches = (base_peak, ec_peak), (base_launches, ec_launches)
    assert ec.group is not None
    extras = Extras(ec.group.num_units, size, tracing, first, refresh, held_bytes(ec, other), peaks, launches)
    return Result(case, setting, None, *seconds, extras)


def measure_training(
    case: Case,
    net: nn.Module,
    setting: str,
    device: torch.device,
    runs: int,
    batch: int | None = None,
    autocast: bool = False,
) -> Result:
    """Forward, loss, backward and step."""
    other = twin(net)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec, _ = equivalent(case, other, setting, device)
    if autocast:
        ec.follow_precision(lambda: "bf16-mixed")
    inputs = NETWORKS[case.network].inputs_on(device, batch)
    with torch.no_grad():
        shape = net(inputs).shape
    labels = torch.randint(shape[-1], shape[:-1], device=device)

    def train(module: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(module(inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()

    seconds = alternate([lambda: train(net, base), lambda: train(other, ec)], device, runs)
    return Result(case, setting, len(inputs), *seconds, autocast=autocast)


def measure_host(case: Case, net: nn.Module, setting: str, device: torch.device, runs: int) -> Result:
    """The optimizer step until it returns, without waiting for the device."""
    other = twin(net)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec, _ = equivalent(case, other, setting, device)
    for _, step in itertools.product(range(WARM_UP), (base.step, ec.step)):
        step()
    rounds = [[until_return(step, device) for step in (base.step, ec.step)] for _ in range(runs)]
    seconds = [list(one) for one in zip(*rounds, strict=True)]
    return Result(case, setting, None, *seconds, waits=waits(ec.step, device))


def until_return(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of a few steps in a row, of which the device may do the work later."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(FEW_STEPS):
        step()
    seconds = time.perf_counter() - began
    synchronize(device)
    return float(f"{seconds / FEW_STEPS:.5g}")


def waits(step: Callable[[], object], device: torch.device) -> int | None:
    """How often some steps wait for a GPU; ``None`` for other devices."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(FEW_STEPS):
                step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def measure_pause(case: Case, net: nn.Module, setting: str, device: torch.device, runs: int) -> Result:
    """From a new optimizer to the end of its first step, with the trace, where nothing is compiled any more."""

    def base(module: nn.Module) -> None:
        OPTIMIZERS[case.optimizer].make(module, setting).step()

    def ec(module: nn.Module) -> None:
        equivalent(case, module, setting, device)[0].step()

    seconds = [[timed(partial(start, twin(net)), device) for start in (base, ec)] for _ in range(1 + runs)]
    return Result(case, setting, None, *map(list, zip(*seconds[1:], strict=True)))


# All cases ------------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace, network: str) -> Iterator[Case]:
    """What the options ask for."""
    training = options.training
    if training is None:
        training = ["sgd-m", "adamw"] if options.device == "cpu" else list(OPTIMIZERS)
    default_parts = [part for part in PARTS if part != "host" or options.device != "cpu"]
    for optimizer, rule, implementation in itertools.product(
        options.optimizers, options.rules, options.implementations
    ):
        for part in options.parts or default_parts:
            is_asked = {"training": optimizer in training, "pause": NETWORKS[network].has_pause}.get(part, True)
            if is_asked:
                yield Case(part, options.device, network, optimizer, rule, implementation)


def all_conditions(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Versions, hardware, threads and the command."""
    words = ["python examples/benchmarks/step_overhead.py --out FOLDER"]
    for action in parser._actions:
        value = getattr(options, action.dest, action.default)
        if value != parser.get_default(action.dest) and action.dest not in ("out", "readme", "speed"):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[0], *map(str, values)]
    return {
        "on": options.device,
        **conditions(torch.device(options.device)),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "seed": options.seed,
        "runs": f"{options.runs} (whole training steps {options.training_runs})",
        "command": " ".join(words),
    }


@contextlib.contextmanager
def cold_caches() -> Iterator[None]:
    """Compile Triton's kernels into an empty folder, so that the first step has its full price."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def free(device: torch.device) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def measure(case: Case, net: nn.Module, setting: str, options: argparse.Namespace) -> Result:
    """One case."""
    device = torch.device(options.device)
    if case.part == "training":
        runs, batch, autocast = options.training_runs, options.batch, options.autocast
        return measure_training(case, net, setting, device, runs, batch, autocast)
    if case.part == "pause":
        return measure_pause(case, net, setting, device, options.training_runs)
    part = measure_step if case.part == "step" else measure_host
    return part(case, net, setting, device, options.runs)


def run_cases(options: argparse.Namespace, file: TextIO, done: Container[Case]) -> tuple[list[Result], list[str]]:
    """Measure what is not done yet, one network at a time; returns results, and cases that failed."""
    device = torch.device(options.device)
    results, failures = [], []
    for name in options.networks:
        missing = [case for case in cases(options, name) if case not in done]
        if not missing:
            continue
        torch.manual_seed(options.seed)
        net = NETWORKS[name].build().to(device)
        settings: dict[str, str] = {}
        for case in missing:
            set_gradients(net)
            label = " ".join(astuple(case))
            try:
                if case.optimizer not in settings:
                    settings[case.optimizer] = fastest_setting(net, OPTIMIZERS[case.optimizer], device)
                result = measure(case, net, settings[case.optimizer], options)
            except (RuntimeError, ValueError) as error:
                failures.append(f"{label}: {error}")
            else:
                results.append(result)
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                print(f"{label}: {spread(result.ratios)}", flush=True)
            free(device)
        del net
        free(device)
    return results, failures


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of step_overhead.jsonl and STEP_OVERHEAD.md")
    parser.add_argument("--report", action="store_true", help="write STEP_OVERHEAD.md, and measure nothing")
    parser.add_argument("--readme", type=Path, help="file with two markers, to say in short between them")
    parser.add_argument("--speed", type=Path, help="file with two markers, to have a table between them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, choices, default in (
        ("networks", NETWORKS, list(NETWORKS)),
        ("optimizers", OPTIMIZERS, list(OPTIMIZERS)),
        ("rules", RULES, list(RULES)),
        ("implementations", IMPLEMENTATIONS, ["auto"]),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=default)
    described = "; ".join(f"{part}: {what}" for part, what in PARTS.items())
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help=f"{described}; by default all that make sense")
    parser.add_argument(
        "--training",
        nargs="*",
        choices=list(OPTIMIZERS),
        help="optimizers whose whole training steps are measured; by default all, on a CPU sgd-m and adamw",
    )
    parser.add_argument("--runs", type=int, default=30, help="of the optimizer step alone")
    parser.add_argument("--training-runs", type=int, default=10, help="of whole training steps, and of the pause")
    parser.add_argument("--batch", type=int, help="of whole training steps, instead of that of the network")
    parser.add_argument("--autocast", action="store_true", help="whole training steps under autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Measure, or write the report, and show all tables."""
    parser = make_parser()
    options = parser.parse_args()
    if min(options.runs, options.training_runs) < 2:
        parser.error("--runs and --training-runs must be at least 2")
    path = options.out / "step_overhead.jsonl"
    failures: list[str] = []
    try:
        done = read_results(path)
        if not options.report:
            options.out.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file, cold_caches():
                file.write(json.dumps(all_conditions(options, parser)) + "\n")
                results, failures = run_cases(options, file, done)
            done.update({result.case: result for result in results})
        else:
            write_report(path, options.out, options.readme, options.speed)
    except ValueError as error:
        parser.error(str(error))
    figures = Figures(done.values())
    console = Console(width=None if sys.stdout.isatty() else 160)
    for device in dict.fromkeys(r.case.device for r in figures.results):
        for table in (*device_tables(figures, device), target_table(figures)):
            console.print(table.rich())
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
