"""A group is found from the next real call of a module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_ecopt.symmetry import GroupFromNextCall, ScalingGroup, scaling_group
from tests.networks import ResidualMLP, norm_cnn
from tests.symmetry.helpers import assert_same, draw_
from tests.symmetry.trace.networks import Net, signature


class Trained(nn.Module):
    """A module with a training step, as a Lightning module has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualMLP().double()
        self.skip = self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        if self.fail:
            raise RuntimeError("no data")
        return None if self.skip else F.mse_loss(self(batch), torch.ones(len(batch), 2, dtype=torch.float64))


def test_a_training_step_gives_the_group_of_the_module(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    assert pending.group is None
    expected = type(module).training_step(module, batch, 0)
    loss = module.training_step(batch, 0)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    assert isinstance(pending.group, ScalingGroup)
    assert signature(pending.group) == signature(scaling_group(module, batch))
    assert pending.group.unseen == ()
    assert "training_step" not in vars(module)
    assert _get_current_dispatch_mode() is None


def test_a_forward_call_gives_the_same_group_as_a_trace(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    module(batch)
    assert pending.group is not None
    expected = scaling_group(module, batch)
    assert signature(pending.group) == signature(expected)
    assert sum(pending.group.costs.values()) == sum(expected.costs.values()) == 2
    assert "forward" not in vars(module)
    first = pending.group
    module(batch)
    assert pending.group is first


def test_gradients_of_a_watched_step_are_those_of_an_unwatched_one(batch: Tensor) -> None:
    module, other = Trained(), Trained()
    other.load_state_dict(module.state_dict())
    GroupFromNextCall(module, "training_step")
    module.training_step(batch, 0).backward()
    other.training_step(batch, 0).backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_loss_is_watched_too(batch: Tensor) -> None:
    class Penalised(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            h = F.relu(self.net.stem(batch))
            return self(batch).sum() + h[:, :2].square().mean()

    module = Penalised()
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(batch, 0)
    assert pending.group is not None
    assert pending.group.num_units == 2 + 5


def test_a_step_without_output_keeps_waiting(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    module.skip = True
    assert module.training_step(batch, 0) is None
    assert pending.group is None
    module.skip = False
    module.training_step(batch, 1)
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_an_exception_leaves_nothing_behind(batch: Tensor) -> None:
    from torch.nn.modules import module as registry

    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    hooks = len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)
    module.fail = True
    with pytest.raises(RuntimeError, match="no data"):
        module.training_step(batch, 0)
    assert _get_current_dispatch_mode() is None
    assert (len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)) == hooks
    assert pending.group is None
    module.fail = False
    module.training_step(batch, 0)
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_the_users_own_attribute_is_put_back(batch: Tensor) -> None:
    module = Trained()
    calls = []

    def own(batch: Tensor, index: int) -> Tensor:
        calls.append(index)
        return module(batch).sum()

    module.training_step = own  # type: ignore[method-assign]
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(batch, 7)
    assert pending.group is not None
    assert vars(module)["training_step"] is own
    assert calls == [7]


def test_a_cancelled_watch_gives_the_method_back(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    pending.cancel()
    assert "forward" not in vars(module)
    module(batch)
    assert pending.group is None


def test_cancelling_spares_what_someone_else_has_put_there_since() -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    module.forward = own = lambda x: x  # type: ignore[method-assign]
    pending.cancel()
    assert vars(module)["forward"] is own


def test_a_pending_group_leaves_out_parameters_of_others(batch: Tensor) -> None:
    module, foreign = Trained(), nn.Parameter(torch.zeros(1))
    pending = GroupFromNextCall(module, "forward", [*module.parameters(), foreign])
    module(batch)
    assert pending.covers([foreign])
    assert pending.group is not None
    assert pending.group.fingerprint() == scaling_group(module, batch).fingerprint()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_watched_call_without_gradients_finds_the_same_group(mode: Callable[[], Any], batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    with mode():
        module(batch)
    assert pending.group is not None
    assert signature(pending.group) == signature(scaling_group(module, batch))


def test_what_a_watched_call_keeps_in_attributes_is_grounded_and_kept(x: Tensor) -> None:
    module = Net(lambda m, h: setattr(m, "hidden", h))
    pending = GroupFromNextCall(module, "forward")
    module(x)
    assert pending.group is not None
    assert pending.group.num_units == 0
    assert module.hidden.shape == (5, 4)


def test_a_watched_call_updates_running_statistics_once() -> None:
    module = norm_cnn()
    other = deepcopy(module)
    image = torch.randn(4, 1, 8, 8)
    pending = GroupFromNextCall(module, "forward")
    assert torch.equal(module(image), other(image))
    for (name, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_the_group_of_a_watched_call_moves_the_module_itself(batch: Tensor) -> None:
    module = Trained()
    draw_(module, torch.Generator().manual_seed(0))
    pending = GroupFromNextCall(module, "forward")
    before = module(batch).detach()
    assert pending.group is not None
    weight = module.net.stem.weight.detach().clone()
    pending.group.act_(torch.ones(9))
    assert not torch.equal(module.net.stem.weight, weight)
    assert_same(module(batch).detach(), before)
