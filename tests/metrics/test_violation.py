"""The metric of how far a loss is from staying the same when units are rescaled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import InvarianceViolation, check_invariance, scaling_group
from tests.networks import mlp


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mlp(5, 9, 7, 3).float()
    for layer in (net[0], net[2]):
        nn.init.constant_(layer.bias, 0.5)  # so that each unit is switched on by some inputs
    return net, torch.randn(20, 5), torch.arange(20) % 3


def test_the_largest_violation_of_all_updates() -> None:
    net, x, y = problem()
    group, metric = scaling_group(net, x), InvarianceViolation()
    F.cross_entropy(net(x), y).backward()
    metric.update(group)
    assert float(metric.compute()) == 0.0
    expected = []
    for size in (1e-3, 1e-2, 1e-4):
        net.zero_grad()
        (F.cross_entropy(net(x), y) + size * net[2].weight.abs().sum()).backward()
        metric.update(group)
        expected.append(float(check_invariance(group).ratio.max()))
    assert 0.001 < expected[2] < expected[0] < expected[1] < 1
    assert float(metric.compute()) == pytest.approx(expected[1])
    assert float(pickle.loads(pickle.dumps(copy.deepcopy(metric))).compute()) == pytest.approx(expected[1])
    metric.reset()
    assert float(metric.compute()) == 0.0


def test_a_coarser_precision_explains_more() -> None:
    net, x, y = problem()
    group, metric = scaling_group(net, x), InvarianceViolation(roundoff=2**-8)
    (F.cross_entropy(net(x), y) + 1e-4 * net[2].weight.abs().sum()).backward()
    metric.update(group)
    assert float(metric.compute()) == 0.0


def test_a_network_without_units_violates_nothing() -> None:
    net = nn.Linear(3, 2)
    net(torch.randn(4, 3)).sum().backward()
    metric = InvarianceViolation()
    metric.update(scaling_group(net, torch.randn(4, 3)))
    assert float(metric.compute()) == 0.0
