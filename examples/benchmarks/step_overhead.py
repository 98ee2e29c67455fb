"""What does a step in the equivalent-class space cost beside the step of the base optimizer?

Two copies of a network with the same gradients take their steps in turn, base, equivalent-class form, base and so on,
so that whatever else the machine does falls on both. The base is in its fastest setting, ``fused`` or ``foreach``,
which is measured first. Every combination is one line of JSON, ``step_overhead.jsonl``, and those whose line is there
are not repeated. With ``--report`` nothing is measured: ``STEP_OVERHEAD.md`` and the table of the README are written
from the lines that are there::

    python examples/benchmarks/step_overhead.py --out examples/benchmarks
    python examples/benchmarks/step_overhead.py --out examples/benchmarks --report

``STEP_OVERHEAD.md`` says what each of the figures is.
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
import types
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.profiler import profile, supported_activities

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pages import conditions  # noqa: E402
from step_cases import IMPLEMENTATIONS, NETWORKS, OPTIMIZERS, RULES, Base, Case, Extras, Result, read_results  # noqa: E402
from step_tables import Figures, device_tables, spread, target_table, write_report  # noqa: E402

from lightning_ecopt import EquivalentClassOptimizer, scaling_group  # noqa: E402

SPREAD = 0.1  # of the logarithms of scales before a refresh
WARM_UP = 3
PROBES = 7  # runs by which the fastest setting is chosen
LEAST_SECONDS = 0.02  # of a run; shorter steps are repeated within it
MOST_STEPS = 50
ELSEWHERE = (nn.Module, type, types.ModuleType, types.CodeType, types.FrameType, str, bytes)  # holds nothing of its own


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
    ec.follow_steps(lambda: math.inf, print)  # as in a long training, for which "auto" compiles
    return ec, seconds


def measure_step(case: Case, net: nn.Module, setting: str, device: torch.device, runs: int) -> Result:
    """The optimizer step alone."""
    other = twin(net)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec, tracing = equivalent(case, other, setting, device)
    first = timed(ec.step, device)
    seconds = alternate([base.step, ec.step], device, runs)
    (base_peak, base_launches), (ec_peak, ec_launches) = (usage(call, device) for call in (base.step, ec.step))
    group = ec.group
    assert group is not None
    group.act_(SPREAD * torch.randn(group.num_units, device=device))
    ec.refresh()
    refresh = max(0.0, timed(ec.step, device) - statistics.median(seconds[1]))
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    peaks, launches = (base_peak, ec_peak), (base_launches, ec_launches)
    extras = Extras(group.num_units, size, tracing, first, refresh, held_bytes(ec, other), peaks, launches)
    return Result(case, setting, None, *seconds, extras)


def measure_training(
    case: Case, net: nn.Module, setting: str, device: torch.device, runs: int, batch: int | None
) -> Result:
    """Forward, loss, backward and step."""
    network = NETWORKS[case.network]
    batch = batch or (network.cpu_batch if device.type == "cpu" else 128)
    other = twin(net)
    base = OPTIMIZERS[case.optimizer].make(net, setting)
    ec, _ = equivalent(case, other, setting, device)
    inputs = network.inputs(batch).to(device)
    with torch.no_grad():
        shape = net(inputs).shape
    labels = torch.randint(shape[-1], shape[:-1], device=device)

    def train(module: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    seconds = alternate([lambda: train(net, base), lambda: train(other, ec)], device, runs)
    return Result(case, setting, batch, *seconds)


def usage(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that a step allocates at its peak, and its launches."""
    memory: Any = torch.get_device_module(device)
    before = 0
    if device.type != "cpu":
        synchronize(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
    with profile(activities=supported_activities(), profile_memory=device.type == "cpu") as profiled:
        step()
        synchronize(device)
    events = profiled.events()
    if device.type == "cpu":
        return cpu_peak(profiled), sum(outermost(event) for event in events if event.cpu_parent is None)
    host = {event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU}
    launched = [event for event in events if event.name not in host]  # annotations are on both
    return memory.max_memory_allocated(device) - before, len(launched)


def outermost(event: Any) -> int:
    """Operations that are not part of others, in an event of the profiler; and compiled functions."""
    if "::" in event.name:
        return 1
    return event.name.startswith("Torch-Compiled Region") + sum(map(outermost, event.cpu_children))


def cpu_peak(profiled: profile) -> int:
    """The highest running total of the allocations."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def held_bytes(optimizer: EquivalentClassOptimizer, net: nn.Module) -> int:
    """Of all that can be reached from the optimizer, each storage once; not of the network or of the base's state."""
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    tensors += [entry for entries in optimizer.state.values() for entry in entries.values()]
    known = {_place(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
    held: dict[Any, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [optimizer]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, ELSEWHERE):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            held[_place(item)] = item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray):
            held[item.__array_interface__["data"][0]] = item.nbytes
        elif isinstance(item, types.FunctionType):
            waiting += [item.__closure__, item.__defaults__, item.__kwdefaults__]  # its globals belong to its module
        else:
            waiting += gc.get_referents(item)
    return sum(size for place, size in held.items() if place not in known)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# All cases ------------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace, network: str) -> Iterator[Case]:
    """What the options ask for."""
    training = options.training
    if training is None:
        training = ["sgd-m", "adamw"] if options.device == "cpu" else list(OPTIMIZERS)
    for optimizer, rule, implementation in itertools.product(
        options.optimizers, options.rules, options.implementations
    ):
        for part in ("step", "training") if optimizer in training else ("step",):
            yield Case(part, options.device, network, optimizer, rule, implementation)


def all_conditions(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Versions, hardware, threads and the command."""
    words = ["python examples/benchmarks/step_overhead.py --out FOLDER"]
    for action in parser._actions:
        value = getattr(options, action.dest, action.default)
        if value != parser.get_default(action.dest) and action.dest not in ("out", "readme"):
            words += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
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
    """Compile into an empty folder, so that the first step has its full price."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder, name)) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def free(device: torch.device) -> None:
    """Give back what is not used any more, and forget what was compiled for other shapes."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


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
                setting = settings[case.optimizer]
                if case.part == "step":
                    result = measure_step(case, net, setting, device, options.runs)
                else:
                    result = measure_training(case, net, setting, device, options.training_runs, options.batch)
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of step_overhead.jsonl and STEP_OVERHEAD.md")
    parser.add_argument("--report", action="store_true", help="write STEP_OVERHEAD.md and the table of the README")
    parser.add_argument("--readme", type=Path, default=HERE.parents[1] / "README.md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, choices, default in (
        ("networks", NETWORKS, list(NETWORKS)),
        ("optimizers", OPTIMIZERS, list(OPTIMIZERS)),
        ("rules", RULES, list(RULES)),
        ("implementations", IMPLEMENTATIONS, ["auto"]),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=default)
    parser.add_argument(
        "--training",
        nargs="*",
        choices=list(OPTIMIZERS),
        help="optimizers whose whole training steps are measured; by default all, on a CPU sgd-m and adamw",
    )
    parser.add_argument("--runs", type=int, default=30, help="of the optimizer step alone")
    parser.add_argument("--training-runs", type=int, default=10, help="of whole training steps")
    parser.add_argument("--batch", type=int, help="of whole training steps, instead of 128 or what a CPU can do")
    parser.add_argument("--seed", type=int, default=0)
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
            write_report(path, options.out, options.readme)
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
