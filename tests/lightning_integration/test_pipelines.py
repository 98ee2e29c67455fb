"""What a pipeline does around the steps of its optimizer goes on as ever, and gives what a plain loop gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ScalingGroup, ec_sgd
from tests.lightning_integration.modules import (
    EXAMPLES,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    batches,
    digits,
    fit,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    sgd,
    train_plainly,
    trainer,
    weights,
    wrapped,
)
from tests.lightning_integration.pipelines import plainly

# Options of the Trainer -----------------------------------------------------------------------------------------------


class Evaluated(Classifier):
    """Validates, and counts the batches."""

    def __init__(self, example: Tensor | None = None) -> None:
        super().__init__(mlp(), example=example)
        self.validated = 0
        self.inference: set[bool] = set()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += 1
        self.inference.add(torch.is_inference_mode_enabled())
        self.log("validation loss", F.cross_entropy(self(batch[0]), batch[1]))


@EXAMPLES
def test_batches_may_be_limited(example: Tensor | None) -> None:
    ours = Evaluated(example)
    run = trainer(quiet(), limit_train_batches=3, limit_val_batches=1, val_check_interval=1)
    run.fit(ours, loader(), loader(2))
    assert ours.validated == 7  # one before training
    assert same(weights(ours), plainly(data=batches(3)))


@EXAMPLES
@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"check_val_every_n_epoch": 2}], ids=str)
def test_validation_may_come_at_any_time_and_without_inference_mode(
    options: dict[str, Any], example: Tensor | None
) -> None:
    ours = Evaluated(example)
    run = trainer(quiet(), inference_mode=False, num_sanity_val_steps=0, **options)
    run.fit(ours, loader(), loader(1))
    assert ours.validated == (4 if "val_check_interval" in options else 1)
    assert ours.inference == {False}
    assert same(weights(ours), plainly())


@pytest.mark.parametrize(("overfit", "count"), [(1, 1), (0.5, 2)])
def test_batches_may_be_overfitted(overfit: float, count: int) -> None:
    ours = Classifier(mlp())
    fit(ours, quiet(), overfit_batches=overfit)
    assert same(weights(ours), plainly(data=batches(count)))


@RULES
def test_a_run_may_end_within_an_epoch(rule: str) -> None:
    ours = Classifier(mlp())
    run = fit(ours, quiet(rule=rule), max_epochs=-1, max_steps=6)
    assert run.global_step == 6
    net = mlp()
    optimizer = wrapped(net, sgd(net), rule=rule)
    train_plainly(net, optimizer, batches(), epochs=1)
    optimizer.refresh()
    train_plainly(net, optimizer, batches(2), epochs=1)
    assert same(weights(ours), weights(net))


@EXAMPLES
def test_a_fast_dev_run_may_take_several_steps(example: Tensor | None) -> None:
    ours = Evaluated(example)
    trainer(quiet(), fast_dev_run=3).fit(ours, loader(), loader())
    assert same(weights(ours), plainly(data=batches(3), epochs=1))
    assert ours.validated == 3


@SETTINGS
def test_anomalies_may_be_looked_for_in_a_deterministic_run(example: Tensor | None, rule: str) -> None:
    ours = Classifier(mlp(), example=example)
    try:
        fit(ours, quiet(rule=rule), detect_anomaly=True, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(ours), plainly(rule))


@EXAMPLES
def test_a_barebones_run_is_the_same_run(example: Tensor | None) -> None:
    ours = Classifier(mlp(), example=example)
    # Such a Trainer takes no other options.
    run = Trainer(accelerator="cpu", devices=1, max_epochs=2, barebones=True, callbacks=[quiet()])
    run.fit(ours, loader())
    assert same(weights(ours), plainly())
    assert not run.callback_metrics


class Reloads(Classifier):
    """Has another loader in each epoch."""

    def train_dataloader(self) -> Any:
        return loader(self.current_epoch + 1)


@EXAMPLES
def test_loaders_may_be_made_anew(example: Tensor | None) -> None:
    ours, net = Reloads(mlp(), example=example), mlp()
    trainer(quiet(), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(ours)
    optimizer = wrapped(net, sgd(net))
    for epoch in range(3):
        if epoch:
            optimizer.refresh()
        train_plainly(net, optimizer, batches(epoch + 1), epochs=1)
    assert same(weights(ours), weights(net))


class TwoLoaders(Classifier):
    """Sums the losses of two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(self(x), y) for x, y in batch.values() if x is not None)


@SETTINGS
def test_loaders_may_be_combined(example: Tensor | None, rule: str) -> None:
    ours, net, callback = TwoLoaders(mlp(), example=example), mlp(), quiet(rule=rule)
    fit(ours, callback, data=CombinedLoader({"one": loader(2), "other": loader(4, 16)}, "max_size_cycle"))
    assert callback.group is not None
    assert callback.group.num_units == 32
    optimizer = wrapped(net, sgd(net), rule=rule)
    for epoch in range(2):
        if epoch:
            optimizer.refresh()
        for pair in zip(batches(2) * 2, batches(4, 16), strict=True):
            optimizer.zero_grad()
            sum(F.cross_entropy(net(x), y) for x, y in pair).backward()
            optimizer.step()
    assert same(weights(ours), weights(net))


class Interrupted(Classifier):
    """Breaks off at one step, once."""

    def __init__(self, at: int, example: Tensor | None) -> None:
        super().__init__(mlp(), example=example)
        self.at: int | None = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.at:
            self.at = None
            raise ArithmeticError("the user's own")
        return super().training_step(batch, batch_idx)


@SETTINGS
@pytest.mark.parametrize("at", [0, 5], ids=["at once", "later"])
def test_an_interrupted_run_can_be_followed_by_another(at: int, example: Tensor | None, rule: str) -> None:
    ours, net, callback = Interrupted(at, example), mlp(), quiet(rule=rule)
    with pytest.raises(ArithmeticError, match="the user's own"):
        fit(ours, callback)
    assert is_clean(ours)
    fit(ours, callback)
    if at:
        optimizer = wrapped(net, sgd(net), rule=rule)
        train_plainly(net, optimizer, batches(), epochs=1)
        optimizer.refresh()
        train_plainly(net, optimizer, batches(1), epochs=1)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(ours), weights(net))
    assert is_clean(ours)


# Modules --------------------------------------------------------------------------------------------------------------


class BuiltLate(Classifier):
    """Makes its network only when Lightning asks for it."""

    def __init__(self, example: Tensor | None) -> None:
        super().__init__(nn.Identity(), example=example)

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = mlp()


@SETTINGS
def test_a_network_may_be_made_when_training_starts(example: Tensor | None, rule: str) -> None:
    ours = BuiltLate(example)
    fit(ours, quiet(rule=rule))
    assert same(weights(ours), plainly(rule))


class Checkpointed(nn.Module):
    """Computes its hidden layers twice instead of keeping them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = mlp()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[1](self.inner[0](x))
        return self.inner[4](checkpoint(self.inner[2:4], hidden, use_reentrant=self.reentrant))


@EXAMPLES
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_may_be_recomputed(reentrant: bool, example: Tensor | None) -> None:
    ours, callback = Classifier(Checkpointed(reentrant), example=example), quiet()
    fit(ours, callback)
    assert callback.group is not None
    assert callback.group.num_units == 32
    assert same(weights(ours), plainly())


def _compiled_net(example: Tensor | None) -> Classifier:
    return Classifier(torch.compile(mlp(), backend="eager"), example=example)


def _compiled_in_place(example: Tensor | None) -> Classifier:
    module = Classifier(mlp(), example=example)
    module.net.compile(backend="eager")
    return module


def _compiled_module(example: Tensor | None) -> Classifier:
    return torch.compile(Classifier(mlp(), example=example), backend="eager")


class CompilesItself(Classifier):
    def configure_model(self) -> None:
        self.compile(backend="eager")


COMPILED = {
    "network": _compiled_net,
    "network in place": _compiled_in_place,
    "module": _compiled_module,
    "module in place": lambda example: CompilesItself(mlp(), example=example),
}


@EXAMPLES
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_modules_take_the_steps_of_a_plain_loop(form: str, example: Tensor | None) -> None:
    torch._dynamo.reset()
    ours, callback = COMPILED[form](example), quiet()
    fit(ours, callback)
    assert isinstance(callback.group, ScalingGroup)
    assert callback.group.num_units == 32
    assert same(weights(ours), plainly())
    # What is compiled stays so, and runs, after training.
    assert torch.isfinite(ours(digits()[0][:5])).all()


def test_a_compiled_network_is_watched_uncompiled_and_runs_compiled_afterwards() -> None:
    torch._dynamo.reset()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    ours = Classifier(torch.compile(mlp(), backend=backend))
    fit(ours, quiet())
    assert len(compiled) == 1
    assert same(weights(ours), plainly())


def _afterwards(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    optimizer = ec_sgd(net, lr=0.1, momentum=0.9)
    return torch.compile(net, backend="eager"), optimizer


def _before(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    return torch.compile(net, backend="eager"), ec_sgd(net, lr=0.1, momentum=0.9)


def _compiled_given(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    model = torch.compile(net, backend="eager")
    return model, ec_sgd(model, lr=0.1, momentum=0.9)


def _in_place(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    net.compile(backend="eager")
    return net, ec_sgd(net, lr=0.1, momentum=0.9)


def _parameters_alone(net: nn.Module) -> tuple[Any, EquivalentClassOptimizer]:
    return torch.compile(net, backend="eager"), ECSGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("compiled", [_afterwards, _before, _compiled_given, _in_place, _parameters_alone])
def test_the_first_call_of_a_compiled_network_is_watched_in_a_plain_loop(
    compiled: Callable[[nn.Module], tuple[Any, EquivalentClassOptimizer]],
) -> None:
    torch._dynamo.reset()
    net = mlp()
    model, optimizer = compiled(net)
    train_plainly(model, optimizer, batches())
    assert optimizer.group is not None
    assert optimizer.group.num_units == 32
    assert same(weights(net), plainly())
    assert is_clean(net)
