"""Parameters that are frozen, thaw and come back while training runs, and parameters that no call uses at first."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from lightning_ecopt.symmetry import pending
from tests.networks import mlp
from tests.optim.training import RULES, problem, same_bits, through_a_file, train
from tests.selection import few

WAYS: dict[str, Any] = {
    "ec_sgd": lambda m, x, rule: ec_sgd(m, m.parameters(), lr=0.05, momentum=0.9, rule=rule, refresh_interval=4),
    "ec_adamw": lambda m, x, rule: ec_adamw(m, m.parameters(), lr=0.01, rule=rule, refresh_interval=4),
    "ECSGD": lambda m, x, rule: ECSGD(m.parameters(), lr=0.05, momentum=0.9, rule=rule, refresh_interval=4),
    "a group": lambda m, x, rule: EquivalentClassOptimizer(
        AdamW(m.parameters(), lr=0.01), scaling_group(m, x), rule=rule, refresh_interval=4
    ),
}
EVERY_WAY = pytest.mark.parametrize("way", few(list(WAYS), ["ec_sgd", "ECSGD"]))


@EVERY_WAY
@RULES
def test_what_is_frozen_in_the_middle_does_not_move(way: str, rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = WAYS[way](module, x, rule)
    train(module, optimizer, x, y, range(6))
    module[2].requires_grad_(False)
    before, others = copy.deepcopy(module[2]), copy.deepcopy(module[4])
    optimizer.refresh()
    train(module, optimizer, x, y, range(6, 15))  # with refreshes at the interval, too
    assert same_bits(module[2], before)
    assert not same_bits(module[4], others)


@EVERY_WAY
@RULES
def test_what_comes_back_is_what_it_was(way: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    mode = pending.TraceMode
    monkeypatch.setattr(pending, "TraceMode", lambda *args: (traces.append(1), mode(*args))[1])
    module, x, y = problem(4, 6, 5, 3)
    optimizer = WAYS[way](module, x, rule)
    train(module, optimizer, x, y, range(3))
    group, rho = optimizer.group, optimizer.rule_state().get("rho")
    module[2].requires_grad_(False)
    train(module, optimizer, x, y, range(3, 6))
    module[2].requires_grad_(True)
    train(module, optimizer, x, y, range(6, 9))
    assert optimizer.group is group
    assert rho is None or torch.equal(optimizer.rule_state()["rho"], rho)
    assert len(traces) <= 1
    assert int(optimizer.usable_units().sum()) == 11


@RULES
def test_freezing_by_turns_leaves_two_members_of_a_class_alike(rule: str) -> None:
    def run(log_scale: Tensor) -> Tensor:
        module, x, y = problem(4, 6, 5, 3)
        scaling_group(module, x).act_(log_scale)
        optimizer = ec_sgd(module, lr=0.05, momentum=0.9, rule=rule)
        for step in range(8):
            module[0].requires_grad_(step % 2 == 0)
            module[4].requires_grad_(step % 3 != 1)
            optimizer.zero_grad()
            train(module, optimizer, x, y, range(step, step + 1))
        return module(x).detach()

    torch.manual_seed(1)
    torch.testing.assert_close(run(torch.randn(11).double()), run(torch.zeros(11).double()), rtol=0, atol=1e-9)


class Thaws:
    """A run whose first layer thaws before step 4."""

    def __init__(self, way: str, rule: str) -> None:
        self.module, self.x, self.y = problem(4, 6, 5, 3)
        self.module[:2].requires_grad_(False)
        self.optimizer = WAYS[way](self.module, self.x, rule)

    def go(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            if step >= 4:
                self.module[:2].requires_grad_(True)
            train(self.module, self.optimizer, self.x, self.y, range(step, step + 1))


@pytest.mark.parametrize("way", few(["ec_sgd", "ec_adamw", "ECSGD"], ["ec_sgd"]))
@RULES
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_run_is_resumed_bit_identical_before_and_after_the_thaw(way: str, rule: str, at: int) -> None:
    whole = Thaws(way, rule)
    whole.go(0, at)
    weights, state = copy.deepcopy(whole.module.state_dict()), through_a_file(whole.optimizer.state_dict())
    whole.go(at, 12)
    resumed = Thaws(way, rule)
    resumed.module.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.go(at, 12)
    assert same_bits(resumed.module, whole.module)


@RULES
def test_an_earlier_phase_is_loaded_with_its_rule(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 4, 3)
    module[:3].requires_grad_(False)
    optimizer = ec_sgd(module, module[4:].parameters(), lr=0.05, momentum=0.9, rule=rule)
    train(module, optimizer, x, y, range(2))
    weights, saved = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, x, y, range(2, 4))
    expected = copy.deepcopy(module.state_dict())
    module[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(module[2].parameters())})
    train(module, optimizer, x, y, range(4, 6))
    module[2].requires_grad_(False)
    optimizer.param_groups = optimizer.param_groups[:1]
    module.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, x, y, range(2, 4))
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


# Parameters that no call uses at first --------------------------------------------------------------------------------


class Skips(nn.Module):
    """Blocks that are skipped at random."""

    def __init__(self, chance: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chance, self.calls = chance, 0
        self.blocks = nn.ModuleList(mlp(4, 6, 4) for _ in range(6))
        self.head = mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        for block in self.blocks:
            if torch.rand((), generator=generator) < self.chance:
                x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("way", ["ec_sgd", "ECSGD"])
@RULES
def test_layers_that_are_skipped_at_random_are_found_one_after_the_other(way: str, rule: str) -> None:
    module, x, y = Skips().double(), torch.randn(8, 4).double(), torch.arange(8) % 3
    optimizer = WAYS[way](module, x, rule)
    units = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            units.append(optimizer.group.num_units)
    assert units[0] < units[-1] == 6 * 6 + 5
    assert units == sorted(units)
    assert all(p.isfinite().all() for p in module.parameters())
    assert "forward" not in vars(module)


def test_unused_parameters_are_named_once_and_looked_for_in_ever_fewer_steps() -> None:
    module = nn.ModuleDict({"net": mlp(4, 6, 3), "spare": nn.Linear(4, 3)})
    module.forward = lambda x: module["net"](x)  # the loss alone uses the spare layer
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    optimizer = ec_sgd(module, lr=0.05)
    looks = []
    look_again = pending.GroupFromNextCall.look_again
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(pending.GroupFromNextCall, "look_again", lambda own: (looks.append(step), look_again(own))[1])
        for step in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            if step >= 5:
                loss = loss + module["spare"](x).square().mean()
            loss.backward()
            before = module["spare"].weight.clone()
            optimizer.step()
            assert torch.equal(before, module["spare"].weight) == (step < 5)
    said = [str(one.message) for one in caught if "No traced call has used" in str(one.message)]
    assert len(said) == 1
    assert "spare.weight, spare.bias" in said[0]
    assert looks == [5, 6, 8, 12, 20, 36]


@RULES
def test_unused_parameters_take_the_steps_of_the_base(rule: str) -> None:
    module, x, y = problem(4, 6, 3)
    extra = nn.Parameter(torch.randn(3).double())
    base = SGD([*module.parameters(), extra], lr=0.05, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    alone = nn.Parameter(extra.detach().clone())
    plain = SGD([alone], lr=0.05, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            for p in (extra, alone):
                p.grad = p.detach().cos()
            F.mse_loss(module(x), y).backward()
            optimizer.step()
            plain.step()
            module.zero_grad()
    torch.testing.assert_close(extra, alone, rtol=0, atol=0)


def test_balancing_before_the_first_step_leaves_what_has_been_frozen() -> None:
    module, x, _ = problem(4, 6, 5, 3)
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), scaling_group(module, x))
    module[2].requires_grad_(False)
    before = copy.deepcopy(module[2])
    optimizer.start()
    assert same_bits(module[2], before)
