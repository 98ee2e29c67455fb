"""Every form of configure_optimizers takes the steps of a plain loop."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.lightning_integration.callback_runs import FORMS, Level, TwoOptimizers, normalised, with_scheduler
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
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
    weights,
    wrapped,
)
from tests.selection import few

# The forms that Lightning allows --------------------------------------------------------------------------------------


SCHEDULED = {name for name in FORMS if name not in ("optimizer", "list", "tuple", "dictionary")}


@RULES
@EXAMPLES
@pytest.mark.parametrize(
    "form", few(FORMS, ["optimizer", "two lists", "dictionary with step interval", "plateau config"])
)
def test_every_form_of_configure_optimizers_takes_the_steps_of_a_plain_loop(
    form: str, example: Tensor | None, rule: str
) -> None:
    def module() -> Classifier:
        return Level(mlp(), lambda m: FORMS[form](sgd(m.net)), example)

    without, found = Rates(), Rates()
    fit(module(), without, max_epochs=3)
    ours = module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        fit(ours, quiet(rule=rule), found, max_epochs=3)
    assert found.steps == without.steps
    assert (len(set(map(tuple, found.steps))) > 1) == (form in SCHEDULED)

    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), epochs=3, rates=without.steps)
    assert same(weights(ours), weights(net))
    plain = module()
    fit(plain, max_epochs=3)
    assert not same(weights(ours), weights(plain))


@RULES
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.0, "weight_decay": 1e-2},
        {"lr": 0.01, "maximize": True},
        {"foreach": True},
    ],
    ids=str,
)
def test_the_options_of_sgd_are_kept(options: dict[str, Any], rule: str) -> None:
    ours = Classifier(mlp(), lambda m: sgd(m.net, **options))
    run = fit(ours, quiet(rule=rule))
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    group = run.optimizers[0].param_groups[0]
    assert {name: group[name] for name in options} == options
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net, **options), rule=rule), batches())
    assert same(weights(ours), weights(net))


@RULES
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_and_its_options_are_kept(kind: type[Adam], rule: str) -> None:
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True}
    ours = Classifier(mlp(), lambda m: kind(m.net.parameters(), **options))
    run = fit(ours, quiet(rule=rule))
    assert type(run.optimizers[0].optimizer) is kind
    group = run.optimizers[0].param_groups[0]
    assert {name: group[name] for name in options} == options
    net, plain = mlp(), Classifier(mlp(), lambda m: kind(m.net.parameters(), **options))
    train_plainly(net, wrapped(net, kind(net.parameters(), **options), rule=rule), batches())
    assert same(weights(ours), weights(net))
    fit(plain)
    assert not same(weights(ours), weights(plain))


@RULES
def test_parameter_groups_keep_their_own_rates_and_decay(rule: str) -> None:
    def base(net: nn.Sequential) -> SGD:
        groups = [
            {"params": net[0].parameters(), "weight_decay": 0.1},
            {"params": net[2].parameters(), "lr": 0.02, "momentum": 0.5},
            {"params": net[4].parameters()},
        ]
        return SGD(groups, lr=0.1, momentum=0.9)

    ours, found = Classifier(mlp(), lambda m: FORMS["dictionary with scheduler"](base(m.net)), EXAMPLE), Rates()
    fit(ours, quiet(rule=rule), found)
    assert found.steps == [[0.1, 0.02, 0.1]] * 4 + [[0.05, 0.01, 0.05]] * 4
    net = mlp()
    train_plainly(net, wrapped(net, base(net), rule=rule), batches(), rates=found.steps)
    assert same(weights(ours), weights(net))


class TwoDictionaries(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        return tuple(with_scheduler(base, StepLR(base, 1, 0.5)) for base in self.bases())


class TwoLists(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        bases = list(self.bases())
        return bases, [StepLR(base, 1, 0.5) for base in bases]


@RULES
@pytest.mark.parametrize("kind", [TwoOptimizers, TwoDictionaries, TwoLists])
def test_two_optimizers_under_manual_optimization_take_the_steps_of_a_plain_loop(
    kind: type[TwoOptimizers], rule: str
) -> None:
    ours, found = kind(), Rates()
    run = fit(ours, quiet(rule=rule), found)
    decay = 1 if kind is TwoOptimizers else 0.5
    assert found.steps == [[0.1, 0.05]] * 4 + [[0.1 * decay, 0.05 * decay]] * 4
    assert all(isinstance(optimizer, EquivalentClassOptimizer) for optimizer in run.optimizers)

    twin = TwoOptimizers()
    group = scaling_group(twin.net, EXAMPLE)
    pair = [EquivalentClassOptimizer(base, group, rule=rule, refresh_interval=None) for base in twin.bases()]
    for epoch in range(2):
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] *= decay**epoch
            if epoch > 0:
                optimizer.refresh()
        for number, (x, y) in enumerate(batches()):
            for optimizer in pair:
                optimizer.zero_grad()
            F.cross_entropy(twin.net(x), y).backward()
            for optimizer in pair:
                (optimizer if epoch or number else optimizer.optimizer).step()
    # 12 units in the middle touch both optimizers, the others are one's own.
    assert group.num_units == 36
    assert [int(optimizer.usable_units().sum()) for optimizer in pair] == [12, 12]
    assert same(weights(ours), weights(twin))


# The promise ----------------------------------------------------------------------------------------------------------


@RULES
@EXAMPLES
@pytest.mark.parametrize("network", few([mlp, normalised], [normalised]), ids=["mlp", "batch norm"])
def test_two_members_of_a_class_end_in_the_same_function(network: Any, example: Tensor | None, rule: str) -> None:
    images = digits()[0].double()

    def run(log_scale: Tensor, *callbacks: Any) -> Tensor:
        net = network().double()
        scaling_group(net, images[:2]).act_(log_scale)
        start = net.eval()(images).detach()
        module = Classifier(net, lambda m: sgd(m, weight_decay=1e-3), example)
        fit(module, *callbacks, precision="64-true", max_epochs=5, data=loader(8))
        return torch.stack([start, net.eval()(images).detach()])

    units = scaling_group(network(), EXAMPLE.expand(2, 64)).num_units
    torch.manual_seed(5)
    log_scale = torch.randn(units)
    (start, ours), (start_too, ours_too) = run(torch.zeros(units), quiet(rule=rule)), run(log_scale, quiet(rule=rule))
    torch.testing.assert_close(start, start_too, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, ours_too, rtol=0, atol=1e-8)
    # What is compared moves, and plain SGD tells the two apart.
    assert (ours - start).abs().max() > 1
    assert (run(torch.zeros(units))[1] - run(log_scale)[1]).abs().max() > 1e-2


@RULES
@EXAMPLES
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_depends_on_the_class_alone(algorithm: str, example: Tensor | None, rule: str) -> None:
    torch.manual_seed(0)
    ends = []
    for spread in (0.0, 1.0):
        net = mlp().double()
        group = scaling_group(net, EXAMPLE.double())
        group.act_(spread * torch.randn(group.num_units, dtype=torch.float64))
        module = Classifier(net, example=None if example is None else example.double())
        options = {"gradient_clip_val": 0.002, "gradient_clip_algorithm": algorithm}
        fit(module, quiet(rule=rule), precision="64-true", **options)
        ends.append(net(digits()[0].double()).detach())
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-10
    start = mlp().double()(digits()[0].double()).detach()
    assert float((ends[0] - start).norm() / start.norm()) > 1e-3
