from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, plain_cnn
from tests.optim.training import RULES, distance, ec_sgd, rescaled, train
from tests.selection import examples, few

BUILD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "mlp": (lambda: mlp(6, 8, 8, 3, activation=nn.PReLU), (6,), 3, 0.02),
    "cnn": (plain_cnn, (1, 8, 8), 3, 0.03),
    "residual": (ResidualMLP, (3,), 2, 0.02),
    "resnet": (ResNet, (1, 6, 6), 3, 0.02),
    "dense": (DenseNet, (1, 5, 5), 3, 0.1),
}


def data(shape: tuple[int, ...], classes: int, regression: bool) -> tuple[Tensor, Tensor]:
    """Targets that can be learned: they depend on the largest directions of a random teacher."""
    x = torch.randn(64, *shape, dtype=torch.float64)
    score = x.flatten(1) @ torch.randn(x[0].numel(), classes, dtype=torch.float64)
    return x, score / score.std() if regression else score.argmax(1)


def fell(losses: list[float]) -> bool:
    """Whether the loss is finite and lower in the end, over whole passes of the data."""
    return all(map(math.isfinite, losses)) and sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize(
    ("name", "regression", "options"),
    few(
        [
            ("mlp", False, {}),
            ("mlp", True, {}),
            ("mlp", False, {"nesterov": True}),
            ("mlp", False, {"dampening": 0.3}),
            ("cnn", False, {}),
            ("residual", True, {}),
            ("residual", False, {}),
            ("resnet", False, {}),
            ("dense", False, {}),
        ],
        [("mlp", False, {"nesterov": True}), ("residual", True, {})],
    ),
)
@RULES
def test_training_depends_on_the_class_alone(rule: str, name: str, regression: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    build, shape, outputs, lr = BUILD[name]
    module = build().double()
    x, y = data(shape, outputs, regression)
    other = rescaled(module, x, 0.7)
    assert distance(module, other, x) < 1e-10

    sgd = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-3, **options}
    pair = copy.deepcopy(module), copy.deepcopy(other)
    for one in pair:
        losses = train(one, ec_sgd(one, x, rule=rule, wrapper={"refresh_interval": 37}, **sgd), x, y, range(200))
        assert fell(losses)
    assert distance(*pair, x) < 1e-8

    plain = copy.deepcopy(module), copy.deepcopy(other)
    for one in plain:
        train(one, torch.optim.SGD(one.parameters(), **sgd), x, y, range(200))
    # not (a < b), so that a run that diverges counts as different
    assert not distance(*plain, x) < 1e-2


@RULES
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_training_depends_on_the_class_alone_when_it_is_rescaled_on_the_way(name: str, rule: str) -> None:
    torch.manual_seed(5)
    build, shape, outputs, lr = BUILD[name]
    module = build().double()
    x, y = data(shape, outputs, regression=True)
    other = copy.deepcopy(module)
    first, second = (ec_sgd(one, x, rule=rule, lr=lr, momentum=0.9) for one in (module, other))
    for start in (0, 15, 30):
        for one, optimizer in ((module, first), (other, second)):
            train(one, optimizer, x, y, range(start, start + 15))
            optimizer.refresh()
            one.zero_grad()
            optimizer.step()  # no gradients: only balances and chooses, and moves on by the momentum at most
    assert distance(module, other, x) < 1e-9


@examples(40)
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    activation=st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.PReLU]),
    bias=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    variant=st.sampled_from(["plain", "nesterov", "dampening"]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    refresh_interval=st.sampled_from([1, 3, 7, None]),
    max_path_ratio=st.sampled_from([1.01, 2.0]),
    free_start=st.sampled_from([0.5, 1.0, 4.0]),
    spread=st.floats(0.1, 2.0),
    rule=st.sampled_from(["unit", "path"]),
)
def test_a_run_of_any_mlp_with_any_options_depends_on_the_class_alone(
    seed: int,
    widths: list[int],
    activation: type[nn.Module],
    bias: bool,
    momentum: float,
    variant: str,
    weight_decay: float,
    refresh_interval: int | None,
    max_path_ratio: float,
    free_start: float,
    spread: float,
    rule: str,
) -> None:
    torch.manual_seed(seed)
    module = mlp(3, *widths, 2, activation=activation, bias=bias).double()
    x, y = data((3,), 2, regression=True)
    other = rescaled(module, x, spread)
    options: dict[str, Any] = {"lr": 0.01, "momentum": momentum, "weight_decay": weight_decay}
    if momentum and variant == "nesterov":
        options["nesterov"] = True
    elif momentum and variant == "dampening":
        options["dampening"] = 0.5
    wrapper = {"refresh_interval": refresh_interval, "max_path_ratio": max_path_ratio, "free_start": free_start}
    start = copy.deepcopy(module)
    for one in (module, other):
        train(one, ec_sgd(one, x, rule=rule, wrapper=wrapper, **options), x, y, range(20))
    assume(bool(module(x).any()) or bool(other(x).any()))  # there is no relative error of two dead networks
    assert distance(module, other, x) < 1e-8
    assert distance(start, module, x) > 1e-6


@RULES
def test_staying_at_the_current_weights_is_not_invariant(rule: str) -> None:
    torch.manual_seed(0)
    module = mlp(4, 6, 2).double()
    x, y = data((4,), 2, regression=True)
    other = rescaled(module, x)
    for one in (module, other):
        base = torch.optim.SGD(one.parameters(), lr=0.01)
        optimizer = EquivalentClassOptimizer(base, scaling_group(one, x), rule=rule, representative="current")
        train(one, optimizer, x, y, range(20))
    assert distance(module, other, x) > 1e-3
