"""Fabric takes our optimizers as it takes any other, made before or after the network is set up."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from lightning_ecopt import EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    RULES,
    batches,
    is_clean,
    loader,
    mlp,
    same,
    same_state,
    sgd,
    train_plainly,
    weights,
    wrapped,
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def fabric(**options: Any) -> Fabric:
    made = Fabric(accelerator="cpu", devices=1, **options)
    made.launch()
    return made


def _before(run: Fabric, net: nn.Module, rule: str, example: Tensor) -> Any:
    return run.setup(net, wrapped(net, sgd(net), example, rule=rule))


def _after(run: Fabric, net: nn.Module, rule: str, example: Tensor) -> Any:
    model = run.setup(net)
    base = SGD(model.parameters(), **OPTIONS)
    optimizer = EquivalentClassOptimizer(base, scaling_group(model, example), rule=rule, refresh_interval=None)
    return model, run.setup_optimizers(optimizer)


def _ec_sgd_before(run: Fabric, net: nn.Module, rule: str, example: Tensor) -> Any:
    return run.setup(net, ec_sgd(net, **OPTIONS, rule=rule, refresh_interval=None))


def _ec_sgd_after(run: Fabric, net: nn.Module, rule: str, example: Tensor) -> Any:
    model = run.setup(net)
    return model, run.setup_optimizers(ec_sgd(model, **OPTIONS, rule=rule, refresh_interval=None))


WAYS: dict[str, Callable[[Fabric, nn.Module, str, Tensor], Any]] = {
    "before": _before,
    "after": _after,
    "ec_sgd before": _ec_sgd_before,
    "ec_sgd after": _ec_sgd_after,
}
WAYS_OF_SETUP = pytest.mark.parametrize(
    ("way", "rule"), [("before", "unit"), ("after", "path"), ("ec_sgd before", "path"), ("ec_sgd after", "unit")]
)


def train(run: Fabric, model: Any, optimizer: Any, before_step: Callable[[], None] | None = None) -> None:
    """Two epochs of four batches."""
    data = run.setup_dataloaders(loader())
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            run.backward(F.cross_entropy(model(x), y))
            if before_step is not None:
                before_step()
            optimizer.step()


def plainly(rule: str = "unit", **loop: Any) -> list[Tensor]:
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(), **{"refresh_each_epoch": False, **loop})
    return weights(net)


@RULES
@pytest.mark.parametrize("way", WAYS)
def test_the_optimizer_may_be_made_before_and_after_setup(way: str, rule: str) -> None:
    run, net = fabric(), mlp()
    model, optimizer = WAYS[way](run, net, rule, EXAMPLE)
    train(run, model, optimizer)
    assert isinstance(optimizer, EquivalentClassOptimizer)
    assert optimizer.group is not None
    assert optimizer.group.num_units == 32
    assert same(weights(net), plainly(rule))
    assert is_clean(net)
    assert is_clean(model)


DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize(("way", "rule"), [("after", "path"), ("ec_sgd before", "unit")])
@pytest.mark.parametrize("precision", [*DTYPES, "bf16-mixed"])
def test_every_precision_takes_the_steps_of_a_plain_loop(precision: Any, way: str, rule: str) -> None:
    run, ours, net = fabric(precision=precision), mlp(), mlp()
    dtype = DTYPES.get(precision, torch.float32)
    model, optimizer = WAYS[way](run, ours, rule, EXAMPLE)
    train(run, model, optimizer)
    assert all(p.dtype == dtype for p in ours.parameters())
    assert optimizer.group.num_units == 32

    net = net.to(dtype)
    reference = wrapped(net, sgd(net), EXAMPLE.to(dtype), rule=rule)
    for x, y in batches(dtype=dtype) * 2:
        reference.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = net(x)
        F.cross_entropy(output.float(), y).backward()  # Fabric gives outputs back in the default type
        reference.step()
    assert same(weights(ours), weights(net))


@WAYS_OF_SETUP
def test_a_step_that_a_loss_scaler_skips_changes_nothing(way: str, rule: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run, net = fabric(plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler)), mlp()
    model, optimizer = WAYS[way](run, net, rule, EXAMPLE)
    skipped = []
    for number, (x, y) in enumerate(batches() * 2):
        before = deepcopy((net.state_dict(), optimizer.state_dict()))
        optimizer.zero_grad()
        run.backward(F.cross_entropy(model(x), y) * (math.inf if number in (0, 5) else 1.0))
        optimizer.step()
        if same_state(before, (net.state_dict(), optimizer.state_dict())):
            skipped.append(number)
    assert skipped == [0, 5]
    assert scaler.get_scale() == 256.0
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@RULES
@pytest.mark.parametrize("clip", [{"max_norm": 0.05}, {"clip_val": 0.003}], ids=str)
def test_gradients_are_clipped_as_ever(clip: dict[str, float], rule: str) -> None:
    run, net = fabric(), mlp()
    model, optimizer = _before(run, net, rule, EXAMPLE)
    train(run, model, optimizer, before_step=lambda: run.clip_gradients(model, optimizer, **clip))

    other = mlp()
    parameters = list(other.parameters())

    def by_hand() -> None:
        if "max_norm" in clip:
            nn.utils.clip_grad_norm_(parameters, clip["max_norm"])
        else:
            nn.utils.clip_grad_value_(parameters, clip["clip_val"])

    optimizer = wrapped(other, sgd(other), rule=rule)
    train_plainly(other, optimizer, batches(), refresh_each_epoch=False, before_step=by_hand)
    assert same(weights(net), weights(other))
    assert not same(weights(net), plainly(rule))


@WAYS_OF_SETUP
def test_a_run_is_saved_and_taken_up_bit_identical(tmp_path: Path, way: str, rule: str) -> None:
    run, net = fabric(), mlp()
    model, optimizer = WAYS[way](run, net, rule, EXAMPLE)
    train(run, model, optimizer)
    run.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    train(run, model, optimizer)

    again = mlp(seed=9)
    resumed, resumed_optimizer = WAYS[way](run, again, rule, EXAMPLE)
    assert run.load(tmp_path / "state.ckpt", {"model": resumed, "optimizer": resumed_optimizer}) == {}
    train(run, resumed, resumed_optimizer)
    assert same(weights(again), weights(net))


@WAYS_OF_SETUP
def test_what_setup_returns_refreshes_and_loads_as_the_optimizer_itself(way: str, rule: str) -> None:
    run, net = fabric(), mlp()
    model, optimizer = WAYS[way](run, net, rule, EXAMPLE)
    for epoch in range(2):
        if epoch > 0:
            optimizer.refresh()
        for x, y in batches():
            optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
            optimizer.zero_grad()
            run.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    assert same(weights(net), plainly(rule, refresh_each_epoch=True))
    assert not same(weights(net), plainly(rule))


@RULES
def test_a_closure_may_be_handed_over(rule: str) -> None:
    run, net = fabric(), mlp()
    model, optimizer = _ec_sgd_before(run, net, rule, EXAMPLE)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            run.backward(loss)
            return loss

        assert torch.is_tensor(optimizer.step(closure))
    assert same(weights(net), plainly(rule, epochs=1))


@pytest.mark.parametrize(("way", "rule"), [("after", "path"), ("ec_sgd before", "unit")])
def test_a_scheduler_moves_rate_and_momentum(way: str, rule: str) -> None:
    run, net, other = fabric(), mlp(), mlp()
    model, optimizer = WAYS[way](run, net, rule, EXAMPLE)
    scheduler, momenta = OneCycleLR(optimizer, 0.1, total_steps=8), []
    for x, y in batches() * 2:
        optimizer.zero_grad()
        run.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        momenta.append(optimizer.param_groups[0]["momentum"])
        scheduler.step()
    assert len(set(momenta)) > 4
    base = sgd(other)
    train_plainly(
        other,
        wrapped(other, base, rule=rule),
        batches(),
        refresh_each_epoch=False,
        after_step=OneCycleLR(base, 0.1, total_steps=8).step,
    )
    assert same(weights(net), weights(other))


def test_a_compiled_network_is_set_up_as_any_other() -> None:
    torch._dynamo.reset()
    run, net = fabric(), mlp()
    model, optimizer = run.setup(torch.compile(net, backend="eager"), ec_sgd(net, **OPTIONS, refresh_interval=None))
    train(run, model, optimizer)
    assert optimizer.group.num_units == 32
    assert same(weights(net), plainly())
