"""Nothing depends on the device and the type that ``torch`` gives to tensors of which nobody says where they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassDistance, EquivalentClassOptimizer, PathNorm, UnitImbalance, scaling_group
from lightning_ecopt.kernels.choose import Implementation
from lightning_ecopt.optim.options import RuleName
from tests.selection import few


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    images = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU()]
    pools = [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*images, *pools, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return module, torch.randn(5, 1, 14, 14), torch.arange(5) % 3


def train(module: nn.Module, x: Tensor, y: Tensor, base: str, **options: Any) -> list[Any]:
    """Some steps, with a refresh and a checkpoint between them."""

    def optimizer() -> EquivalentClassOptimizer:
        groups = [{"params": [*module[:5].parameters()], "lr": 0.01}, {"params": [*module[5:].parameters()]}]
        made = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.02, fused=True),  # others have step counts on the default
        }[base]()
        return EquivalentClassOptimizer(made, scaling_group(module, x), **options)

    one = optimizer()
    for step in range(4):
        if step == 2:
            one.refresh()
        if step == 3:
            state = copy.deepcopy(one.state_dict())
            one = optimizer()
            one.load_state_dict(state)
        one.zero_grad()
        F.cross_entropy(module(x), y).backward()
        one.step()
    return [one.usable_units(), str(one.statistics()), *module.state_dict().values()]


def tour(implementation: Implementation, device: str | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the public names return, one after the other."""
    (module, x, y), shown, found = network(), io.StringIO(), {}
    log_scale = torch.linspace(-1, 1, 14)
    with defaults(device, dtype):
        group = scaling_group(module, x)
        group.act_(log_scale)
        group.summary(Console(file=shown, width=100))
        found["words"] = [shown.getvalue(), group.fingerprint(), *map(group.describe, range(group.num_units))]
        imbalance, norm = UnitImbalance(), PathNorm(p=1)
        imbalance.update(group)
        norm.update(copy.deepcopy(module).eval(), x)
        found["numbers"] = [imbalance.compute(), norm.compute(), group.balance_(), group.alive()]
        rules: list[RuleName] = ["unit", "path"]
        for rule in rules:
            for base in ("sgd", "adamw"):
                trained, distance = copy.deepcopy(module), EquivalentClassDistance()
                found[f"{rule} {base}"] = train(trained, x, y, base, rule=rule, implementation=implementation)
                distance.update(trained, module, group)
                found[f"{rule} {base}"].append(distance.compute())
    return found


@pytest.mark.parametrize("implementation", few(["wrapped", "eager", "compiled"], ["eager"]))
@pytest.mark.parametrize(
    ("device", "dtype"), few([("meta", torch.float32), (None, torch.float64), (None, torch.bfloat16)], 1)
)
def test_the_default_device_and_dtype_make_no_difference(
    device: str | None, dtype: torch.dtype, implementation: Implementation
) -> None:
    plain, other = tour(implementation, None), tour(implementation, device, dtype)
    assert plain.keys() == other.keys()
    for name, values in plain.items():
        for one, two in zip(values, other[name], strict=True):
            assert type(one) is type(two)
            assert torch.equal(one, two) if isinstance(one, Tensor) else one == two, name


def test_a_network_without_units_is_in_balance_on_any_default_device() -> None:
    module, x = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), torch.ones(2, 3)
    with defaults("meta", torch.float32):
        group, imbalance, distance = scaling_group(module, x), UnitImbalance(), EquivalentClassDistance()
        imbalance.update(group)
        distance.update(module, copy.deepcopy(module), group)
        assert imbalance.compute() == 1
        assert distance.compute() == 0
        assert group.balance_().shape == (0,)
