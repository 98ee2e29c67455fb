"""What Fabric's ``setup`` and Lightning's ``self.optimizers()`` hand out does what the optimizer does."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, scaling_group
from tests.optim.training import RULES, problem
from tests.selection import few

Method = Callable[[Any, nn.Module, Tensor], Any]


def by_fabric(module: nn.Module, optimizer: EquivalentClassOptimizer) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup(module, optimizer)[1]


def by_lightning(module: nn.Module, optimizer: EquivalentClassOptimizer) -> Any:
    return LightningOptimizer(optimizer)


def bind_to_another(optimizer: Any, module: nn.Module, x: Tensor) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.bind(scaling_group(nn.Sequential(module, nn.Tanh()), x, parameters=parameters))  # of other names


def thaw_and_renew(optimizer: Any, module: nn.Module, x: Tensor) -> None:
    module[0].requires_grad_(False)
    optimizer.renew()
    module[0].requires_grad_(True)
    optimizer.renew()


def load_state(optimizer: Any, module: nn.Module, x: Tensor) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    state["equivalent_class"]["steps_since_refresh"] = 1
    optimizer.load_state_dict(state)


def load_rule_state(optimizer: Any, module: nn.Module, x: Tensor) -> Any:
    state = copy.deepcopy(optimizer.rule_state())
    state["steps_since_refresh"] = 1
    return optimizer.load_rule_state(state)


def set_option(optimizer: Any, module: nn.Module, x: Tensor) -> None:
    optimizer.refresh_interval = 2


def add_parameter(optimizer: Any, module: nn.Module, x: Tensor) -> None:
    optimizer.bind(lambda parameters: scaling_group(module, x, parameters=parameters))
    optimizer.add_param_group({"params": [module[-1].bias], "lr": 0.01})


METHODS: dict[str, Method] = {
    "bind": bind_to_another,
    "renew": thaw_and_renew,
    "start": lambda o, module, x: (o.refresh(), o.start())[-1],
    "refresh": lambda o, module, x: o.refresh(),
    "stop_watching": lambda o, module, x: o.stop_watching(),
    "usable_units": lambda o, module, x: o.usable_units(),
    "statistics": lambda o, module, x: o.statistics(),
    "rule_state": lambda o, module, x: o.rule_state(),
    "load_rule_state": load_rule_state,
    "state_dict": lambda o, module, x: o.state_dict(),
    "load_state_dict": load_state,
    "add_param_group": add_parameter,
    "zero_grad": lambda o, module, x: o.zero_grad(),
    "group": lambda o, module, x: o.group.fingerprint(),
    "has_group_of_user": lambda o, module, x: o.has_group_of_user,
    "follow_epochs": lambda o, module, x: o.follow_epochs(lambda: 3),
    "follow_precision": lambda o, module, x: o.follow_precision(lambda: "bf16-mixed"),
    "violation": lambda o, module, x: o.violation,
    "layers": lambda o, module, x: (o.layers.measure_next(), dict(o.layers.statistics()))[-1],
    "rest": lambda o, module, x: o.rest(),
    "param_groups": lambda o, module, x: [{**group, "params": len(group["params"])} for group in o.param_groups],
    "state": lambda o, module, x: len(o.state),
    "defaults": lambda o, module, x: o.defaults,
    "an option": set_option,
}


def started(rule: Any) -> tuple[nn.Module, EquivalentClassOptimizer, Tensor, Tensor]:
    """A network, three steps from its start; its last bias is not in the optimizer."""
    torch.manual_seed(0)
    module, x, y = problem(4, 6, 5, 3)
    parameters = [p for p in module.parameters() if p is not module[-1].bias]
    optimizer = ECSGD(parameters, lr=0.05, momentum=0.9, rule=rule)
    optimizer.bind(scaling_group(module, x, parameters=parameters))
    step(module, optimizer, x, y, 3)
    return module, optimizer, x, y


def step(module: nn.Module, optimizer: EquivalentClassOptimizer, x: Tensor, y: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def assert_equal(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0) if isinstance(one, Tensor) else None
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_equal(value, two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    elif not isinstance(one, Tensor):
        assert one == two


@RULES
@pytest.mark.parametrize("wrap", few([by_fabric, by_lightning], [by_lightning]))
@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_the_same_through_a_wrapper(name: str, wrap: Any, rule: str) -> None:
    results = []
    for wrapped in (False, True):
        module, optimizer, x, y = started(rule)
        outer = wrap(module, optimizer) if wrapped else optimizer
        result = METHODS[name](outer, module, x)
        told = optimizer.rule_state(), optimizer.group.fingerprint(), optimizer.has_group_of_user
        step(module, optimizer, x, y, 4)
        results.append([result, *told, optimizer.state_dict(), [p.detach() for p in module.parameters()]])
    assert_equal(*results)


def test_every_public_method_is_among_those() -> None:
    names = {name for name in vars(EquivalentClassOptimizer) if not name.startswith("_")}
    options = set(inspect.signature(EquivalentClassOptimizer).parameters) - {"optimizer", "group"}
    assert names - options - set(METHODS) == {"step", "optimizer"}  # what a wrapper is there to replace


@pytest.mark.parametrize("wrap", [by_fabric, by_lightning])
def test_a_group_given_through_a_wrapper_is_the_optimizers(wrap: Any) -> None:
    module, x, _ = problem(4, 6, 3)
    optimizer = ECSGD(module.parameters(), lr=0.1)
    group = scaling_group(module, x)
    assert not optimizer.has_group_of_user
    outer = wrap(module, optimizer)
    outer.bind(group)
    assert optimizer.group is group
    assert outer.group is group
    assert optimizer.has_group_of_user


class Averaging(SGD):
    """Has something of its own beyond what torch's optimizers have."""

    rate_of_average = 0.5

    def train(self) -> str:
        return f"{type(self).__name__} trains"


@pytest.mark.parametrize("wrap", [lambda module, optimizer: optimizer, by_fabric, by_lightning])
def test_it_is_one_of_its_own_class_and_one_of_its_bases(wrap: Any) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = EquivalentClassOptimizer(Averaging(module.parameters(), lr=0.1), scaling_group(module, x))
    outer = wrap(module, optimizer)
    assert all(isinstance(outer, kind) for kind in (EquivalentClassOptimizer, Averaging, SGD, Optimizer))
    assert not isinstance(outer, Adam)
    assert type(optimizer) is EquivalentClassOptimizer
    assert optimizer.__class__.__name__ == "EquivalentClassOptimizer"
    assert (outer.train(), outer.rate_of_average) == ("Averaging trains", 0.5)
    twin, other = copy.deepcopy((module, optimizer))
    for one, of in ((module, optimizer), (twin, other)):
        step(one, of, x, y.argmax(1), 3)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
    assert isinstance(pickle.loads(pickle.dumps(ECSGD(module.parameters(), lr=0.1))), SGD)
