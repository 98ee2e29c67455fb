"""Handwritten digits, and the LightningModule, Trainer and plain loop that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, scaling_group
from tests.selection import few

Batch = tuple[Tensor, Tensor]
EXAMPLE = torch.zeros(1, 64)

#: For what does not depend on how a step is taken; the tests of the optimizer alone run both rules always.
RULES = pytest.mark.parametrize("rule", few(["unit", "path"], ["unit"]))

#: How the freedoms are found; the default run has the other way in SETTINGS.
EXAMPLES = pytest.mark.parametrize("example", few([None, EXAMPLE], [None]), ids=["first step", "example"])

#: Both rules and both ways of finding the freedoms, for what should depend on neither.
SETTINGS = pytest.mark.parametrize(
    ("example", "rule"), [(None, "unit"), (EXAMPLE, "path")], ids=["first step-unit", "example-path"]
)


@cache
def digits() -> Batch:
    """All 1797 images as rows in [0, 1], and their digits."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def loader(count: int = 4, size: int = 32, shuffle: bool = False) -> DataLoader[Any]:
    """The first ``count`` batches, in the order of the data set unless shuffled."""
    images, labels = digits()
    return DataLoader(TensorDataset(images[: count * size], labels[: count * size]), size, shuffle=shuffle)


def batches(count: int = 4, size: int = 32, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """The batches of an unshuffled loader."""
    return [(x.to(dtype), y) for x, y in loader(count, size)]


def mlp(seed: int = 0, width: int = 16) -> nn.Sequential:
    """A network of 2 * ``width`` freedoms."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def sgd(net: nn.Module, **options: Any) -> SGD:
    """The optimizer that most tests use; momentum shows mistakes that a single step does not."""
    return SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


class Classifier(LightningModule):
    """A pipeline that knows nothing of scaling groups.

    Args:
        net: the network.
        configure: what ``configure_optimizers`` does.
        example: the ``example_input_array``.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        configure: Callable[[LightningModule], Any] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self._configure = configure
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return sgd(self) if self._configure is None else self._configure(self)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer that does nothing but train."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, **options: Any) -> Trainer:
    """Train, by default for two epochs of four batches."""
    run = trainer(*callbacks, **options)
    run.fit(module, loader() if data is None else data)
    return run


def quiet(**options: Any) -> EquivalentClassOptimization:
    """The callback, without its report; it refreshes in each epoch, however few its steps are."""
    interval = {} if options.get("rule") == "paper" else {"refresh_interval": "epoch"}
    return EquivalentClassOptimization(**{"verbose": False, **interval, **options})


def wrapped(net: nn.Module, base: Optimizer, example: Tensor = EXAMPLE, **options: Any) -> EquivalentClassOptimizer:
    """The optimizer of the plain loop; by default it refreshes when it is asked to."""
    return EquivalentClassOptimizer(base, scaling_group(net, example), **{"refresh_interval": None, **options})


def train_plainly(
    net: nn.Module,
    optimizer: Any,
    data: Sequence[Batch],
    epochs: int = 2,
    rates: Sequence[Sequence[float]] | None = None,
    refresh_each_epoch: bool = True,
    before_epoch: Callable[[int], None] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[], None] | None = None,
    first_is_plain: bool = False,
) -> None:
    """The loop that the Trainer is to be equal to, with the learning rates of each step if they change.

    Args:
        net: the network.
        optimizer: an equivalent-class optimizer.
        data: the batches of every epoch.
        epochs: their number.
        rates: for each step those of the parameter groups.
        refresh_each_epoch: whether the optimizer is asked to refresh, but in the first epoch.
        before_epoch: called with the number of the epoch, ahead of the refresh.
        before_step: called when the gradients are there.
        after_step: called when the step is taken.
        after_epoch: called at the end of an epoch.
        first_is_plain: whether the base takes the first step by itself, as under manual optimization.
    """
    step = 0
    for epoch in range(epochs):
        if before_epoch is not None:
            before_epoch(epoch)
        if epoch > 0 and refresh_each_epoch:
            optimizer.refresh()
        for x, y in data:
            if rates is not None:
                for group, rate in zip(optimizer.param_groups, rates[step], strict=True):
                    group["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if before_step is not None:
                before_step()
            (optimizer.optimizer if first_is_plain and step == 0 else optimizer).step()
            if after_step is not None:
                after_step()
            step += 1
        if after_epoch is not None:
            after_epoch()


class Rates(Callback):
    """Takes down the learning rates of every step."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.steps.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in module.parameters()]


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def same_state(one: Any, two: Any) -> bool:
    """Whether two nested states, of optimizers say, agree bit for bit."""
    (leaves, structure), (others, other_structure) = tree_flatten(one), tree_flatten(two)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def is_clean(module: nn.Module) -> bool:
    """Whether nothing that watches the module is left behind."""
    no_mode = torch.utils._python_dispatch._get_current_dispatch_mode() is None
    hooks = nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks
    return no_mode and not hooks and not {"training_step", "forward"} & set(vars(module))
