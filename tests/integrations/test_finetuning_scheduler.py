"""finetuning-scheduler thaws a network phase by phase, and goes back to the best checkpoint in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    Batch,
    Classifier,
    batches,
    digits,
    is_clean,
    loader,
    quiet,
    same,
    same_state,
    train_plainly,
    trainer,
    weights,
)
from tests.selection import few, pairwise

library = pytest.importorskip("finetuning_scheduler")

#: The layers of each phase, and how many freedoms they have together with those before.
PHASES = [["net.4", "net.6"], ["net.2"], ["net.0"]]
UNITS = [16, 32, 48]
USED = [16, 32, 32, 48, 48]  # at the end of each epoch
RATE = 0.05  # of what is thawed later
#: Who makes the optimizer, how the freedoms are found, and the rule: each with each of another kind.
_CASES = pairwise(["callback", "ec_sgd", "ECSGD"], [None, EXAMPLE], ["unit", "path"])
CASES = pytest.mark.parametrize(("form", "example", "rule"), few(_CASES, 1))
#: The library alone resumes bit-identical, too: what is wrong otherwise is ours.
CASES_AND_PLAIN = pytest.mark.parametrize(("form", "example", "rule"), few([*_CASES, ("plain", None, "unit")], 1))
EXAMPLES = pytest.mark.parametrize("example", few([None, EXAMPLE], [None]), ids=["first step", "example"])
RULES = pytest.mark.parametrize("rule", few(["unit", "path"], ["unit"]))


def network(seed: int = 0) -> nn.Sequential:
    """A network of 48 freedoms."""
    torch.manual_seed(seed)
    widths = [64, 16, 16, 16]
    layers = [part for k in range(3) for part in (nn.Linear(widths[k], 16), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(16, 10))


class Phased(Classifier):
    """Trains what is thawed, and says how good each epoch was as it is told to.

    Args:
        form: who makes the equivalent-class optimizer; ``"plain"`` for nobody.
        goodness: what is monitored, by epoch; the lowest is best.
    """

    def __init__(
        self,
        form: str = "callback",
        rule: str = "unit",
        example: Tensor | None = None,
        goodness: Sequence[float] = (5, 4, 3, 2, 1),
        seed: int = 0,
    ) -> None:
        super().__init__(network(seed), example=example)
        self.form, self.rule, self.goodness = form, rule, goodness
        self.units: list[int] = []
        self.starts: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        thawed = [p for p in self.parameters() if p.requires_grad]
        if self.form == "ec_sgd":
            return ec_sgd(self, thawed, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=3)
        if self.form == "ECSGD":
            return ECSGD(thawed, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=3)
        return SGD(thawed, lr=0.1, momentum=0.9)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.starts.append(weights(self))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("badness", torch.tensor(float(self.goodness[self.current_epoch])))

    def on_train_epoch_end(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, EquivalentClassOptimizer) and optimizer.group is not None:
            self.units.append(int(optimizer.usable_units().sum()))

    def callbacks(self) -> list[Callback]:
        return [quiet(rule=self.rule)] if self.form == "callback" else []


def names(layers: Sequence[str]) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def schedule() -> dict[int, dict[str, Any]]:
    """One epoch for the head, two with the next layer, and then all of it."""
    return {
        k: {"params": names(layers), "lr": RATE, "max_transition_epoch": end}
        for k, (layers, end) in enumerate(zip(PHASES, (1, 3, 5), strict=True))
    }


def run(module: Phased, folder: Path, restore_best: bool = True, path: Path | None = None, **options: Any) -> Trainer:
    """Five epochs, of which the last two train everything; each leaves a checkpoint."""
    phases = library.FinetuningScheduler(
        schedule(), epoch_transitions_only=True, restore_best=restore_best, log_dir=folder
    )
    saved = library.FTSCheckpoint(
        dirpath=folder, filename="{epoch}", monitor="badness", save_top_k=-1, save_on_train_epoch_end=True
    )
    whole = trainer(
        *module.callbacks(),
        phases,
        saved,
        enable_checkpointing=True,
        max_epochs=5,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )
    whole.ckpt_path = path  # its guide resumes so: it does not notice an argument of fit
    whole.fit(module, loader(), loader(1))
    return whole


class Thaws(Callback):
    """Thaws the same at the same times, and does nothing else."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        freeze(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in (1, 3):
            thaw(pl_module, trainer.optimizers[0], 1 if trainer.current_epoch == 1 else 2)


def freeze(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        p.requires_grad_(name in names(PHASES[0]))


def thaw(module: nn.Module, optimizer: Any, phase: int) -> None:
    own = dict(module.named_parameters())
    thawed = [own[name].requires_grad_(True) for name in names(PHASES[phase])]
    # It makes a group for weights that decay and one for those that do not.
    optimizer.add_param_group({"params": thawed, "lr": RATE})


@CASES
def test_phases_train_as_if_they_were_thawed_by_hand(
    rule: str, example: Tensor | None, form: str, tmp_path: Path
) -> None:
    module = Phased(form, rule, example)
    start = weights(module)
    run(module, tmp_path, restore_best=False)
    assert module.units == USED
    assert all(not torch.equal(p, q) for p, q in zip(weights(module), start, strict=True))
    assert is_clean(module)
    other = Phased(form, rule, example)
    by_hand = trainer(*other.callbacks(), Thaws(), max_epochs=5)
    by_hand.fit(other, loader())
    assert same(weights(module), weights(other))


@CASES
def test_to_restore_the_last_epoch_as_the_best_changes_nothing(
    rule: str, example: Tensor | None, form: str, tmp_path: Path
) -> None:
    ended = []
    for restore_best in (False, True):
        module = Phased(form, rule, example)
        run(module, tmp_path / str(restore_best), restore_best=restore_best)
        assert module.units == USED
        ended.append(weights(module))
    assert same(*ended)


class Whole(nn.Module):
    """The network by the names that it has in the pipeline."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = network(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def in_the_first_phase(module: Whole, rule: str) -> EquivalentClassOptimizer:
    """An optimizer as the callback makes it, which finds the freedoms again when something thaws."""
    freeze(module)
    return EquivalentClassOptimizer(
        SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9),
        lambda parameters: scaling_group(module, EXAMPLE, parameters=parameters),
        rule=rule,
        refresh_interval=None,
    )


@EXAMPLES
@RULES
def test_a_return_to_an_earlier_phase_goes_on_from_there(rule: str, example: Tensor | None, tmp_path: Path) -> None:
    module = Phased("callback", rule, example, goodness=(1, 2, 3, 4, 5))
    run(module, tmp_path)
    assert module.units == USED

    first = Whole()
    optimizer = in_the_first_phase(first, rule)
    train_plainly(first, optimizer, batches(), epochs=1)
    assert same(module.starts[1], weights(first))
    assert same(module.starts[3], weights(first))  # it has gone back
    second = Whole(1)
    later = in_the_first_phase(second, rule)
    second.load_state_dict(first.state_dict())
    later.load_state_dict(optimizer.state_dict())
    for phase in (1, 2):
        thaw(second, later, phase)
    later.refresh()  # as the callback does at the start of every epoch but the first
    train_plainly(second, later, batches(), epochs=2)
    assert same(weights(module), weights(second))


@CASES_AND_PLAIN
@pytest.mark.parametrize("restore_best", few([False, True], [False]))
def test_a_run_is_resumed_bit_identical(
    restore_best: bool, rule: str, example: Tensor | None, form: str, tmp_path: Path
) -> None:
    module = Phased(form, rule, example)
    whole = run(module, tmp_path, restore_best)
    for epoch in range(4):
        resumed = Phased(form, rule, example, seed=1)
        second = run(resumed, tmp_path, restore_best, tmp_path / f"epoch={epoch}.ckpt")
        assert same(weights(resumed), weights(module)), epoch
        assert same_state(second.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@RULES
@pytest.mark.parametrize("goodness", few([[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]], 1), ids=["goes on", "goes back"])
def test_two_members_of_a_class_stay_alike(goodness: list[float], rule: str, tmp_path: Path) -> None:
    images = digits()[0].double()

    def outputs(log_scale: Tensor, form: str) -> Tensor:
        module = Phased(form, rule, EXAMPLE, goodness).double()
        head = [module.get_parameter(name) for name in names(PHASES[0])]
        # Rescaled is what the first phase may rescale: all the rest is frozen as it is.
        scaling_group(module, images[:2], parameters=head).act_(log_scale)
        run(module, tmp_path / f"{form} {float(log_scale[0])}", precision="64-true")
        return module.net(images).detach()

    rescaled = torch.randn(UNITS[0], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        outputs(rescaled, "callback"), outputs(torch.zeros(UNITS[0]), "callback"), rtol=0, atol=1e-8
    )
    assert (outputs(rescaled, "plain") - outputs(torch.zeros(UNITS[0]), "plain")).abs().max() > 1e-2


def test_a_schedule_that_is_found_by_itself_trains(tmp_path: Path) -> None:
    module = Phased()
    phases = library.FinetuningScheduler(base_max_lr=RATE, log_dir=tmp_path)
    stops = library.FTSEarlyStopping(monitor="badness", patience=1)
    saved = library.FTSCheckpoint(dirpath=tmp_path, monitor="badness", save_top_k=1)
    module.goodness = [1.0, 2.0] * 20
    fitting = trainer(
        phases, stops, saved, *module.callbacks(), enable_checkpointing=True, max_epochs=20, num_sanity_val_steps=0
    )
    start = weights(module)
    before = float(F.cross_entropy(module(digits()[0]), digits()[1]))
    fitting.fit(module, loader(), loader(1))
    assert phases.curr_depth == 3
    assert module.units[-1] == UNITS[-1]
    assert not any(torch.equal(p, q) for p, q in zip(weights(module), start, strict=True))
    assert float(F.cross_entropy(module(digits()[0]), digits()[1])) < before
    assert is_clean(module)
