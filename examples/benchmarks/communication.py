"""How many bytes do ranks exchange for a step, beyond those of the plain optimizer?

Two processes on a CPU train networks of several widths, by DDP and by FSDP2. Every collective is counted by the larger
of what goes in and what comes out, on one rank. The committed page, ``COMMUNICATION.md``, was made by::

    python examples/benchmarks/communication.py --out examples/benchmarks
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))

from pages import conditions, in_words, table

from lightning_ecopt import EquivalentClassOptimizer, scaling_group

RANKS = 2
WIDTHS = (32, 128, 512)
#: The last step of an interval does nothing but a step; in those behind its refresh, gradients are looked at, too.
STEPS, REFRESH = 16, 8
BASES: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "SGD-M": lambda parameters: SGD(parameters, lr=0.03, momentum=0.9),
    "AdamW": lambda parameters: AdamW(parameters, lr=3e-3),
}
HOOKS: dict[str, Callable[[DistributedDataParallel], object]] = {
    "DDP": lambda module: None,
    "DDP, fp16": lambda module: module.register_comm_hook(None, fp16_compress_hook),
}
STRATEGIES = (*HOOKS, "FSDP2")
PAGE = """# Bytes that ranks exchange

Two processes, gloo, {where}. Networks of three linear layers with m weights in float32 and H units. Made by

```sh
python examples/benchmarks/communication.py --out FOLDER
```

*Plain* is what a step exchanges on one rank without this package. To its right is what this package adds:

- *a step*: between refreshes;
- *a look*: at most, in one of the steps behind some refreshes, in which gradients and weights are checked;
- *a refresh*: in a step in which weights are balanced;
- *the first*: in the first step, in which ranks compare the freedoms that they have found.

From one width to the next, weights grow sixteenfold, and units fourfold. So does what is added: bytes for each unit.
"""


@dataclass(frozen=True)
class Cost:
    """What a step exchanges on one rank, in bytes.

    Args:
        width: of the network.
        strategy: one of ``STRATEGIES``.
        base: the name of the base optimizer.
        rule: how its steps are taken.
        plain: of a step without this package.
        step: more than that, in a step between refreshes.
        look: at most, in one in which gradients and weights are looked at.
        refresh: in one with a refresh.
        first: in the first one, in which the group is found.
    """

    width: int
    strategy: str
    base: str
    rule: str
    plain: int
    step: int
    look: int
    refresh: int
    first: int

    @property
    def units(self) -> int:
        """H."""
        return 2 * self.width

    @property
    def weights(self) -> int:
        """m."""
        return 3 * self.width * (self.width + 1)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the collectives that run while it is entered.

    Attributes:
        bytes: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes += max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args)
        return func(*args, **(kwargs or {}))


def network(width: int) -> nn.Sequential:
    """2 * ``width`` units, 3 * ``width``**2 weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


def traffic(width: int, strategy: str, base: str, rule: str | None) -> list[int]:
    """The bytes of each step, with the forward and the backward pass; ``rule=None`` is the plain optimizer."""
    net, x = network(width), torch.randn(8, width)
    module: nn.Module = net
    if strategy == "FSDP2":
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
    else:
        module = DistributedDataParallel(net)
        HOOKS[strategy](module)
    optimizer = BASES[base](net.parameters())
    if rule is not None:
        group = scaling_group(net, x) if strategy == "FSDP2" else None
        optimizer = EquivalentClassOptimizer(optimizer, group, rule=rule, refresh_interval=REFRESH)
    found = []
    for _ in range(STEPS):
        with Traffic() as counted:
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(counted.bytes)
    return found


def costs(width: int, strategy: str, base: str) -> Iterator[Cost]:
    """Of each rule that works with the strategy."""
    plain = traffic(width, strategy, base, None)
    for rule in ("unit",) if strategy == "FSDP2" else ("unit", "path"):
        ours = traffic(width, strategy, base, rule)
        more = [a - b for a, b in zip(ours, plain, strict=True)]
        look = max(more[REFRESH + 1 :])
        yield Cost(width, strategy, base, rule, plain[-1], more[-1], look, more[REFRESH], more[0])


def run(rank: int, folder: Path, widths: Sequence[int], strategies: Sequence[str], bases: Sequence[str]) -> None:
    """What one process does; the first one writes what it finds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = [cost for case in product(widths, strategies, bases) for cost in costs(*case)]
    if rank == 0:
        (folder / "costs.json").write_text(json.dumps([asdict(cost) for cost in found]))
    distributed.destroy_process_group()
    os._exit(0)  # as Python ends, a thread of gloo that still runs would abort the process, once in a while


def measure(
    widths: Sequence[int] = WIDTHS, strategies: Sequence[str] = STRATEGIES, bases: Sequence[str] = tuple(BASES)
) -> list[Cost]:
    """Start the processes and return what they find."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (Path(folder), widths, strategies, bases), nprocs=RANKS)
        return [Cost(**cost) for cost in json.loads((Path(folder) / "costs.json").read_text())]


def report(found: Sequence[Cost]) -> str:
    """The page."""
    header = ["strategy", "base", "rule", "m", "H", "plain", "a step", "a look", "a refresh", "the first"]
    rows = [
        [cost.strategy, cost.base, cost.rule, *(f"{n:,}" for n in (cost.weights, cost.units, cost.plain, *extra(cost)))]
        for cost in found
    ]
    where = in_words(conditions(torch.device("cpu")))
    return "\n".join([PAGE.format(where=where), *table(header, rows)])


def extra(cost: Cost) -> tuple[int, ...]:
    """What is added, in the order of the page."""
    return cost.step, cost.look, cost.refresh, cost.first


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of COMMUNICATION.md")
    folder = parser.parse_args().out
    (folder / "COMMUNICATION.md").write_text(report(measure()))


if __name__ == "__main__":
    main()
