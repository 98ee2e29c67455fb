"""The scaling group of parameters whose module nobody has named."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd, scaling_group
from lightning_ecopt.symmetry import GroupFromModuleCalls, isolation
from tests.networks import ResNet, mlp


@pytest.fixture(autouse=True)
def nothing_is_left(few_objects: None) -> Iterator[None]:
    yield
    gc.collect()
    assert not isolation._waiting
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_the_call_of_one_module_gives_the_group_of_a_trace() -> None:
    torch.manual_seed(0)
    module, x = ResNet(), torch.randn(2, 1, 6, 6)
    calls = GroupFromModuleCalls(module.parameters())
    assert calls.group is None
    module(x)
    found, traced = calls.group, scaling_group(module, x)
    assert found is not None
    assert found.num_units == traced.num_units > 0
    assert found.parameters.keys() == traced.parameters.keys()
    before = module.eval()(x)
    found.act_(torch.randn(found.num_units))
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    calls.cancel()


def test_what_happens_between_two_calls_is_held_fixed() -> None:
    torch.manual_seed(0)
    encoder, decoder, x = mlp(4, 6, 5).double(), mlp(5, 7, 2).double(), torch.randn(8, 4, dtype=torch.float64)
    calls = GroupFromModuleCalls([*encoder.parameters(), *decoder.parameters()])

    def network() -> Tensor:
        return decoder(torch.sigmoid(encoder(x)))

    before = network()
    group = calls.group
    assert group is not None
    assert group.num_units == 6 + 7
    group.act_(torch.randn(13, dtype=torch.float64))
    torch.testing.assert_close(network(), before, rtol=1e-12, atol=1e-12)


def test_calls_are_watched_until_every_parameter_was_seen() -> None:
    first, second = mlp(4, 6, 2), mlp(4, 5, 2)
    calls = GroupFromModuleCalls([*first.parameters(), *second.parameters()])
    first(torch.randn(3, 4))
    early = calls.group
    assert early is not None
    assert (early.num_units, len(early.unseen)) == (6, 4)
    assert calls.group is early
    second(torch.randn(3, 4))
    late = calls.group
    assert late is not None
    assert (late.num_units, late.unseen) == (11, ())
    assert not hooks._global_forward_pre_hooks


def test_calls_without_gradients_and_of_other_modules_do_not_count() -> None:
    module, other = mlp(4, 6, 2), mlp(4, 6, 2)
    calls = GroupFromModuleCalls(module.parameters())
    with torch.no_grad():
        module(torch.randn(3, 4))
    other(torch.randn(3, 4))
    assert calls.group is None
    calls.cancel()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(4, 6, 2)
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.fails:
            raise KeyError("its own")
        return x


def test_a_call_that_raises_raises_its_own_error_and_the_next_one_is_watched() -> None:
    module = Failing()
    calls = GroupFromModuleCalls(module.parameters())
    with pytest.raises(KeyError, match="its own"):
        module(torch.randn(3, 4))
    module.fails = False
    module(torch.randn(3, 4))
    group = calls.group
    assert group is not None
    assert group.num_units == 6


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(5, 2)
        self.middle = nn.Sequential(nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_computes_again_costs_no_freedom(use_reentrant: bool) -> None:
    module = Checkpointed(use_reentrant)
    calls = GroupFromModuleCalls(module.parameters())
    module(torch.randn(3, 4)).square().mean().backward()
    group = calls.group
    assert group is not None
    assert group.num_units == 11


def test_two_watch_one_call_side_by_side() -> None:
    module = mlp(4, 6, 5, 2)
    both = [GroupFromModuleCalls(module[:2].parameters()), GroupFromModuleCalls(module[2:].parameters())]
    module(torch.randn(3, 4))
    units = [calls.group.num_units for calls in both if calls.group is not None]
    assert units == [0, 5]  # the first six lead into parameters of the other


def test_an_optimizer_of_parameters_alone_takes_the_steps_of_one_that_knows_the_module() -> None:
    torch.manual_seed(0)
    start = mlp(4, 6, 5, 2)
    weights = []
    for alone in (True, False):
        module = mlp(4, 6, 5, 2)
        module.load_state_dict(start.state_dict())
        optimizer = ECSGD(module.parameters(), lr=0.1, momentum=0.9) if alone else ec_sgd(module, lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            module(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        assert optimizer.group is not None
        assert optimizer.group.num_units == 11
        weights.append(list(module.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    assert not torch.equal(weights[0][0], start[0].weight)


def test_a_step_before_any_call_says_what_to_do() -> None:
    module = mlp(4, 6, 2)
    optimizer = EquivalentClassOptimizer(torch.optim.SGD(module.parameters()))
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no module with the optimizer's parameters has been called"):
        optimizer.step()
    assert optimizer.group is None
    optimizer.bind(scaling_group(module, torch.randn(1, 4)))
    optimizer.step()
