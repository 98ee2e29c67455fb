"""``ec_sgd``, ``ec_adamw`` and ``ec_muon`` in ``configure_optimizers``, and in a loop without Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from lightning_ecopt import (
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    MuonAdamW,
    ScalingGroup,
    ec_adamw,
    ec_muon,
    ec_sgd,
    scaling_group,
)
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    Classifier,
    Rates,
    batches,
    fit,
    is_clean,
    mlp,
    same,
    sgd,
    train_plainly,
    weights,
)
from tests.optim.training import needs_muon

MAKERS = [ec_sgd, ec_adamw, pytest.param(ec_muon, marks=needs_muon)]
ALL_OPTIONS = {
    "lr": 0.05,
    "momentum": 0.8,
    "dampening": 0.1,
    "weight_decay": 1e-3,
    "nesterov": False,
    "maximize": False,
    "foreach": True,
}


@RULES
@EXAMPLES
@pytest.mark.parametrize("refresh", [3, 500, None], ids=str)
def test_ec_sgd_and_the_callback_take_the_same_steps(refresh: int | None, example: Tensor | None, rule: str) -> None:
    def configure(module: nn.Module) -> EquivalentClassOptimizer:
        return ec_sgd(module, lr=0.1, momentum=0.9, rule=rule, refresh_interval=refresh)

    ours, reference = Classifier(mlp(), configure, example), Classifier(mlp(), example=example)
    run = fit(ours, max_epochs=3)
    fit(reference, EquivalentClassOptimization(rule=rule, refresh_interval=refresh, verbose=False), max_epochs=3)
    assert same(weights(ours), weights(reference))
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert run.optimizers[0].group is not None
    assert run.optimizers[0].group.num_units == 32
    assert is_clean(ours)


def test_every_option_of_sgd_is_handed_on() -> None:
    optimizer = ec_sgd(mlp(), **ALL_OPTIONS)
    assert {name: optimizer.optimizer.param_groups[0][name] for name in ALL_OPTIONS} == ALL_OPTIONS
    assert type(optimizer.optimizer) is SGD
    for name in ("nesterov", "maximize"):
        assert ec_sgd(mlp(), momentum=0.9, **{name: True}).param_groups[0][name] is True


def test_every_option_of_adamw_is_handed_on() -> None:
    options: dict[str, Any] = {
        "lr": 0.05,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 1e-3,
        "amsgrad": True,
        "maximize": True,
        "foreach": True,
    }
    optimizer = ec_adamw(mlp(), **options)
    assert {name: optimizer.optimizer.param_groups[0][name] for name in options} == options
    assert type(optimizer.optimizer) is AdamW


@needs_muon
def test_every_option_of_muon_is_handed_on() -> None:
    options: dict[str, Any] = {
        "lr": 0.05,
        "weight_decay": 1e-3,
        "momentum": 0.8,
        "nesterov": False,
        "ns_coefficients": (3.0, -4.0, 2.0),
        "ns_steps": 4,
        "adjust_lr_fn": "original",
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "amsgrad": True,
        "foreach": True,
    }
    optimizer = ec_muon(mlp(), adamw_lr=0.01, fused=False, **options)
    for group, lr in zip(optimizer.optimizer.param_groups, (0.05, 0.01), strict=True):
        assert {name: group[name] for name in options} == {**options, "lr": lr}
        assert group["fused"] is False
    assert type(optimizer.optimizer) is MuonAdamW


@pytest.mark.parametrize("make", MAKERS)
def test_every_option_of_the_rules_is_handed_on(make: Callable[..., EquivalentClassOptimizer]) -> None:
    options: dict[str, Any] = {
        "rule": "path",
        "refresh_interval": 7,
        "representative": "current",
        "skeleton": "diagonal",
        "max_path_ratio": None,
        "free_start": 3.0,
        "implementation": "wrapped",
    }
    optimizer = make(mlp(), **options)
    assert {name: getattr(optimizer, name) for name in options} == options


@RULES
@pytest.mark.parametrize("held", ["returned", "base"])
@EXAMPLES
def test_schedulers_work_with_ec_sgd(held: str, example: Tensor | None, rule: str) -> None:
    def configure(module: nn.Module) -> Any:
        optimizer = ec_sgd(module, lr=0.1, momentum=0.9, rule=rule)
        scheduler = CosineAnnealingLR(optimizer, 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def plainly(module: nn.Module) -> Any:
        base = sgd(module)
        return {"optimizer": base, "lr_scheduler": {"scheduler": CosineAnnealingLR(base, 3), "interval": "step"}}

    def through_the_base(module: nn.Module) -> Any:
        optimizer = ec_sgd(module, lr=0.1, momentum=0.9, rule=rule)
        # Lightning asks that a scheduler belongs to an optimizer that is returned; a loop of one's own need not.
        module.scheduler = ExponentialLR(optimizer.optimizer, 0.8)
        return optimizer

    found, expected = Rates(), Rates()
    if held == "returned":
        ours = Classifier(mlp(), configure, example)
        fit(ours, found)
        fit(Classifier(mlp(), plainly), expected)
        assert found.steps == expected.steps
    else:
        ours = Classifier(mlp(), through_the_base, example)
        ours.on_train_batch_end = lambda *args: ours.scheduler.step()
        fit(ours, found)
        assert found.steps == [[pytest.approx(0.1 * 0.8**step)] for step in range(8)]
    net = mlp()
    optimizer = EquivalentClassOptimizer(sgd(net), scaling_group(net, EXAMPLE), rule=rule)
    train_plainly(net, optimizer, batches(), rates=found.steps, refresh_each_epoch=False)
    assert same(weights(ours), weights(net))


@RULES
@EXAMPLES
def test_parameter_groups_have_their_own_options(example: Tensor | None, rule: str) -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(net[:2].parameters()), "lr": 0.02},
            {"params": list(net[2:].parameters()), "weight_decay": 0.1},
        ]

    ours = Classifier(mlp(), lambda m: ec_sgd(m, groups(m.net), lr=0.1, momentum=0.9, rule=rule), example)
    run = fit(ours)
    assert [(group["lr"], group["weight_decay"]) for group in run.optimizers[0].param_groups] == [(0.02, 0), (0.1, 0.1)]
    net = mlp()
    base = SGD(groups(net), lr=0.1, momentum=0.9)
    optimizer = EquivalentClassOptimizer(base, scaling_group(net, EXAMPLE), rule=rule)
    train_plainly(net, optimizer, batches(), refresh_each_epoch=False)
    assert same(weights(ours), weights(net))


@RULES
def test_parameters_that_are_not_given_stay_as_they_are(rule: str) -> None:
    ours = Classifier(mlp(), lambda m: ec_sgd(m, m.net[2:].parameters(), lr=0.1, rule=rule))
    run = fit(ours)
    assert same(weights(ours.net[0]), weights(mlp()[0]))
    assert not same(weights(ours.net[2:]), weights(mlp()[2:]))
    # Units of the first layer would need its weights.
    assert run.optimizers[0].group.num_units == 16


def test_frozen_parameters_are_left_out_by_default() -> None:
    net = mlp()
    net[0].weight.requires_grad_(False)
    optimizer = ec_sgd(net, lr=0.1)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(net.parameters())[1:]


@RULES
def test_a_plain_loop_watches_the_first_forward_call(rule: str) -> None:
    ours, reference = mlp(), mlp()
    optimizer = ec_sgd(ours, lr=0.1, momentum=0.9, rule=rule, refresh_interval=5)
    assert optimizer.group is None
    calls = []
    ours[0].register_forward_hook(lambda *args: calls.append(args))
    train_plainly(ours, optimizer, batches(), refresh_each_epoch=False)
    assert len(calls) == 8
    assert isinstance(optimizer.group, ScalingGroup)
    assert optimizer.group.num_units == 32
    assert is_clean(ours)

    other = EquivalentClassOptimizer(sgd(reference), scaling_group(reference, EXAMPLE), rule=rule, refresh_interval=5)
    train_plainly(reference, other, batches(), refresh_each_epoch=False)
    assert same(weights(ours), weights(reference))


@RULES
def test_a_plain_loop_may_hand_over_a_closure(rule: str) -> None:
    ours, reference = mlp(), mlp()
    optimizer = ec_sgd(ours, lr=0.1, momentum=0.9, rule=rule)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(ours(x), y)
            loss.backward()
            return loss

        assert torch.is_tensor(optimizer.step(closure))
    other = EquivalentClassOptimizer(sgd(reference), scaling_group(reference, EXAMPLE), rule=rule)
    train_plainly(reference, other, batches(), epochs=1)
    assert same(weights(ours), weights(reference))


@RULES
def test_two_optimizers_watch_one_module_side_by_side(rule: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(mlp(), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    parts = list(net[0].parameters()), list(net[1:].parameters())
    pair = [ec_sgd(net, part, lr=0.1, rule=rule) for part in parts]
    x, y = batches()[0]
    F.cross_entropy(net(x), y).backward()
    assert is_clean(net)  # each gives back the method that it found, in whatever order they end
    for optimizer in pair:
        optimizer.step()
    # Of the ten units between the two, each optimizer holds one side only.
    assert [int(optimizer.usable_units().sum()) for optimizer in pair] == [32, 10]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("of", [nn.Module.parameters, nn.Module.named_parameters])
def test_parameter_groups_may_be_given_as_generators(
    of: Callable[[nn.Module], Any], make: Callable[..., EquivalentClassOptimizer]
) -> None:
    net = mlp()
    optimizer = make(net, [{"params": of(net[0])}, {"params": of(net[2]), "lr": 0.01}], lr=0.1)
    held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p): rate for part, rate in ((net[0], 0.1), (net[2], 0.01)) for p in part.parameters()}


@pytest.mark.parametrize("make", MAKERS)
def test_the_module_stays_as_it_is_when_the_optimizer_cannot_be_made(
    make: Callable[..., EquivalentClassOptimizer],
) -> None:
    net = mlp()
    with pytest.raises(ValueError, match="earning rate"):
        make(net, lr=-1.0)
    with pytest.raises(ValueError, match="pass the module that owns all of them"):
        make(net, mlp(seed=1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass the module that owns all of them"):
        make(net, [{"params": mlp(seed=1).parameters()}], lr=0.1)
    with pytest.raises(ValueError, match="rule must be 'unit', 'path' or 'paper'"):
        make(net, lr=0.1, rule="none")
    with pytest.raises(ValueError, match="skeleton must be 'max' or 'diagonal'"):
        make(net, lr=0.1, skeleton="none")
    with pytest.raises(TypeError, match="refresh_intervall"):
        make(net, lr=0.1, refresh_intervall=3)
    assert is_clean(net)
