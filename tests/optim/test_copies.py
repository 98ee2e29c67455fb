"""Copies and pickles of a network and its optimizer train like the original, and do not touch it."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import RMSprop
from torch.optim.lr_scheduler import StepLR

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.optim.training import RULES, problem, same_bits, train, weights_of
from tests.selection import few, full

Make = Callable[[nn.Module, Tensor, Any], EquivalentClassOptimizer]
MAKES: dict[str, Make] = {
    "ECSGD": lambda module, x, rule: ECSGD(module.parameters(), 0.05, 0.9, rule=rule, refresh_interval=4),
    "ECAdamW": lambda module, x, rule: ECAdamW(module.parameters(), 0.01, rule=rule, refresh_interval=4),
    "a group": lambda module, x, rule: EquivalentClassOptimizer(
        RMSprop(module.parameters(), 0.01), scaling_group(module, x), rule=rule, refresh_interval=4
    ),
    "ec_sgd": lambda module, x, rule: ec_sgd(module, lr=0.05, momentum=0.9, rule=rule, refresh_interval=4),
}


def saved(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "file": saved,
    "optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
}


@RULES
@pytest.mark.parametrize("steps", few([0, 1, 4, 6], [0, 6]))
@pytest.mark.parametrize("way", few(WAYS, ["copy", "pickle"]))
@pytest.mark.parametrize("name", MAKES)
def test_a_copy_trains_like_the_original_and_leaves_it_alone(name: str, way: str, steps: int, rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = MAKES[name](module, x, rule)
    StepLR(optimizer, 2)  # puts a function of its own at `step`
    train(module, optimizer, x, y, range(steps))
    other, copied = WAYS[way]((module, optimizer))
    assert type(copied) is type(optimizer)
    before = weights_of(module)
    train(other, copied, x, y, range(steps, steps + 6))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    train(module, optimizer, x, y, range(steps, steps + 6))
    assert same_bits(module, other)


class Holder(nn.Module):
    """A module that holds its optimizer and a scheduler, as a LightningModule may."""

    def __init__(self, name: str, rule: str) -> None:
        super().__init__()
        self.net, self.x, self.y = problem(4, 6, 3)
        self.optimizer = MAKES[name](self.net, self.x, rule)
        self.scheduler = StepLR(self.optimizer, 2)

    def fit(self, steps: range) -> None:
        for step in steps:
            train(self.net, self.optimizer, self.x, self.y, range(step, step + 1))
            self.scheduler.step()


@RULES
@pytest.mark.parametrize("name", few(MAKES, ["ec_sgd"]))
def test_a_module_that_holds_its_optimizer_can_be_copied(name: str, rule: str) -> None:
    module = Holder(name, rule)
    module.fit(range(3))
    other = copy.deepcopy(module)
    before = weights_of(module)
    other.fit(range(3, 7))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    module.fit(range(3, 7))
    assert same_bits(module, other)
    assert module.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]


def _train_elsewhere(pickled: bytes, results: Any) -> None:
    module = pickle.loads(pickled)
    module.fit(range(3, 7))
    results.put([p.tolist() for p in module.parameters()])


@full
@RULES
def test_another_process_trains_on_what_it_is_sent(rule: str) -> None:
    module = Holder("a group", rule)
    module.scheduler = StepLR(module.optimizer, 2)
    module.fit(range(3))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_train_elsewhere, args=(pickle.dumps(copy.deepcopy(module)), results))
    process.start()
    found = results.get(timeout=120)
    process.join()
    module.fit(range(3, 7))
    assert found == [p.tolist() for p in module.parameters()]


def test_hooks_stay_with_the_original_as_in_torch() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer, calls = MAKES["a group"](module, x, "unit"), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    other, copied = copy.deepcopy((module, optimizer))
    train(other, copied, x, y, range(2))
    assert not calls
    copied.register_step_post_hook(lambda *_: calls.append(2))
    train(other, copied.optimizer, x, y, range(1))
    assert calls == [2]
