"""What test_layer_statistics runs in two processes that share the parameters; the argument is a file for both."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimizer, ScalingGroup, scaling_group
from lightning_ecopt.optim.layer_statistics import LayerStatistics
from tests.networks import mlp


def trained(net: nn.Module, group: ScalingGroup, x: Tensor, y: Tensor) -> Mapping[str, LayerStatistics]:
    optimizer = EquivalentClassOptimizer(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), group)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.layers.measure_next()
        optimizer.step()
    return optimizer.layers.statistics()


def compare(rank: int, path: str) -> None:
    """Each rank finds for its shards what it finds for the whole network."""
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net, x, y = mlp(5, 7, 6, 3).double(), torch.randn(8, 5, dtype=torch.double), torch.randint(3, (8,))
    group, whole = scaling_group(net, x), copy.deepcopy(net)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    found, expected = trained(net, group.of(net), x, y), trained(whole, scaling_group(whole, x), x, y)
    assert {layer: vars(of) for layer, of in found.items()} == {
        layer: {name: value if value is None else pytest.approx(value, rel=1e-9) for name, value in vars(of).items()}
        for layer, of in expected.items()
    }
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(compare, (sys.argv[1],), nprocs=2)
