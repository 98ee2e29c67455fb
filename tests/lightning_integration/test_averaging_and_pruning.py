"""Callbacks that average or prune weights work beside this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn

from lightning_ecopt import scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    RULES,
    SETTINGS,
    Batch,
    Classifier,
    Rates,
    batches,
    digits,
    fit,
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
from tests.selection import few

# Averages of weights --------------------------------------------------------------------------------------------------


def _normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


class Starts(Callback):
    """Takes down the weights at the start of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(weights(pl_module))


@SETTINGS
@pytest.mark.parametrize("network", [mlp, _normalised], ids=["mlp", "batch norm"])
def test_stochastic_weight_averaging_averages_the_weights_of_a_plain_loop(
    network: Callable[[], nn.Sequential], example: Tensor | None, rule: str
) -> None:
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)

    without, found, starts = Rates(), Rates(), Starts()
    fit(Classifier(network()), averaging(), without, max_epochs=5)
    ours = Classifier(network(), example=None if example is None else example.expand(2, 64))
    fit(ours, averaging(), quiet(rule=rule), found, starts, max_epochs=5)
    assert found.steps == without.steps
    assert len(set(map(tuple, found.steps))) > 1

    # What is averaged are the weights ahead of the second and of every later epoch.
    net = network()
    average = AveragedModel(net, avg_fn=StochasticWeightAveraging.avg_fn)
    optimizer = wrapped(net, sgd(net), EXAMPLE.expand(2, 64), rule=rule, followers={average: net})

    def before_epoch(epoch: int) -> None:
        if epoch >= 1:
            average.update_parameters(net)

    train_plainly(net, optimizer, batches(), 5, found.steps[:20], before_epoch=before_epoch)
    assert not same(weights(average), weights(net))
    if network is mlp:
        assert same(weights(ours), weights(average))
        return
    # One more epoch computes the statistics, at the average.
    assert len(starts.epochs) == 6
    assert same(starts.epochs[-1], weights(average))
    update_bn(batches(), average)
    buffers = dict(average.module.named_buffers())
    torch.testing.assert_close(dict(ours.net.named_buffers()), buffers, rtol=1e-6, atol=1e-6)


def _averaging(name: str, **options: Any) -> Any:
    kind = getattr(lightning_callbacks, name, None)
    if kind is None:
        pytest.skip(f"this version of Lightning has no {name}")
    return kind(**options)


class Validated(Classifier):
    """Takes down the weights that are validated."""

    def __init__(self, example: Tensor | None = None) -> None:
        super().__init__(mlp(), example=example)
        self.seen: list[list[Tensor]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append(weights(self))


@SETTINGS
@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_running_averages_are_those_of_the_weights_of_a_plain_loop(
    name: str, example: Tensor | None, rule: str
) -> None:
    exponential = name == "EMAWeightAveraging"
    averaging = _averaging(name, **({"decay": 0.8} if exponential else {}))
    ours = Validated(example)
    run = trainer(averaging, quiet(rule=rule), num_sanity_val_steps=0)
    run.fit(ours, loader(), loader(1))
    net = mlp()
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.8) if exponential else None)
    optimizer = wrapped(net, sgd(net), rule=rule, followers={average: net})
    validated = []
    train_plainly(
        net,
        optimizer,
        batches(),
        after_step=lambda: average.update_parameters(net),
        after_epoch=lambda: validated.append(weights(average)),
    )
    assert same(weights(ours), weights(average))
    assert len(ours.seen) == 2
    assert all(same(one, other) for one, other in zip(ours.seen, validated, strict=True))
    assert not same(weights(ours), weights(net))


@RULES
@pytest.mark.parametrize(
    "name", few(["StochasticWeightAveraging", "EMAWeightAveraging"], ["StochasticWeightAveraging"])
)
def test_averages_of_two_members_of_a_class_are_one_function(name: str, rule: str) -> None:
    images = digits()[0].double()

    def run(log_scale: Tensor, *callbacks: Callback) -> Tensor:
        module = Classifier(mlp().double())
        scaling_group(module.net, images[:2]).act_(log_scale)
        if name == "StochasticWeightAveraging":
            averaging: Any = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
        else:
            averaging = _averaging(name, decay=0.8)
        fit(module, averaging, *callbacks, precision="64-true", max_epochs=4)
        return module.net(images).detach()

    torch.manual_seed(5)
    rescaled, none = torch.randn(32), torch.zeros(32)
    torch.testing.assert_close(run(rescaled, quiet(rule=rule)), run(none, quiet(rule=rule)), rtol=0, atol=1e-8)
    assert (run(rescaled) - run(none)).abs().max() > 1e-2


# Pruning --------------------------------------------------------------------------------------------------------------


def _layers(net: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(net[0], "weight"), (net[2], "weight")]


def _effective(net: nn.Sequential) -> list[Tensor]:
    """Weights as they are used."""
    return [tensor.detach().clone() for layer in net[::2] for tensor in (layer.weight, layer.bias)]


class Pruned(Callback):
    """Takes down how many weights are zero at the end of each epoch, in use."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module(EXAMPLE)  # masks are applied when the module is called
        self.epochs.append(sum(int((layer.weight == 0).sum()) for layer, _ in _layers(pl_module.net)))


@SETTINGS
@pytest.mark.parametrize("lottery", [False, True], ids=["", "lottery ticket"])
def test_pruned_weights_stay_zero_and_the_others_are_those_of_a_plain_loop(
    lottery: bool, example: Tensor | None, rule: str
) -> None:
    ours, net, pruned = Classifier(mlp(), example=example), mlp(), Pruned()
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=_layers(ours.net),
        amount=0.3,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=lottery,
    )
    callback = quiet(rule=rule)
    fit(ours, pruning, callback, pruned, max_epochs=3)
    start = [layer.weight.detach().clone() for layer, _ in _layers(net)]

    def prune_() -> None:
        prune.global_unstructured(_layers(net), pruning_method=prune.L1Unstructured, amount=0.3)
        if lottery:
            for (layer, _), weight in zip(_layers(net), start, strict=True):
                layer.weight_orig.data = weight  # as Lightning has it, the next ticket starts from what becomes of it

    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), 3, after_epoch=prune_)
    for layer, name in _layers(net):
        prune.remove(layer, name)
    assert same(_effective(ours.net), _effective(net))
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in _layers(ours.net))
    assert zeros == pruned.epochs[-1] > pruned.epochs[-2] > pruned.epochs[0] == round(0.3 * 80 * 16)
    assert callback.group is not None
    assert callback.group.num_units == 32


@SETTINGS
def test_a_network_that_is_pruned_already_keeps_its_zeros_and_its_freedoms(example: Tensor | None, rule: str) -> None:
    def pruned() -> nn.Sequential:
        net = mlp()
        prune.global_unstructured(_layers(net), pruning_method=prune.L1Unstructured, amount=0.5)
        prune.ln_structured(net[2], "weight", amount=3, n=2, dim=0)  # whole units
        return net

    ours, net, callback = Classifier(pruned(), example=example), pruned(), quiet(rule=rule)
    fit(ours, callback)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(ours), weights(net))
    assert callback.group is not None
    assert callback.group.num_units == 32
    for layer, _ in _layers(ours.net):
        assert bool((layer.weight[layer.weight_mask == 0] == 0).all())
