"""What test_meshes runs in two and in four processes: training of networks whose parameters are cut along any axis."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer
from lightning_ecopt.common.sharding import Ranks, local, parts
from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from tests.symmetry.helpers import draw_, flat_output
from tests.symmetry.zoo import ZOO

STEPS = 4
BASES = {"sgd": (SGD, {"lr": 0.03, "momentum": 0.9}), "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1})}
CASE = next(case for case in ZOO if case.name == "llama with relu")  # a decoder: 34 units, 2 heads, gated layers

#: Dimensions of the mesh, and how the parameters are placed, over and over again.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[tuple[Placement, ...]]]] = {
    "columns": ((2,), [(Shard(-1),)]),
    "rows and columns": ((2,), [(Shard(0),), (Shard(-1),), (Replicate(),)]),
    "four rows": ((4,), [(Shard(0),)]),
    "two dimensions": ((2, 2), [(Shard(0), Shard(-1)), (Shard(-1), Shard(0)), (Shard(0), Shard(0))]),
    "strided": ((2, 2), [(_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(-1))]),
    "replicas": ((2, 2), [(Replicate(), Shard(0)), (Shard(-1), Replicate()), (Replicate(), Replicate())]),
}
#: Layout and base.
RUNS = [*((layout, "sgd") for layout in LAYOUTS), ("columns", "adamw"), ("two dimensions", "adamw")]


def build() -> tuple[nn.Module, ScalingGroup]:
    """The network, the same in every process, and its group."""
    module = CASE.build()
    draw_(module, torch.Generator().manual_seed(1))
    return module, traced().of(module)


@cache
def traced() -> ScalingGroup:
    """The group of such a network."""
    return scaling_group(CASE.build(), *CASE.inputs(torch.Generator().manual_seed(1)))


def inputs(step: int) -> tuple[Any, ...]:
    return CASE.inputs(torch.Generator().manual_seed(step + 2))


def optimizer_of(group: ScalingGroup, base: str) -> EquivalentClassOptimizer:
    kind, options = BASES[base]
    return EquivalentClassOptimizer(kind(list(group.parameters.values()), **options), group, refresh_interval=2)


def train_whole(base: str) -> dict[str, Any]:
    """The weights at the end, and the gradients of each step, in one process."""
    module, group = build()
    optimizer, found = optimizer_of(group, base), {"gradients": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        flat_output(module(*inputs(step))).square().mean().backward()
        found["gradients"].append({n: p.grad.clone() for n, p in group.parameters.items() if p.grad is not None})
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in group.parameters.items()}
    return found | {"weights": weights, "imbalance": group.imbalance()}


def placed(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """Distribute a tensor, of which each rank has a copy; axis -1 is its last one."""
    own, here = [], tensor
    for k, (place, count) in enumerate(zip(mesh.get_coordinate(), mesh.shape, strict=True)):
        at: Any = placements[k]
        if isinstance(at, Replicate) or tensor.ndim == 0:
            own.append(Replicate())
            continue
        factor = {"split_factor": at.split_factor} if isinstance(at, _StridedShard) else {}
        own.append(type(at)(at.dim % tensor.ndim, **factor))
        here = own[k]._split_tensor(here, count, with_padding=False, contiguous=True)[0][place]
    # distribute_tensor cuts in the same way, but refuses to cut unevenly what is strided.
    return DTensor.from_local(
        here.clone(), mesh, own, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def train(layout: str, base: str, gradients: list[dict[str, Tensor]], mesh: DeviceMesh) -> dict[str, Any]:
    """The same training of DTensors, with the gradients of the whole network."""
    module, group = build()
    how = dict(zip(group.parameters, LAYOUTS[layout][1] * len(group.parameters), strict=False))
    for name in group.parameters:
        owner, _, own = name.rpartition(".")
        whole = module.get_parameter(name).detach()
        module.get_submodule(owner)._parameters[own] = nn.Parameter(placed(whole, mesh, how[name]))
    group = group.of(module)
    optimizer, found = optimizer_of(group, base), {"collectives": []}
    for of_step in gradients:
        for name, gradient in of_step.items():
            group.parameters[name].grad = placed(gradient, mesh, how[name])
        with CommDebugMode() as counter:
            optimizer.step()
        found["collectives"].append({str(op): n for op, n in counter.get_comm_counts().items()})
    weights = {name: p.full_tensor().detach().clone() for name, p in group.parameters.items()}
    held = sum(local(p).numel() for p in group.parameters.values())
    return found | {"weights": weights, "imbalance": group.imbalance(), "held": held}


def counted(mesh: DeviceMesh) -> dict[str, Any]:
    """Sums over tensors that are cut over different dimensions of a mesh, each element once."""
    whole = torch.arange(35.0, dtype=torch.float64).view(5, 7)
    tensors: dict[str, Tensor] = {
        "both": distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
        "replicas": distribute_tensor(whole, mesh, [Replicate(), Shard(1)]),
        "first": distribute_tensor(whole, mesh["a"], [Shard(0)]),
        "second": distribute_tensor(whole, mesh["b"], [Shard(1)]),
        "strided": placed(whole, mesh, (_StridedShard(0, split_factor=2), Shard(0))),
        "few": distribute_tensor(whole[:1], mesh, [Shard(0), Shard(0)]),
        "copy": distribute_tensor(whole, mesh, [Replicate(), Replicate()]),
        "plain": whole,
    }
    ranks, found = Ranks(tensors), {}
    for name, tensor in tensors.items():
        region = tuple(slice(0, length, 1) for length in tensor.shape)
        own = parts(region, tensor)
        assert all(torch.equal(part.view(local(tensor)), whole[part.places]) for part in own)
        times = torch.zeros(tensor.shape, dtype=torch.float64)
        for part in own:
            times[part.places] += ranks.counts(tensor)
        found[name] = ranks.sum_(times)
    return found


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of parameters that cannot be added up."""
    weight = torch.ones(4, 4)
    cases = {
        "partial": {"net.weight": DTensor.from_local(weight, mesh, [Partial(), Shard(0)])},
        "apart": {
            "one": distribute_tensor(weight, mesh["a"], [Shard(0)]),
            "two": distribute_tensor(weight, mesh["b"], [Shard(0)]),
        },
    }
    found = {}
    for name, parameters in cases.items():
        try:
            Ranks(parameters)
        except ValueError as error:
            found[name] = str(error)
    return found


def some_ranks(size: int) -> Tensor | None:
    """A sum over a mesh of several dimensions that has some of the ranks only; the others have nothing to do."""
    rank = distributed.get_rank()
    mesh = DeviceMesh("cpu", torch.arange(size)[:2].view(2, 1))
    if rank >= 2:
        return None
    weight = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])
    ranks = Ranks({"weight": weight})
    return torch.stack([ranks.sum_(torch.tensor(1.0 + rank)) for _ in range(2)])


def main(rank: int, size: int, folder: Path, whole: dict[str, list[dict[str, Tensor]]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=120), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    found: dict[str, Any] = {}
    meshes = {(2,): ("a",), (4,): ("a",), (2, 2): ("a", "b")}
    for layout, base in RUNS:
        shape = LAYOUTS[layout][0]
        if torch.Size(shape).numel() == size:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=meshes[shape])
            found[f"{layout} {base}"] = train(layout, base, whole[base], mesh)
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found["counted"], found["refusals"], found["some"] = counted(mesh), refusals(mesh), some_ranks(size)
    torch.save(found, folder / f"{size}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)  # what is computed before a fork must leave no threads behind
    once = {base: train_whole(base)["gradients"] for base in BASES}
    count = int(sys.argv[2])
    multiprocessing.start_processes(main, args=(count, Path(sys.argv[1]), once), nprocs=count, start_method="fork")
