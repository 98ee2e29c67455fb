"""Networks that the tests of traces share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import ScalingGroup


class Net(nn.Module):
    """Linear, relu, linear; what happens to the hidden features in between is up to the test."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda m, h: h) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        self.between = between
        self.head = nn.Linear(4, 3)
        self.register_buffer("state", torch.zeros(4))
        self.register_buffer("wide", torch.zeros(5, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y = self.between(self, h)
        return self.head(h if y is None else y)


def signature(group: ScalingGroup) -> list[Any]:
    return [(c.parameter, c.region, c.incoming.tolist(), c.outgoing.tolist(), c.additive) for c in group.couplings]


def snapshot(module: nn.Module) -> dict[str, Any]:
    tensors = module.state_dict(keep_vars=True)
    return {
        "tensors": {name: (id(t), t._version, t.detach().clone()) for name, t in tensors.items()},
        "grads": {name: p.grad for name, p in module.named_parameters()},
        "attributes": {name: dict(vars(part)) for name, part in module.named_modules()},
        "training": [part.training for part in module.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, _, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, f"{name} is another tensor"
        torch.testing.assert_close(after["tensors"][name][2], value, rtol=0, atol=0, msg=name)
    assert after["grads"] == before["grads"]
    assert after["attributes"] == before["attributes"]
    assert after["training"] == before["training"]
    assert torch.equal(after["random"], before["random"])


def by_hand(m: Any, h: Tensor) -> Tensor | None:
    """Control flow that depends on data, so that only a real call will do; it touches nothing else."""
    return h if bool(torch.zeros(()) == 0) else None
