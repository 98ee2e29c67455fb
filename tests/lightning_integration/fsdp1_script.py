"""What test_fsdp1 runs in two and in four processes that share parameters under FSDP1, in a file for each."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ecopt import EquivalentClassDistance, EquivalentClassOptimizer, ec_muon, ec_sgd, scaling_group

STEPS = 6
BASES = {
    "sgd": lambda parameters: SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Net(nn.Module):
    """Convolutions, a gate, a weight that is used twice, a residual stream, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 2), nn.ReLU(), nn.Conv2d(6, 5, 2, bias=False), nn.ReLU())
        self.gate, self.value, self.down = nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Linear(7, 5)
        self.again, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        x = x + self.down(F.relu(self.gate(x)) * self.value(x))
        x = F.relu(self.again(F.relu(self.again(x))))
        return self.head(self.norm(x))


def start() -> tuple[nn.Module, Tensor, Tensor]:
    """A network away from balance, with eight examples; the same in every process."""
    torch.manual_seed(1)
    net = Net().double()
    x, y = torch.randn(8, 2, 4, 4).double(), torch.randn(8, 3).double()
    group = scaling_group(net, x)
    group.act_(torch.randn(group.num_units) / 2)
    return net, x, y


wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))


def by_hand(net: Any, **options: Any) -> nn.Module:
    net.stem, net.down = wrap(net.stem, **options), wrap(net.down, **options)
    return wrap(net, **options)


def by_policy(net: nn.Module, **options: Any) -> nn.Module:
    return wrap(net, auto_wrap_policy=ModuleWrapPolicy({nn.Linear, nn.Sequential}), **options)


def by_mesh(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return by_hand(net, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def by_groups(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    groups = mesh.get_group("shard"), mesh.get_group("replicate")
    return by_hand(net, sharding_strategy=ShardingStrategy.HYBRID_SHARD, process_group=groups)


@dataclass(frozen=True)
class Layout:
    """How a network is wrapped.

    Args:
        wrap: does it.
        sizes: numbers of processes.
    """

    wrap: Callable[[nn.Module], nn.Module]
    sizes: tuple[int, ...] = (2,)


LAYOUTS = {
    "whole": Layout(wrap, (2, 4)),
    "by hand": Layout(by_hand, (2, 4)),
    "by policy": Layout(by_policy),
    "gradients": Layout(partial(by_hand, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
    "replicas": Layout(partial(by_hand, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "mesh": Layout(by_mesh, (4,)),
    "groups": Layout(by_groups, (4,)),
}
#: With a group of inputs that are traced before, with none, and with a module.
MAKERS: dict[str, Callable[[nn.Module, Tensor, str], Any]] = {
    "traced": lambda net, x, base: EquivalentClassOptimizer(
        BASES[base](net.parameters()), scaling_group(net, x), refresh_interval=2
    ),
    "first call": lambda net, x, base: EquivalentClassOptimizer(BASES[base](net.parameters()), refresh_interval=2),
}
#: Layout, maker and base.
RUNS = [
    *((layout, "traced", "sgd") for layout in LAYOUTS),
    *(
        (layout, *how)
        for layout in ("whole", "by policy", "mesh")
        for how in (("traced", "adamw"), ("first call", "sgd"))
    ),
]
#: The one in the fast run.
SMALL = ("whole", "first call", "sgd")


def weights(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all elements, by the names without FSDP."""
    with FullyShardedDataParallel.summon_full_params(net):
        own = net.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in own}


def trained(layout: str, maker: str, base: str, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Train in one process, or in several, each with its share of the examples."""
    net, x, y = start()
    if size > 1:
        net = LAYOUTS[layout].wrap(net)
    optimizer = MAKERS[maker](net, x, base)
    x, y = x[rank::size], y[rank::size]
    for _ in range(STEPS):
        optimizer.zero_grad()
        for half in (0, 1):  # gradients are accumulated
            F.mse_loss(net(x[half::2]), y[half::2]).div(2).backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.05)  # FSDP clips by norms in 32 bits only
        optimizer.step()
    return {
        "weights": weights(net),
        "rows": optimizer.rule_state(),
        "units": optimizer.group.num_units,
        "names": list(optimizer.group.parameters),
        "dimension": optimizer.group.dimension,
        "empty": sum(not p.numel() for p in net.parameters()),
    }


# What else there is ---------------------------------------------------------------------------------------------------


def state(module: nn.Module) -> list[tuple[Any, Any]]:
    """Where parameters, hooks and attributes of a module are, and which objects these are."""
    found: list[tuple[Any, Any]] = []
    for part in module.modules():
        for items in (part._parameters, part._buffers, part._forward_pre_hooks, part._forward_hooks, vars(part)):
            found += items.items()
    return found


class Collectives(TorchDispatchMode):
    """Counts collectives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def traced() -> dict[str, Any]:
    """Whether a trace leaves all as it was, and what it and a step exchange."""
    net, x, y = start()
    net = by_hand(net)
    before = state(net)
    with Collectives() as counter:
        group = scaling_group(net, x)
    after = state(net)
    same = [a for a, _ in before] == [a for a, _ in after] and all(
        a is b for (_, a), (_, b) in zip(before, after, strict=True)
    )
    optimizer = EquivalentClassOptimizer(BASES["adamw"](net.parameters()), group, refresh_interval=100)
    sums = []
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        with Collectives() as of_step:
            optimizer.step()
        sums.append(dict(of_step.counts))
    return {"same": same, "traced": counter.counts.total(), "steps": sums, "unit": group.describe(0)}


def acted(strategy: ShardingStrategy, grad: bool) -> float:
    """How outputs change if weights are rescaled after a call that has left whole ones somewhere."""
    net, x, _ = start()
    net = by_hand(net, sharding_strategy=strategy)
    group = scaling_group(net, x)
    with torch.set_grad_enabled(grad):
        before = net(x).detach()
    group.act_(torch.linspace(-1, 1, group.num_units))
    with torch.no_grad():
        return float((net(x) - before).abs().max() / before.abs().max())


class Tied(nn.Module):
    """One weight in two places, a frozen layer and one that no call uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4), nn.Tanh())
        self.one, self.two, self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 9)
        self.two.weight = self.one.weight
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(self.body(x))))))


def tied(size: int) -> dict[str, Any]:
    """Train tied, frozen and unused parameters; what no call uses has gradients of zero, and does not move."""
    torch.manual_seed(2)
    net: nn.Module = Tied().double()
    x = torch.randn(8, 4).double()
    if size > 1:
        net = wrap(net)
    optimizer = EquivalentClassOptimizer(SGD(net.parameters(), lr=0.1, momentum=0.9), refresh_interval=2)
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return {"weights": weights(net), "units": optimizer.group.num_units}


class Pair(nn.Module):
    """A network and its target."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.target = net, copy.deepcopy(net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def followed(how: str, size: int) -> dict[str, Any]:
    """A target after a balance: cut as its leader is, or otherwise, so that it has to be told."""
    net, x, y = start()
    module: nn.Module = Pair(net)
    if size > 1:
        module = by_policy(module) if how == "found" else wrap(module)
    followers = {"target": "net"} if how == "told" else None
    optimizer = ec_sgd(module, lr=0.03, followers=followers)
    F.mse_loss(module(x), y).backward()
    optimizer.step()
    return {"weights": weights(module), "lines": optimizer.followers}


def hidden() -> list[str]:
    """The warnings about a target of which each rank has what it has not of the leader."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        followed("hidden", 2)
    return [str(one.message) for one in caught]


def refusals() -> dict[str, str]:
    """What is said of parameters that cannot be cut to pieces, or of which nobody knows."""
    x = torch.ones(2, 3, 4, 4)

    def strided() -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)).to(memory_format=torch.channels_last)
        scaling_group(wrap(net), x)

    def unknown() -> None:
        optimizer = EquivalentClassOptimizer(SGD(wrap(nn.Linear(3, 2)).parameters(), lr=0.1))
        state = {"steps_since_refresh": 0, "refresh_due": True, "parameters": ["weight"], "shapes": [[2, 3]]}
        optimizer.load_state_dict({"state": {}, "param_groups": [], "equivalent_class": state})

    def flat() -> None:
        net = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
        ec_sgd(net, lr=0.1)

    def muon() -> None:
        ec_muon(wrap(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))), lr=0.1)

    def distance() -> None:
        net, data, _ = start()
        other, cut = copy.deepcopy(net), wrap(net)
        EquivalentClassDistance()(cut, other, scaling_group(cut, data))

    found = {}
    for call in (strided, unknown, flat, muon, distance):
        try:
            call()
        except ValueError as error:
            found[call.__name__] = str(error)
    return found


def others() -> dict[str, Any]:
    """All that is done in two processes only."""
    strategies = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD
    return {
        "trace": traced(),
        "acted": {f"{kind.name} {grad}": acted(kind, grad) for kind in strategies for grad in (False, True)},
        "tied": tied(2),
        "followed": {how: followed(how, 2) for how in ("found", "told")},
        "hidden": hidden(),
        "refusals": refusals(),
    }


def main(rank: int, size: int, folder: Path, runs: list[tuple[str, str, str]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    found: dict[str, Any] = {run: trained(*run, rank, size) for run in runs if size in LAYOUTS[run[0]].sizes}
    if size == 2 and len(runs) > 1:
        found |= others()
    torch.save(found, folder / f"{size}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    for processes in (2, 4) if sys.argv[2] == "all" else (2,):
        own = (processes, Path(sys.argv[1]), RUNS if sys.argv[2] == "all" else [SMALL])
        multiprocessing.start_processes(main, args=own, nprocs=processes, start_method="fork")
