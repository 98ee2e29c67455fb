"""The gradient is asked in pipelines: nothing is held fixed without need, in any precision, and what must be is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import ec_sgd
from tests.lightning_integration.modules import EXAMPLE, Classifier, fit, quiet
from tests.selection import few

WAYS: list[dict[str, Any]] = [
    {"precision": "32-true"},
    {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    {"precision": "64-true"},
    {"precision": "bf16-true"},
    {"precision": "bf16-mixed"},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
]


@pytest.mark.parametrize("options", few(WAYS, 2), ids=str)
def test_a_pipeline_raises_no_alarm(options: dict[str, Any]) -> None:
    callback = quiet()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The loss changes")
        fit(Classifier(), callback, max_epochs=4, **options)
    assert callback.group is not None
    assert not [why for why in callback.group.costs if why.name == "gradient"]


class Later(Classifier):
    """From its third epoch on a loss looks at hidden values."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return loss if self.current_epoch < 2 else loss + (self.net[:2](x) - 1).square().mean()


@pytest.mark.parametrize("precision", few(["32-true", "bf16-mixed"], 1))
@pytest.mark.parametrize("way", ["callback", "ec_sgd"])
def test_a_loss_on_hidden_values_is_noticed_when_it_begins(precision: Any, way: str) -> None:
    callback = quiet()
    module = Later(
        configure=lambda m: (
            SGD(m.parameters(), lr=0.01) if way == "callback" else ec_sgd(m, lr=0.01, refresh_interval=4)
        ),
        example=EXAMPLE,
    )
    torch.nn.init.constant_(module.net[0].bias, 0.3)  # a unit that nothing switches on cannot be judged
    with pytest.warns(UserWarning, match=r"The loss changes when units of net\.0\.weight.*check=None"):
        run = fit(module, *([callback] if way == "callback" else []), max_epochs=5, precision=precision)
    (optimizer,) = run.optimizers
    names = [optimizer.group.describe(unit) for unit in range(optimizer.group.num_units)]
    broken = [name for name in names if "net.0.weight" in name]
    assert len(broken) <= (0 if precision == "32-true" else 8)  # of 16
    assert [name for name in names if "net.2.weight[" in name]
    assert optimizer.violation > 0.01
