"""Warnings point at the user's line."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, scaling_group
from lightning_ecopt.common.warn import warn
from tests.networks import mlp


class Odd(SGD):
    """Keeps something of which nobody knows how it scales."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["odd"] = torch.ones_like(p)
        return super().step(closure)


def here() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def no_freedoms() -> int:
    module, x = mlp(4, 6, 3, activation=nn.Tanh), torch.randn(2, 4)
    group = scaling_group(module, x)
    EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), group)
    return here() - 1


def no_freedoms_at_a_step() -> int:
    module, x = mlp(4, 6, 3, activation=nn.Tanh), torch.randn(2, 4)
    optimizer = ECSGD(module.parameters())
    module(x).sum().backward()
    optimizer.step()
    return here() - 1


def unknown_state() -> int:
    module, x = mlp(4, 6, 3), torch.randn(2, 4)
    optimizer = EquivalentClassOptimizer(Odd(module.parameters(), lr=0.1), scaling_group(module, x), refresh_interval=1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    module(x).sum().backward()
    optimizer.step()
    optimizer.step()
    return here() - 1


@torch.no_grad()
def in_a_decorated_function() -> int:
    warn("something")
    return here() - 1


@pytest.mark.parametrize("call", [no_freedoms, no_freedoms_at_a_step, unknown_state, in_a_decorated_function])
def test_a_warning_points_at_the_line_of_the_user(call: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = call()
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]


def test_a_warning_is_given_once_for_each_line_and_can_be_an_error() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("something else")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="something"):
            warn("something")


class Module(nn.Module):
    """A network that calls another user's code, whose line is the innermost."""

    def forward(self, x: Tensor) -> Tensor:
        warn("inside")
        return x


def test_the_innermost_line_of_users_is_told() -> None:
    with pytest.warns(UserWarning, match="inside") as caught:
        Module()(torch.zeros(1))
    source, start = inspect.getsourcelines(Module.forward)
    assert start <= caught[0].lineno < start + len(source)
