"""Copies that follow the weights of plain PyTorch, through refreshes, refused steps and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from tests.networks import mlp
from tests.optim.training import RULES

X = torch.linspace(-2, 2, 24, dtype=torch.double).view(8, 3)
Y = torch.arange(8) % 2


class Networks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online = mlp(3, 8, 7, 2).double()
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        for p in self.target.parameters():
            p.mul_(1.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x)


def average(module: Networks) -> Any:
    return AveragedModel(module.online)


MAKE: dict[str, Callable[[Networks, str], Optimizer]] = {
    "modules": lambda m, rule: EquivalentClassOptimizer(
        SGD(m.online.parameters(), 0.1), scaling_group(m.online, X), rule=rule, followers={m.target: m.online}
    ),
    "tensors": lambda m, rule: EquivalentClassOptimizer(
        AdamW(m.online.parameters(), 0.01),
        scaling_group(m.online, X),
        rule=rule,
        followers=dict(zip(m.target.parameters(), m.online.parameters(), strict=True)),
    ),
    "module calls": lambda m, rule: ECSGD(m.online.parameters(), 0.1, rule=rule, followers={m.target: m.online}),
    "ec_sgd": lambda m, rule: ec_sgd(m, lr=0.1, rule=rule, followers={"target": "online"}),
    "ec_adamw": lambda m, rule: ec_adamw(m, m.online.parameters(), lr=0.01, rule=rule, followers={"target": "online"}),
}


def step(module: nn.Module, optimizer: Optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(module(X), Y).backward()
        optimizer.step()


def ratios(module: Networks) -> list[Tensor]:
    pairs = zip(module.target.parameters(), module.online.parameters(), strict=True)
    return [t.detach() / p.detach() for t, p in pairs]


def at_rest(optimizer: Optimizer) -> None:
    for options in optimizer.param_groups:
        options.update(lr=0.0, weight_decay=0.0)


@RULES
@pytest.mark.parametrize("form", MAKE)
def test_a_target_is_rescaled_at_every_refresh_as_its_leader_is(form: str, rule: str) -> None:
    module = Networks()
    optimizer: Any = MAKE[form](module, rule)
    step(module, optimizer, 30)
    at_rest(optimizer)
    optimizer.refresh()
    with torch.no_grad():
        before, function, kept = ratios(module), module.target(X), module.target[0].weight.clone()
        step_of = module.online[0].weight.clone()
    with torch.enable_grad():
        step(module, optimizer)
    assert not torch.allclose(module.online[0].weight, step_of, rtol=1e-4, atol=0)  # there was something to balance
    assert not torch.allclose(module.target[0].weight, kept, rtol=1e-4, atol=0)
    for one, other in zip(ratios(module), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.target(X), function, rtol=1e-9, atol=1e-12)


def test_several_follow_one_leader_and_one_of_them_in_another_type() -> None:
    module = Networks()
    low, mean = copy.deepcopy(module.target).bfloat16(), average(module)
    group = scaling_group(module.online, X)
    given = {module.target: module.online, low: module.online, mean: module.online}
    optimizer = EquivalentClassOptimizer(SGD(module.online.parameters(), 0.1), group, followers=given)
    group.act_(torch.linspace(-1, 1, group.num_units))
    for follower in (module.target, low, mean.module):
        with torch.no_grad():
            for t, p in zip(follower.parameters(), module.online.parameters(), strict=True):
                t.copy_(p)
    at_rest(optimizer)
    step(module, optimizer)
    for follower, tolerance in ((module.target, 1e-12), (low, 1e-2), (mean.module, 1e-12)):
        for t, p in zip(follower.parameters(), module.online.parameters(), strict=True):
            torch.testing.assert_close(t.detach().double(), p.detach(), rtol=tolerance, atol=0)


def test_two_optimizers_rescale_the_targets_of_their_own_units() -> None:
    module = Networks()
    group = scaling_group(module.online, X)
    parts = list(module.online[:3].parameters()), list(module.online[3:].parameters())
    optimizers = [
        EquivalentClassOptimizer(SGD(part, 0.1), group, followers={module.target: module.online}) for part in parts
    ]
    group.act_(torch.linspace(-1, 1, group.num_units))
    with torch.no_grad():
        for t, p in zip(module.target.parameters(), module.online.parameters(), strict=True):
            t.copy_(p)
    for optimizer in optimizers:
        at_rest(optimizer)
    F.cross_entropy(module(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()
    for t, p in zip(module.target.parameters(), module.online.parameters(), strict=True):
        torch.testing.assert_close(t, p, rtol=1e-12, atol=0)


class TwiceInAStep(SGD):
    """Moves weights, and calls its closure again, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(0.1)
        return closure()


def test_a_refused_step_leaves_the_target_as_it_was() -> None:
    module = Networks()
    base = TwiceInAStep(module.online.parameters(), 0.1)
    optimizer = EquivalentClassOptimizer(
        base, scaling_group(module.online, X), followers={module.target: module.online}
    )
    before = copy.deepcopy(module.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(X), Y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="calls the closure again"):
        optimizer.step(closure)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def equal_copy(module: Networks) -> Networks:
    module.target.load_state_dict(module.online.state_dict())
    return module


def test_a_run_that_is_resumed_knows_its_followers() -> None:
    """They were found by equality, and are equal no more."""

    def update(module: Networks) -> None:
        with torch.no_grad():
            for t, p in zip(module.target.parameters(), module.online.parameters(), strict=True):
                t.lerp_(p, 0.1)

    def run(module: Networks, optimizer: Any, count: int) -> None:
        for _ in range(count):
            step(module, optimizer)
            update(module)

    module = equal_copy(Networks())
    optimizer = ec_sgd(module, lr=0.1, momentum=0.9, refresh_interval=4)
    run(module, optimizer, 6)
    assert optimizer.followers == ["target follows online"]
    weights, state = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    assert state["equivalent_class"]["followers"] == [("target", "online")]
    run(module, optimizer, 6)
    other = Networks()
    resumed = ec_sgd(other, lr=0.1, momentum=0.9, refresh_interval=4)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(other, resumed, 6)
    assert resumed.followers == ["target follows online"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_an_optimizer_that_is_copied_with_its_networks_rescales_the_copies() -> None:
    module = Networks()
    group = scaling_group(module.online, X)
    optimizer = EquivalentClassOptimizer(
        SGD(module.online.parameters(), 0.1), group, followers={module.target: module.online}
    )
    other, copied = copy.deepcopy((module, optimizer))
    before = copy.deepcopy(module.state_dict())
    step(other, copied)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(other.target[0].weight, module.target[0].weight)


def test_a_copy_that_is_made_later_is_traced_before_it_follows() -> None:
    """The loss looks at hidden features of a copy from the middle of the training on: they may not be rescaled."""

    class Snapshot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.online = mlp(3, 8, 7, 2).double()
            self.snapshot: Any = None

        def forward(self, x: Tensor) -> Tensor:
            logits = self.online(x)
            return logits if self.snapshot is None else logits + self.snapshot[:2](x)[:, :2].detach()

    module = Snapshot()
    optimizer = ec_sgd(module, lr=0.1, refresh_interval=3)
    step(module, optimizer, 4)
    assert optimizer.group.num_units == 15
    module.snapshot = copy.deepcopy(module.online).requires_grad_(False)
    before = module.snapshot[:2](X)[:, :2]
    step(module, optimizer, 3)
    assert optimizer.followers == ["snapshot follows online"]
    step(module, optimizer, 6)
    assert optimizer.group.num_units == 13
    torch.testing.assert_close(module.snapshot[:2](X)[:, :2], before, rtol=1e-12, atol=0)


def test_a_frozen_reference_keeps_its_function() -> None:
    """As of preference optimization: it is equal at the start, and never moved."""
    module = equal_copy(Networks())
    function = module.target(X)
    optimizer = ec_sgd(module, lr=0.1, refresh_interval=2)
    step(module, optimizer, 9)
    assert optimizer.followers == ["target follows online"]
    torch.testing.assert_close(module.target(X), function, rtol=1e-10, atol=1e-12)


def test_a_follower_that_does_not_fit_is_an_error_at_once() -> None:
    module = Networks()
    group, base = scaling_group(module.online, X), SGD(module.online.parameters(), 0.1)
    with pytest.raises(ValueError, match="does not fit"):
        EquivalentClassOptimizer(base, group, followers={mlp(3, 9, 2): module.online})
    with pytest.raises(ValueError, match="Networks has no tragte"):
        ec_sgd(module, followers={"tragte": "online"})
    with pytest.raises(TypeError, match="know no module"):
        EquivalentClassOptimizer(base, group, followers={"target": "online"})
