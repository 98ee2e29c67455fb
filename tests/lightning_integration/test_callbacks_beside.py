"""Other callbacks of Lightning beside this one do what they do beside a plain optimizer."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn
from torch.utils.data import DataLoader

from lightning_ecopt import (
    ECSGD,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    ec_adamw,
    ec_sgd,
    scaling_group,
)
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

EXAMPLES = pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
FORMS = pytest.mark.parametrize("form", ["callback", "ec_sgd"])

#: Every pair of form, way of finding the freedoms and rule.
CASES = pytest.mark.parametrize(
    ("form", "example", "rule"),
    [
        ("callback", None, "unit"),
        ("callback", EXAMPLE, "path"),
        ("ec_sgd", None, "path"),
        ("ec_sgd", EXAMPLE, "unit"),
        ("ECSGD", None, "unit"),
    ],
    ids=["callback-first step-unit", "callback-example-path", "ec_sgd-first step-path", "ec_sgd-example-unit", "ECSGD"],
)


# Finding the learning rate and the batch size -------------------------------------------------------------------------


class Tuned(Classifier):
    """Has what tuners look for: a learning rate, a batch size, and loaders that follow it."""

    def __init__(self, form: str, rule: str = "unit", example: Tensor | None = None, lr: float = 0.07) -> None:
        super().__init__(mlp(), example=example)
        self.form, self.rule = form, rule
        self.lr, self.batch_size = lr, 32

    def configure_optimizers(self) -> Any:
        if self.form == "ec_sgd":
            return ec_sgd(self, lr=self.lr, momentum=0.9, rule=self.rule, refresh_interval=None)
        if self.form == "ECSGD":
            return ECSGD(self.parameters(), lr=self.lr, momentum=0.9, rule=self.rule, refresh_interval=None)
        return sgd(self, lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(128 // self.batch_size, self.batch_size)

    def callbacks(self) -> list[Callback]:
        return [quiet(rule=self.rule, refresh=None)] if self.form == "callback" else []


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Tuners write checkpoints to where they are run.
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


RANGE: dict[str, Any] = {"min_lr": 1e-3, "max_lr": 0.5, "early_stop_threshold": None}


def _smoothed(losses: Sequence[float]) -> list[float]:
    """As Lightning smooths the losses of a range test."""
    average, found = 0.0, []
    for step, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss
        found.append(average / (1 - 0.98 ** (step + 2)))
    return found


@CASES
@pytest.mark.usefixtures("in_a_folder")
def test_the_learning_rate_finder_tries_rates_with_the_optimizer_that_trains(
    form: str, example: Tensor | None, rule: str
) -> None:
    ours = Tuned(form, rule, example)
    run = trainer(*ours.callbacks(), max_epochs=4)
    found = Tuner(run).lr_find(ours, **RANGE, num_training=16)
    assert found is not None
    assert len(set(found.results["lr"])) > 12
    net, losses = mlp(), []
    optimizer = wrapped(net, sgd(net), rule=rule)
    for rate, (x, y) in zip(found.results["lr"], batches() * 4, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.results["loss"] == pytest.approx(_smoothed(losses), rel=1e-12)
    # Weights are as they were, the rate is that of the suggestion.
    assert same(weights(ours), weights(mlp()))
    assert is_clean(ours)
    assert ours.lr == found.suggestion()
    assert math.isfinite(ours.lr)


def _with_found_rate(ours: Tuned, finder: str) -> Trainer:
    if finder == "tuner":
        run = trainer(*ours.callbacks(), max_epochs=4)
        Tuner(run).lr_find(ours, **RANGE, num_training=16)
    else:
        run = trainer(LearningRateFinder(**RANGE, num_training_steps=16), *ours.callbacks(), max_epochs=4)
    run.fit(ours)
    assert ours.lr != 0.07
    return run


def _rate(run: Trainer) -> float:
    (group,) = run.optimizers[0].param_groups
    return group["lr"]


@CASES
@pytest.mark.parametrize("finder", ["tuner", "callback"])
@pytest.mark.usefixtures("in_a_folder")
def test_training_after_the_learning_rate_finder_is_that_of_a_run_with_its_rate(
    finder: str, form: str, example: Tensor | None, rule: str
) -> None:
    ours, plain = Tuned(form, rule, example), Tuned("plain")
    run = _with_found_rate(ours, finder)
    # Some versions of Lightning forget the rate that their callback has found, and train with the one from before.
    assert (_rate(run) == ours.lr) == (_rate(_with_found_rate(plain, finder)) == plain.lr)
    reference = Tuned(form, rule, example, lr=_rate(run))
    other = trainer(*reference.callbacks(), max_epochs=4)
    other.fit(reference)
    assert run.global_step == other.global_step == 16
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert int(run.optimizers[0].usable_units().sum()) == 32
    assert same(weights(ours), weights(reference))
    assert not same(weights(ours), weights(mlp()))
    assert is_clean(ours)


class Limited(Tuned):
    """Has memory for 16 images at a time; what fails leaves half a forward call behind."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if len(batch[0]) > 16:
            raise RuntimeError("CUDA out of memory.")
        return loss


@pytest.mark.parametrize(("form", "example", "rule"), [("callback", None, "unit"), ("ec_sgd", EXAMPLE, "path")])
@pytest.mark.parametrize(("finder", "start"), [("tuner", 32), ("callback", 16)])
@pytest.mark.usefixtures("in_a_folder")
def test_training_after_the_batch_size_finder_is_that_of_a_run_with_its_size(
    finder: str, start: int, form: str, example: Tensor | None, rule: str
) -> None:
    ours = Limited(form, rule, example)
    options: dict[str, Any] = {"init_val": start, "max_trials": 2, "steps_per_trial": 1}
    if finder == "tuner":
        run = trainer(*ours.callbacks())
        assert Tuner(run).scale_batch_size(ours, **options) == ours.batch_size
    else:
        run = trainer(BatchSizeFinder(**options), *ours.callbacks())
    assert is_clean(ours)
    run.fit(ours)
    reference = Limited(form, rule, example)
    reference.batch_size = ours.batch_size
    other = trainer(*reference.callbacks())
    other.fit(reference)
    assert ours.batch_size in (8, 16)
    assert run.global_step == other.global_step == 256 // ours.batch_size
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert int(run.optimizers[0].usable_units().sum()) == 32
    assert same(weights(ours), weights(reference))
    assert is_clean(ours)


# Frozen parameters that thaw ------------------------------------------------------------------------------------------


class Transfer(Classifier):
    """A backbone of two layers, and a head of one or two."""

    def __init__(
        self, form: str, rule: str = "unit", example: Tensor | None = None, deep: bool = True, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        head = [nn.Linear(16, 16), nn.ReLU()] if deep else []
        backbone = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        super().__init__(nn.Sequential(backbone, nn.Sequential(*head, nn.Linear(16, 10))), example=example)
        self.form, self.rule = form, rule

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.form == "ec_sgd":
            return ec_sgd(self, trainable, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        if self.form == "ECSGD":
            return ECSGD(trainable, lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        return SGD(trainable, lr=0.1, momentum=0.9)

    def callbacks(self) -> list[Callback]:
        return [quiet(rule=self.rule, refresh=None)] if self.form == "callback" else []


class ThawsBackbone(BaseFinetuning):
    """Trains the backbone from some epoch on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Freedoms(Callback):
    """Takes down how many freedoms are used at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        known = isinstance(optimizer, EquivalentClassOptimizer) and optimizer.group is not None
        self.epochs.append(int(optimizer.usable_units().sum()) if known else 0)


def _thawed_by_hand(rule: str, deep: bool, at: int, epochs: int) -> list[Tensor]:
    """A new optimizer around the old one's state, when all of the network is to be trained."""
    net = Transfer("none", deep=deep).net
    base = SGD(net[1].parameters(), lr=0.1, momentum=0.9)
    net[0].requires_grad_(False)
    optimizer: Any = base
    if at > 0:
        group = scaling_group(net, EXAMPLE)
        if group.num_units:
            optimizer = EquivalentClassOptimizer(base, group, rule=rule, refresh_interval=None)
        train_plainly(net, optimizer, batches(), epochs=at, refresh_each_epoch=False)
    net[0].requires_grad_(True)
    later = SGD(net[1].parameters(), lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    later.load_state_dict({name: state[name] for name in ("state", "param_groups")})
    later.add_param_group({"params": list(net[0].parameters()), "lr": 0.05})
    whole = wrapped(net, later, rule=rule)
    train_plainly(net, whole, batches(), epochs=epochs - at, refresh_each_epoch=False)
    return weights(net)


@CASES
@pytest.mark.parametrize(("deep", "at"), [(True, 0), (True, 1), (False, 1)], ids=str)
@pytest.mark.filterwarnings("ignore:The network has no scaling freedoms")
def test_the_freedoms_of_a_backbone_are_found_when_it_thaws(
    deep: bool, at: int, form: str, example: Tensor | None, rule: str
) -> None:
    ours, freedoms = Transfer(form, rule, example, deep), Freedoms()
    run = fit(ours, *ours.callbacks(), ThawsBackbone(at), freedoms, max_epochs=3)
    frozen, whole = (16, 48) if deep else (0, 32)
    assert freedoms.epochs == [frozen] * at + [whole] * (3 - at)
    assert isinstance(run.optimizers[0], EquivalentClassOptimizer)
    assert run.optimizers[0].group is not None
    assert run.optimizers[0].group.num_units == whole
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.05]
    expected = _thawed_by_hand(rule, deep, at, 3)
    if form == "ECSGD":  # knows parameters in the order of the optimizer, and adds up in that
        torch.testing.assert_close(weights(ours), expected, rtol=1e-4, atol=1e-6)
    else:
        assert same(weights(ours), expected)
    assert is_clean(ours)


@EXAMPLES
def test_the_group_of_the_callback_follows_what_thaws(example: Tensor | None) -> None:
    ours, callback = Transfer("callback", example=example), quiet()
    thaw = BackboneFinetuning(1, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.02, initial_denom_lr=1.0)
    rates = Rates()
    fit(ours, thaw, callback, rates, max_epochs=3)
    assert rates.steps == [[0.1]] * 4 + [[0.1, 0.02]] * 4 + [[0.1, pytest.approx(0.03)]] * 4
    assert callback.group is not None
    assert callback.group.num_units == 48
    before = ours(digits()[0])
    callback.group.act_(torch.linspace(-1, 1, 48))
    torch.testing.assert_close(ours(digits()[0]), before, rtol=1e-4, atol=1e-4)


class ThawsInPlace(Transfer):
    """Its optimizer has all parameters from the start; the backbone is frozen in the first epoch."""

    def configure_optimizers(self) -> Any:
        self.backbone.requires_grad_(False)
        if self.form == "ec_sgd":
            return ec_sgd(self, self.parameters(), lr=0.1, momentum=0.9, rule=self.rule, refresh_interval=None)
        return sgd(self)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)


@SETTINGS
def test_the_freedoms_of_parameters_that_thaw_in_place_are_found_at_the_refresh(
    example: Tensor | None, rule: str
) -> None:
    ours, callback, freedoms = ThawsInPlace("callback", rule, example), quiet(rule=rule), Freedoms()
    start = weights(ours.backbone)
    fit(ours, callback, freedoms, max_epochs=3)
    assert freedoms.epochs == [16, 48, 48]
    assert not same(weights(ours.backbone), start)
    assert callback.group is not None
    assert callback.group.num_units == 48


@RULES
def test_two_members_of_a_class_stay_alike_when_their_backbone_thaws(rule: str) -> None:
    images = digits()[0].double()

    def run(log_scale: Tensor, form: str) -> Tensor:
        module = Transfer(form, rule, EXAMPLE).double()
        scaling_group(module, images[:2], parameters=module.net[1].parameters()).act_(log_scale)
        fit(module, ThawsBackbone(1), *module.callbacks(), precision="64-true", max_epochs=4)
        return module.net(images).detach()

    torch.manual_seed(2)
    rescaled = torch.randn(16)
    torch.testing.assert_close(run(rescaled, "callback"), run(torch.zeros(16), "callback"), rtol=0, atol=1e-8)
    assert (run(rescaled, "plain") - run(torch.zeros(16), "plain")).abs().max() > 1e-2


class ByStep(Transfer):
    """Takes its batch by the number of the step, so that it may be resumed anywhere."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return super().training_step(batches(8)[self.trainer.global_step % 8], batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning leaves this to the user: its callback gives back parameter groups, but freezes them once more.
        self.thawed = len(checkpoint["optimizer_states"][0]["param_groups"]) > 1

    def on_fit_start(self) -> None:
        if getattr(self, "thawed", False):
            self.backbone.requires_grad_(True)


@CASES
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_a_run_that_thaws_is_resumed_bit_identical(
    tmp_path: Path, first: bool, form: str, example: Tensor | None, rule: str
) -> None:
    def run(*others: Callback, **options: Any) -> Transfer:
        module = ByStep(form, rule, example)
        thaw, own = [ThawsBackbone(1)], module.callbacks()
        fitting = trainer(
            *(thaw + own if first else own + thaw), *others, max_epochs=3, enable_checkpointing=bool(others)
        )
        fitting.fit(module, loader(), **options)
        return module

    expected = run(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    for epoch in (0, 1):
        assert same(weights(run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")), weights(expected))


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
    optimizer = wrapped(net, sgd(net), EXAMPLE.expand(2, 64), rule=rule)

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
    optimizer = wrapped(net, sgd(net), rule=rule)
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.8) if exponential else None)
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
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
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


# Checkpoints, and the end of training ---------------------------------------------------------------------------------


class Losses(Classifier):
    """Logs its loss over an epoch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=True, prog_bar=True)
        return loss


def _epochs(rule: str, count: int, **options: Any) -> list[list[Tensor]]:
    """Weights of a plain loop after each epoch."""
    net, found = mlp(), []
    base = sgd(net, **options)
    train_plainly(net, wrapped(net, base, rule=rule), batches(), count, after_epoch=lambda: found.append(weights(net)))
    return found


@RULES
def test_early_stopping_stops_at_the_epoch_of_its_metric(rule: str) -> None:
    ours = Losses(mlp())
    run = fit(ours, quiet(rule=rule), EarlyStopping("loss_epoch", min_delta=1.5, patience=2), max_epochs=20)
    assert run.current_epoch == 3
    assert same(weights(ours), _epochs(rule, 3)[-1])


@SETTINGS
def test_the_best_checkpoints_are_kept_and_may_hold_weights_alone(
    tmp_path: Path, example: Tensor | None, rule: str
) -> None:
    saving = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="loss_epoch", save_top_k=2, save_weights_only=True, save_on_train_epoch_end=True
    )
    ours = Losses(mlp(), lambda m: sgd(m, lr=0.05), example)
    fit(ours, quiet(rule=rule), saving, max_epochs=4, enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2.ckpt", "epoch=3.ckpt"]
    assert Path(saving.best_model_path).name == "epoch=3.ckpt"
    expected = _epochs(rule, 4, lr=0.05)
    for epoch in (2, 3):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert "optimizer_states" not in state
        again = Losses(mlp(seed=9))
        again.load_state_dict(state["state_dict"])
        assert same(weights(again), expected[epoch])
    # It can be evaluated without the callback, and trained further with it.
    trainer().validate(Scored(mlp(seed=9)), loader(), ckpt_path=saving.best_model_path, verbose=False)
    fit(again, quiet(rule=rule))
    assert not same(weights(again), expected[3])


class Scored(Classifier):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("validation loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])


class Fails(Classifier):
    """Takes its batch by the number of the step, and raises at one of them."""

    def __init__(self, at: int | None, example: Tensor | None, configure: Any = None, seed: int = 0) -> None:
        super().__init__(mlp(seed), configure, example)
        self.at = at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.at:
            raise ArithmeticError("the user's own")
        return super().training_step(batches(8)[self.trainer.global_step % 8], batch_idx)


@CASES
@pytest.mark.parametrize("at", [0, 3, 4], ids=["at once", "within an epoch", "at a refresh"])
def test_the_checkpoint_of_an_exception_is_resumed_bit_identical(
    tmp_path: Path, at: int, form: str, example: Tensor | None, rule: str
) -> None:
    def configure(module: LightningModule) -> Optimizer:
        if form == "ec_sgd":
            return ec_sgd(module, lr=0.1, momentum=0.9, rule=rule, refresh_interval=4)
        if form == "ECSGD":
            return ECSGD(module.parameters(), lr=0.1, momentum=0.9, rule=rule, refresh_interval=4)
        return sgd(module)

    def run(module: Fails, **options: Any) -> Fails:
        saving = [OnExceptionCheckpoint(tmp_path)] if module.at is not None else []
        own = [quiet(rule=rule)] if form == "callback" else []
        fitting = trainer(*saving, *own, max_epochs=-1, max_steps=10, enable_checkpointing=bool(saving))
        fitting.fit(module, loader(), **options)
        return module

    expected = run(Fails(None, example, configure))
    with pytest.raises(ArithmeticError, match="the user's own"):
        run(Fails(at, example, configure))
    resumed = run(Fails(None, example, configure, seed=9), ckpt_path=tmp_path / "on_exception.ckpt")
    assert same(weights(resumed), weights(expected))


# What is shown and logged ---------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def _cycled(optimizer: Optimizer) -> dict[str, Any]:
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@FORMS
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_learning_rate_monitor_logs_rates_momenta_and_decay(tmp_path: Path, kind: str, form: str) -> None:
    def plain(module: LightningModule) -> Optimizer:
        return AdamW(module.parameters()) if kind == "adamw" else sgd(module, weight_decay=0.1)

    def ours(module: LightningModule) -> Optimizer:
        return ec_adamw(module) if kind == "adamw" else ec_sgd(module, momentum=0.9, weight_decay=0.1)

    def logged(folder: Path, base: Callable[[LightningModule], Optimizer], *callbacks: Callback) -> Any:
        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        module = Classifier(mlp(), lambda m: _cycled(base(m)))
        fit(module, monitor, *callbacks, logger=CSVLogger(folder), log_every_n_steps=1)
        rows = _rows(folder)
        columns = {name: [row[name] for row in rows if row[name]] for name in rows[0] if name.startswith("lr-")}
        assert all(len(values) == 8 for values in columns.values())
        found: dict[str, list[Any]] = {"momentum": [], "weight_decay": [], "rate": []}
        for name, values in columns.items():
            found[name.rpartition("-")[2] if name.count("-") > 1 else "rate"].append(values)
        return columns, found

    names, expected = logged(tmp_path / "plain", plain)
    assert len(names) == 3
    assert len(set(expected["rate"][0])) > 4
    assert len(set(expected["momentum"][0])) > 4
    if form == "callback":
        assert logged(tmp_path / "ours", plain, quiet())[0] == names
    else:
        # Lightning logs once more what the base optimizer holds.
        for quantity, columns in logged(tmp_path / "ours", ours)[1].items():
            assert columns
            assert all(values == expected[quantity][0] for values in columns)


def test_the_device_is_monitored_as_ever(tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="Lightning monitors processors with psutil")
    ours = Classifier(mlp())
    fit(ours, quiet(), DeviceStatsMonitor(cpu_stats=True), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert any("cpu_percent" in name for name in _rows(tmp_path)[-1])
    assert same(weights(ours), _epochs("unit", 2)[-1])


@EXAMPLES
@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_metrics_and_the_report(
    capsys: pytest.CaptureFixture[str], kind: type[Callback], example: Tensor | None
) -> None:
    ours = Losses(mlp(), example=example)
    others = kind(), RichModelSummary(), Timer()
    run = fit(ours, *others, EquivalentClassOptimization(), enable_progress_bar=True, enable_model_summary=True)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "loss_step" in said
    assert "loss_epoch" in said
    assert said.count("H = 32 freedoms") == 1
    assert set(run.progress_bar_metrics) == {"loss_step", "loss_epoch"}
    assert same(weights(ours), _epochs("unit", 2)[-1])


# Several runs ---------------------------------------------------------------------------------------------------------


def _images() -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    return Classifier(nn.Sequential(*layers))


@RULES
def test_one_callback_serves_fits_of_different_modules_with_evaluations_between(rule: str) -> None:
    callback, first, second = quiet(rule=rule), Scored(mlp()), _images()
    fit(first, callback)
    middle = weights(first)
    run = trainer(callback)
    (scores,) = run.validate(first, loader(), verbose=False)
    (others,) = run.test(first, loader(), verbose=False)
    predictions = torch.cat(run.predict(first, loader()))
    assert scores == others
    assert torch.equal(predictions, first(digits()[0][:128]))
    assert same(weights(first), middle)
    fit(second, callback)
    assert callback.group is not None
    assert callback.group.num_units == 4
    fit(first, callback)
    assert callback.group.num_units == 32

    net = mlp()
    for _ in range(2):
        train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(first), weights(net))
    reference = _images()
    fit(reference, quiet(rule=rule))
    assert same(weights(second), weights(reference))
    assert is_clean(first)
    assert is_clean(second)


@RULES
def test_a_module_that_was_trained_can_be_copied_and_trained_on(rule: str) -> None:
    first = Classifier(mlp(), lambda m: ec_sgd(m, lr=0.1, momentum=0.9, rule=rule))
    fit(first)
    second = deepcopy(first)
    fit(first)
    fit(second)
    assert same(weights(first), weights(second))
    net = mlp()
    for _ in range(2):
        optimizer = wrapped(net, sgd(net), rule=rule)
        train_plainly(net, optimizer, batches(), refresh_each_epoch=False)
    assert same(weights(first), weights(net))
