"""What test_fsdp runs in two and in four processes: groups of sharded networks and what they do, in a file for each."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD

from lightning_ecopt import EquivalentClassOptimizer
from lightning_ecopt.common.sharding import is_sharded, local
from lightning_ecopt.common.sharding import parts as parts_of
from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from lightning_ecopt.symmetry.followers import Followers
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one
from tests.networks import mlp
from tests.symmetry.helpers import draw_, evaluate, flat_output
from tests.symmetry.zoo import ZOO
from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.tiny import SHARED, TINY

#: Whether sharded modules cannot be called, and why.
NO_CALLS = not hasattr(torch.cpu.Stream, "record_event")
WHY = "this version of torch cannot call sharded modules on a CPU"

CASES = [case for case in [*TINY, *SHARED, *ZOO] if Use.SHARDS in case.good_for]
DAMAGES = ["zero row", "zero column", "infinite", "undefined"]
REGIONS = [
    (10, slice(0, 10, 1)),
    (10, slice(1, 9, 2)),
    (10, slice(4, 5, 1)),
    (10, slice(2, 10, 7)),
    (3, slice(1, 3, 1)),
]


def build(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network of a case and inputs, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    module = case.build().eval()
    draw_(module, generator)
    return module, case.inputs(generator)


def damaged(damage: str) -> nn.Module:
    """A network some of whose units are dormant, or spoilt."""
    net = mlp(3, 10, 7, 2).double()
    draw_(net, torch.Generator().manual_seed(2))
    with torch.no_grad():
        if damage == "zero row":
            net[0].weight[9], net[0].bias[9] = 0, 0
        elif damage == "zero column":
            net[2].weight[:, 4] = 0
            net[4].weight[:, 6] = 0
        else:
            net[2].weight[6, 1] = torch.inf if damage == "infinite" else torch.nan
    return net


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply fully_shard to every layer that nobody else takes parameters from, and to the whole."""
    owners = [id(p) for part in module.modules() for p in part._parameters.values()]
    for part in list(module.modules())[1:]:
        own = [owners.count(id(p)) for p in part.parameters(recurse=False)]
        if set(own) == {1} and not list(part.children()) and not isinstance(part, nn.Embedding):
            fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all elements."""
    return {name: (t.full_tensor() if is_sharded(t) else t).detach().clone() for name, t in tensors.items()}


def described(group: ScalingGroup) -> dict[str, Any]:
    """All that a group knows of the network."""
    return {
        "units": group.num_units,
        "shapes": {name: tuple(p.shape) for name, p in group.parameters.items()},
        "couplings": [
            (c.parameter, str(c.region), c.incoming.tolist(), c.outgoing.tolist(), c.additive) for c in group.couplings
        ],
        "products": [
            values.tolist() for values in (group.monomials.products, group.monomials.units, group.monomials.exponents)
        ],
        "costs": {str(operation): count for operation, count in group.costs.items()},
        "unseen": group.unseen,
        "invariant": group.scale_invariant.tolist(),
    }


def results(module: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """What a group finds and does, in one process or in several."""
    group = scaling_group(module, *inputs)
    parameters = dict(group.parameters)
    found: dict[str, Any] = {"group": described(group), "alive": group.alive(), "outputs": [evaluate(module, inputs)]}
    flat_output(module(*inputs)).square().sum().backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    log_scale = torch.randn(group.num_units, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
    group.act_(log_scale)
    group.rescale_(gradients, log_scale, power=-1)
    found["acted"], found["gradients"] = whole(parameters), whole(gradients)
    found["outputs"].append(evaluate(module, inputs))
    found["log_scale"] = group.balance_()
    to_gains = scale_to_gains_of_one(group, group.alive())
    found["to_gains"] = torch.zeros(0) if to_gains is None else to_gains
    found["balanced"] = whole(parameters)
    found["outputs"].append(evaluate(module, inputs))
    return found


def balance(net: nn.Module, group: ScalingGroup) -> dict[str, Any]:
    """Balance a network in whatever layout."""
    return {"alive": group.alive(), "log_scale": group.balance_(), "balanced": whole(dict(group.parameters))}


def layouts(size: int) -> dict[str, Any]:
    """One network in several layouts."""
    mesh, found = init_device_mesh("cpu", (size,)), {}
    for name in ("one module", "together", "two replicas", "beside a plain layer", "traced before"):
        net, (x,) = build(CASES[0])
        if name == "one module":
            fully_shard(net, mesh=mesh)
        elif name == "together":
            fully_shard([net[0], net[2]], mesh=mesh)
            fully_shard(net, mesh=mesh)
        elif name == "two replicas":
            fully_shard(net, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
        elif name == "beside a plain layer":
            fully_shard(net, mesh=mesh, ignored_params={net[2].weight, net[2].bias})
        before = scaling_group(net, x)
        if name == "traced before":
            shard(net, mesh)
        found[name] = balance(net, before.of(net))
    net, (x,) = build(CASES[0])
    copies = {name: nn.Parameter(distribute_tensor(p.detach(), mesh)) for name, p in net.named_parameters()}
    for name, p in copies.items():
        net.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = p
    found["copies"] = balance(net, scaling_group(net, x))
    return found


def parts(size: int) -> list[dict[str, Any]]:
    """What of some regions lies here, by views of the local tensor and by cutting the whole one."""
    mesh, found = init_device_mesh("cpu", (size,)), []
    for length, region in REGIONS:
        tensor = torch.arange(2.0 * length).view(length, 2)
        sharded = fully_shard(_Holder(tensor), mesh=mesh).tensor
        own = parts_of((region, slice(1, 2, 1)), sharded)
        if not own:
            found.append({"viewed": torch.zeros(0, 1), "cut": torch.zeros(0, 1), "uniform": torch.zeros(1, 1)})
            continue
        (part,) = own
        found.append(
            {
                "viewed": part.view(local(sharded)).clone(),
                "cut": part.cut(tensor[region, 1:]).clone(),
                "uniform": part.cut(torch.zeros(1, 1)),
            }
        )
    return found


class _Holder(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = nn.Parameter(tensor)


def collectives(mesh: DeviceMesh) -> list[int]:
    """How many collectives a trace starts, and how many a call."""
    module, inputs = build(CASES[0])
    shard(module, mesh)
    counts = []
    for call in (lambda: scaling_group(module, *inputs), lambda: module(*inputs)):
        with CommDebugMode() as counter:
            call()
        counts.append(counter.get_total_counts())
    return counts


def followed(mesh: DeviceMesh | None) -> dict[str, Any]:
    """What follows a network, and how it is rescaled: a copy that is sharded like it, one that is not, and a list."""
    module = nn.Module()
    module.net, (x,) = build(CASES[0])
    module.target, module.plain = (copy.deepcopy(module.net).requires_grad_(False) for _ in range(2))
    module.shadow = [p.detach() * 1.1 for p in module.net.parameters()]
    if mesh is not None:
        shard(module.net, mesh)
        shard(module.target, mesh)
    followers, group = Followers(module), scaling_group(module.net, x)
    followers.look(group.parameters)
    found = {"lines": followers.lines(group.parameters)}
    log_scale = torch.linspace(-1, 1, group.num_units)
    followers.rescale_(group, log_scale)
    copies = {"target": module.target, "plain": module.plain}
    for name, part in copies.items():
        found |= {f"{name}.{of}": p for of, p in whole(dict(part.named_parameters())).items()}
    return found | {f"shadow.{number}": tensor for number, tensor in enumerate(module.shadow)}


class _Broken(dict[str, object]):
    """What a user's object may do when it is looked at."""

    def items(self) -> Any:
        raise KeyError("gone")


class _Shaken(SGD):
    """Moves on the first rank alone what its method moves."""

    @torch.no_grad()
    def shake_step(self) -> None:
        if distributed.get_rank() == 0:
            local(self.param_groups[0]["params"][0]).add_(1)


def apart(mesh: DeviceMesh) -> dict[str, Any]:
    """What is found, and what becomes of a refresh, if one rank alone has copies, fails, or moves weights."""
    module = nn.Module()
    module.net, (x,) = build(CASES[0])
    copied = copy.deepcopy(module.net).requires_grad_(False)
    shard(module.net, mesh)
    shard(copied, mesh)
    group, is_first = scaling_group(module.net, x), distributed.get_rank() == 0
    followers = Followers(module, beside=lambda: _Broken() if is_first else {})
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["failed"] = followers.look(group.parameters)
        followers = Followers(module)
        if is_first:
            module.target = copied
        found["one has it"] = followers.look(group.parameters)
        module.target = copied
        found["all have it"] = followers.look(group.parameters)
    optimizer = EquivalentClassOptimizer(_Shaken(module.net.parameters(), lr=0.1), group)
    for _ in range(2):
        optimizer.shake_step()
    return found | {"due": optimizer._session.refresh_due, "passed": optimizer._session.passed}


def refusal(size: int) -> str:
    """What is said of parameters that are sharded over different ranks."""
    net, (x,) = build(CASES[0])
    halves = [init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))[name] for name in ("a", "b")]
    fully_shard(net[0], mesh=halves[0])
    fully_shard(net, mesh=halves[1])
    try:
        scaling_group(net, x)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {"cases": {}, "damages": {}}
    for case in CASES:
        if size > 2 and Use.FOUR_SHARDS not in case.good_for:
            continue
        module, inputs = build(case)
        found["cases"][case.name] = results(shard(module, mesh), inputs)
    for damage in DAMAGES:
        net = damaged(damage)
        group = scaling_group(net, torch.zeros(1, 3, dtype=torch.float64))
        found["damages"][damage] = balance(shard(net, mesh), group.of(net))
    found["parts"], found["collectives"] = parts(size), collectives(mesh)
    found["followed"], found["apart"] = followed(mesh), apart(mesh)
    if size == 4:
        found["layouts"], found["refusal"] = layouts(size), refusal(size)
    torch.save(found, folder / f"{size}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    for processes in (2, 4):
        multiprocessing.start_processes(
            main, args=(processes, Path(sys.argv[1])), nprocs=processes, start_method="fork"
        )
