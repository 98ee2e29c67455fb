"""Targets and averages that are mixed with the weights follow them through every balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from lightning_ecopt import scaling_group
from tests.lightning_integration.followers import PIPELINES, Pipeline, batches
from tests.lightning_integration.modules import fit, quiet

BASES: dict[str, Callable[..., Any]] = {
    "sgd": lambda ps, lr: SGD(ps, lr, momentum=0.9),
    "adamw": lambda ps, lr: AdamW(ps, lr),
}


def rescale_(module: Pipeline, spread: float) -> None:
    """Move what is trained within its class."""
    trained = {id(p) for p in module.trained()}
    for name, part in module.named_children():
        if any(id(p) in trained for p in part.parameters()):
            inputs = torch.randn(16, next(p for p in part.parameters() if p.ndim == 2).shape[1], dtype=torch.double)
            if name == "encoder_q":
                inputs = module.x
            group = scaling_group(part, inputs)
            torch.manual_seed(1)
            group.act_(spread * torch.randn(group.num_units, dtype=torch.double))


def trained(kind: type[Pipeline], base: str, lr: float, spread: float, **options: Any) -> Pipeline:
    module = kind(lambda ps: BASES[base]([*ps], lr))
    rescale_(module, spread)
    module.copy()
    fit(module, quiet(refresh_interval=2, **options), data=batches(), max_epochs=2)
    return module


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("kind", PIPELINES)
def test_at_rest_no_follower_changes(kind: type[Pipeline], spread: float, base: str, rule: str) -> None:
    module = trained(kind, base, 1e-13, spread, rule=rule)
    first = module.functions[0]
    for functions in module.functions:
        for one, other in zip(functions, first, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("rule", ["unit", "path"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", PIPELINES)
def test_training_from_a_rescaled_start_is_the_same(kind: type[Pipeline], base: str, rule: str) -> None:
    one, other = (trained(kind, base, 0.01, spread, rule=rule) for spread in (0.0, 1.0))
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-6, atol=0)
    for functions, others in zip(one.functions, other.functions, strict=True):
        torch.testing.assert_close(functions, others, rtol=1e-6, atol=1e-8)
    assert abs(one.losses[-1] - one.losses[0]) > 1e-4
