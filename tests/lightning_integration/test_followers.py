"""Targets and averages that are mixed with the weights follow them through every balance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimization, ec_sgd, scaling_group
from tests.lightning_integration.followers import PIPELINES, Byol, Dqn, Pipeline, batches
from tests.lightning_integration.modules import fit, quiet, same, trainer, weights
from tests.networks import mlp
from tests.selection import few

BASES: dict[str, Callable[..., Any]] = {
    "sgd": lambda ps, lr: SGD(ps, lr, momentum=0.9),
    "adamw": lambda ps, lr: AdamW(ps, lr),
}
#: Freedoms of the pipelines. Followers cost none, but where a loss looks at an output of the target.
UNITS = {"Byol": 8 + 7 + 8 + 8, "Dino": 8 + 7 + 8 + 9, "Sac": 8 + 9 + 9}
KINDS = {kind.__name__: kind for kind in PIPELINES}


def cases(*factors: Any) -> list[tuple[Any, ...]]:
    """All combinations, of which the fast run has few."""
    return few(list(product(KINDS, *factors)), [("Byol", *(f[-1] for f in factors)), ("Sac", *(f[0] for f in factors))])


def rescale_(module: Pipeline, spread: float) -> None:
    """Move what is trained within its class."""
    trained = {id(p) for p in module.trained()}
    for part in module.children():
        if any(id(p) in trained for p in part.parameters()):
            width = next(p for p in part.parameters() if p.ndim == 2).shape[1]
            group = scaling_group(part, torch.randn(16, width, dtype=torch.double))
            torch.manual_seed(1)
            group.act_(spread * torch.randn(group.num_units, dtype=torch.double))


def trained(kind: str, base: str, lr: float, spread: float, rule: str) -> Pipeline:
    module = KINDS[kind](lambda ps: BASES[base]([*ps], lr))
    rescale_(module, spread)
    module.copy()
    callback = quiet(refresh_interval=2, rule=rule)
    fit(module, callback, data=batches(), max_epochs=2)
    assert callback.group is not None
    assert callback.group.num_units == UNITS.get(kind, 15)
    return module


@pytest.mark.parametrize(("kind", "rule", "base", "spread"), cases(["unit", "path"], [*BASES], [1.0]))
def test_at_rest_no_follower_changes(kind: str, rule: str, base: str, spread: float) -> None:
    module = trained(kind, base, 1e-13, spread, rule)
    first = module.functions[0]
    for functions in module.functions:
        for one, other in zip(functions, first, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize(("kind", "rule", "base"), cases(["unit", "path"], [*BASES]))
def test_training_from_a_rescaled_start_is_the_same(kind: str, rule: str, base: str) -> None:
    one, other = (trained(kind, base, 0.01, spread, rule) for spread in (0.0, 1.0))
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-6, atol=0)
    for functions, others in zip(one.functions, other.functions, strict=True):
        torch.testing.assert_close(functions, others, rtol=1e-6, atol=1e-8)
    assert abs(one.losses[-1] - one.losses[0]) > 1e-4


def sgd(parameters: Any) -> SGD:
    return SGD([*parameters], 0.05, momentum=0.9)


class Late(Byol):
    """Copies are made in the middle of the training, in the middle of an epoch."""

    def loss(self, batch: int) -> Tensor:
        if self.global_step == 3:
            super().copy()
        if self.global_step < 3:
            return self.predictor(self.projector(self.encoder(self.inputs(batch)))).square().mean()
        return super().loss(batch)

    def update(self) -> None:
        if self.global_step > 3:
            super().update()

    def followers(self) -> list[Tensor]:
        return super().followers() if self.global_step > 3 else []


def test_copies_that_are_made_in_the_middle_follow_from_then_on() -> None:
    runs = []
    for spread in (0.0, 1.0):
        module = Late(sgd)
        rescale_(module, spread)
        callback = quiet(refresh_interval=4)
        fit(module, callback, data=batches(), max_epochs=3)
        assert callback._optimizers[0].followers == [
            "target_encoder follows encoder",
            "target_projector follows projector",
        ]
        runs.append(module)
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=1e-6, atol=0)


class Bound(Byol):
    """Starts with a target that is another network, so that it has to be named."""

    def copy(self) -> None:
        self.target_encoder, self.target_projector = mlp(6, 8, 7).double(), mlp(7, 8, 5).double()
        self.target_encoder.requires_grad_(False)
        self.target_projector.requires_grad_(False)


GIVEN = {"target_encoder": "encoder", "target_projector": "projector"}


@pytest.mark.parametrize("way", ["callback", "ec_sgd", "both"])
def test_followers_are_named_by_hand(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = Bound(sgd)
    module.copy()
    if way != "callback":
        module.configure_optimizers = lambda: ec_sgd(module, lr=0.05, followers=GIVEN)  # type: ignore[method-assign]
    named = {"followers": GIVEN} if way == "callback" else {}
    callbacks = [EquivalentClassOptimization(**named)] if way != "ec_sgd" else []
    fit(module, *callbacks, data=batches(), max_epochs=1)
    if callbacks:
        assert "Rescaled with what it follows: target_encoder follows encoder" in capsys.readouterr().out


def test_a_name_that_leads_nowhere_ends_the_fit_before_it_begins() -> None:
    module = Bound(sgd)
    module.copy()
    with pytest.raises(MisconfigurationException, match=r"Bound has no tgt\. It has encoder, projector"):
        fit(module, quiet(followers={"tgt": "encoder"}), data=batches())


@pytest.mark.parametrize("kind", [Byol, Dqn])
def test_a_run_that_is_resumed_ends_like_one_that_was_not(kind: type[Pipeline], tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> Pipeline:
        module = kind(sgd)
        module.copy()
        saves = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1, save_top_k=-1)
        callback = quiet(refresh_interval=4)
        trainer(callback, saves, max_epochs=epochs, enable_checkpointing=True).fit(module, batches(), **options)
        return module

    whole = run(4)
    for file in tmp_path.iterdir():
        file.unlink()
    run(2)
    resumed = run(4, ckpt_path=str(next(tmp_path.iterdir())))
    assert same(weights(whole), weights(resumed))


class Warm(Byol):
    """Begins with weights of another run, in which the target has gone its own way."""

    def copy(self) -> None:
        super().copy()
        with torch.no_grad():
            for p in [*self.encoder.parameters(), *self.projector.parameters()]:
                p.mul_(1 + 0.1 * torch.rand_like(p))


def test_a_target_that_is_no_longer_equal_at_the_start_follows() -> None:
    runs = []
    for spread in (0.0, 1.0):
        module = Warm(sgd)
        module.copy()
        group = scaling_group(module.encoder, module.x)
        torch.manual_seed(2)
        scale = spread * torch.randn(group.num_units, dtype=torch.double)
        group.act_(scale)
        target = {f"{name}": p for name, p in module.target_encoder.named_parameters()}
        group.rescale_(target, scale)
        fit(module, quiet(refresh_interval=2), data=batches())
        runs.append(module)
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=1e-6, atol=0)


def test_an_optimizer_that_trains_all_but_a_frozen_target() -> None:
    """``SGD(self.parameters())`` has the target's parameters, too, which require no gradient."""
    module = Byol(sgd)
    module.copy()
    module.trained = lambda: list(module.parameters())  # type: ignore[method-assign]
    callback = quiet(refresh_interval=2)
    fit(module, callback, data=batches())
    assert callback.group is not None
    assert callback.group.num_units == UNITS["Byol"]
    reference = Byol(sgd)
    reference.copy()
    fit(reference, quiet(refresh_interval=2), data=batches())
    assert module.losses == pytest.approx(reference.losses, rel=1e-9)


def test_a_copy_that_both_optimizers_know_is_trained_and_follows_nobody() -> None:
    class Twins(Pipeline):
        def copy(self) -> None:
            self.twin = copy.deepcopy(self.net)

        def loss(self, batch: int) -> Tensor:
            return F.cross_entropy(self.net(self.x) + self.twin(self.x), torch.arange(16) % 3)

        def followers(self) -> list[Tensor]:
            return []

        def trained(self) -> list[nn.Parameter]:
            return list(self.parameters())

    module, callback = Twins(sgd), quiet()
    module.copy()
    fit(module, callback, data=batches())
    assert callback._optimizers[0].followers == []
    assert callback.group is not None
    assert callback.group.num_units == 30
