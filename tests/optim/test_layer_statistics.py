"""What single steps are told to have done to each layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer, ScalingGroup, scaling_group
from tests.lightning_integration.modules import batches, mlp
from tests.networks import mlp as plain_mlp
from tests.selection import few, full

X, Y = batches(1)[0]


def trained(rule: Any = "unit", base: Any = SGD, **options: Any) -> tuple[nn.Module, EquivalentClassOptimizer]:
    module = mlp().double()
    made = base(module.parameters(), lr=0.03)
    return module, EquivalentClassOptimizer(made, scaling_group(module, X.double()), rule=rule, **options)


def backward(module: nn.Module) -> None:
    module.zero_grad()
    F.cross_entropy(module(X.double()), Y).backward()


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize(("rule", "base"), few([("unit", SGD), ("unit", AdamW), ("path", SGD), ("path", AdamW)], 1))
def test_the_relative_step_is_that_of_the_weights(rule: str, base: Any) -> None:
    module, optimizer = trained(rule, base, refresh_interval=None)
    assert optimizer.layers.statistics() == {}
    for _ in range(3):
        backward(module)
        optimizer.step()  # the first of them has balanced the weights, and is not fused
    before = [p.detach().clone() for p in module.parameters()]
    backward(module)
    optimizer.layers.measure_next()
    optimizer.step()
    found = optimizer.layers.statistics()
    after = list(module.parameters())
    assert list(found) == ["0", "2", "4"]
    for number, told in enumerate(found.values()):
        own = slice(2 * number, 2 * number + 2)
        moved = norm([b - a for b, a in zip(before[own], after[own], strict=True)])
        assert told.relative_step == pytest.approx(moved / norm(after[own]), rel=1e-12)


def test_a_refresh_is_no_part_of_a_step() -> None:
    lengths = []
    for seed in (None, 0):
        module, optimizer = trained()
        if seed is not None:  # the same function, far from the balanced member
            torch.manual_seed(seed)
            group = scaling_group(module, X.double())
            group.act_(torch.randn(group.num_units, dtype=torch.float64))
        backward(module)
        optimizer.layers.measure_next()
        optimizer.step()
        lengths.append([told.relative_step for told in optimizer.layers.statistics().values()])
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-9)
    assert max(lengths[0]) < 0.1


def test_the_share_of_clipped_rows_is_that_of_the_step() -> None:
    module, optimizer = trained(refresh_interval=None, check=None)
    scaling_group(module, X.double()).balance_()  # so that the first step changes no gradient
    for factors in ((1.0, 1.0, 1.0), (1.0, 100.0, 1.0), (0.1, 0.1, 0.1)):
        torch.manual_seed(0)
        for p, factor in zip(module.parameters(), (f for f in factors for _ in range(2)), strict=True):
            p.grad = factor * torch.randn_like(p)
        module[4].bias.grad.mul_(1000 if factors[1] == 100.0 else 1)
        optimizer.layers.measure_next()
        optimizer.step()
        shares = {layer: told.clipped for layer, told in optimizer.layers.statistics().items()}
        expected = {"0": 0.0, "2": 1.0, "4": 0.5} if factors[1] == 100.0 else {"0": 0.0, "2": 0.0, "4": 0.0}
        assert shares == pytest.approx(expected)


def test_paths_are_not_clipped() -> None:
    module, optimizer = trained("path")
    backward(module)
    optimizer.layers.measure_next()
    optimizer.step()
    assert [told.clipped for told in optimizer.layers.statistics().values()] == [None] * 3


def test_the_imbalance_is_that_of_the_units_that_a_layer_leads_into() -> None:
    module, optimizer = trained(representative="current", refresh_interval=None)
    group = scaling_group(module, X.double())
    group.balance_()
    factors = torch.zeros(group.num_units, dtype=torch.float64)
    factors[3], factors[20], factors[21] = 1.0, -1.5, 0.5  # a unit of the first layer and two of the second
    group.act_(factors)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.layers.measure_next()
    optimizer.step()
    found = optimizer.layers.statistics()
    assert found["4"].imbalance is None
    assert found["0"].relative_step == 0
    # Behind the unit of the first layer the second has other sums; so these are those of the metric's formula.
    incoming = sum(p.detach().square().sum(1) for p in (module[0].weight, module[0].bias[:, None]))
    outgoing = module[2].weight.detach().square().sum(0)
    expected = (incoming / outgoing).sqrt()
    assert found["0"].imbalance == pytest.approx(float(torch.maximum(expected, 1 / expected).max()), rel=1e-9)
    assert max(told.imbalance or 0 for told in found.values()) == pytest.approx(float(group.imbalance()), rel=1e-12)
    assert float(group.imbalances().max()) == float(group.imbalance())


def test_a_layer_of_zeros() -> None:
    module, optimizer = trained(refresh_interval=None)
    nn.init.zeros_(module[4].weight)
    nn.init.zeros_(module[4].bias)
    for still in (True, False):
        backward(module)
        if still:
            for p in module[4].parameters():
                p.grad.zero_()
        optimizer.layers.measure_next()
        optimizer.step()
        assert optimizer.layers.statistics()["4"].relative_step == pytest.approx(0.0 if still else 1.0)


def test_nothing_is_measured_in_steps_that_nobody_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained()
    backward(module)
    optimizer.step()

    def unwanted(self: ScalingGroup) -> Tensor:
        raise AssertionError("this waits for the device")

    monkeypatch.setattr(ScalingGroup, "imbalances", unwanted)
    backward(module)
    optimizer.step()
    monkeypatch.undo()
    optimizer.layers.measure_next()
    backward(module)
    optimizer.step()
    assert optimizer.layers.statistics()
    optimizer.layers.measure_next()
    assert optimizer.layers.statistics() == {}  # those of an earlier step are not those of the next


def test_a_step_of_the_base_has_no_statistics() -> None:
    module = nn.Linear(3, 2)  # without freedoms
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), scaling_group(module, torch.ones(1, 3)))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.layers.measure_next()
    optimizer.step()
    assert optimizer.layers.statistics() == {}


def test_a_frozen_layer_is_left_out() -> None:
    module = plain_mlp(3, 4, 4, 2)
    module[0].requires_grad_(False)
    own = [p for p in module.parameters() if p.requires_grad]
    group = scaling_group(module, torch.ones(1, 3))
    optimizer = EquivalentClassOptimizer(SGD(own, lr=0.1), group)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.layers.measure_next()
    optimizer.step()
    assert list(optimizer.layers.statistics()) == ["2", "4"]


@full
def test_ranks_that_share_the_parameters_find_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.optim.layers_script", str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
