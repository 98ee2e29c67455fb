"""Plain loops that the tests of pipelines compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tests.lightning_integration.modules import Batch, batches, mlp, sgd, train_plainly, weights, wrapped


def plainly(rule: str = "unit", data: Sequence[Batch] | None = None, **loop: Any) -> list[Tensor]:
    """The weights at the end of a plain loop."""
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches() if data is None else data, **loop)
    return weights(net)


STEPS = 12


#: What ``configure_optimizers`` makes of a module's network, by its kind of momentum.
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda net: AdamW(net.parameters(), lr=0.1, betas=(0.9, 0.99)),
}
