"""One line in a Trainer puts the SGD of a pipeline into the equivalent-class space, and changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import EquivalentClassOptimization
from tests.lightning_integration.modules import (
    EXAMPLES,
    RULES,
    Batch,
    Classifier,
    batches,
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


@RULES
def test_gradients_are_accumulated_and_clipped_as_ever(rule: str) -> None:
    ours, net = Classifier(mlp()), mlp()
    fit(ours, quiet(rule=rule), accumulate_grad_batches=2, gradient_clip_val=0.05)
    optimizer = wrapped(net, sgd(net), rule=rule)
    for epoch in range(2):
        if epoch:
            optimizer.refresh()
        data = batches()
        for pair in (data[:2], data[2:]):
            optimizer.zero_grad()
            for x, y in pair:
                (F.cross_entropy(net(x), y) / 2).backward()
            if epoch == 0:
                optimizer.start()  # so that they are clipped at the representative
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05
            optimizer.step()
    assert same(weights(ours), weights(net))


class Evaluated(Classifier):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])


def test_validation_testing_and_prediction_are_left_alone() -> None:
    def evaluate(*callbacks: Any) -> tuple[Any, ...]:
        module, run = Evaluated(mlp()), trainer(*callbacks)
        results = run.validate(module, loader(), verbose=False), run.test(module, loader(), verbose=False)
        return *results, torch.cat(run.predict(module, loader())), weights(module), is_clean(module)

    callback = EquivalentClassOptimization()
    *ours, found = evaluate(callback)
    *plain, expected = evaluate()
    assert ours[:2] == plain[:2]
    assert torch.equal(ours[2], plain[2])
    assert same(ours[3], plain[3])
    assert found
    assert expected
    assert callback.group is None


def test_validation_during_fit_changes_nothing() -> None:
    ours, reference = Evaluated(mlp()), Classifier(mlp())
    run = trainer(quiet(), val_check_interval=2)
    run.fit(ours, loader(), loader(1))
    fit(reference, quiet())
    assert same(weights(ours), weights(reference))


def test_one_callback_serves_several_fits() -> None:
    callback = quiet()
    fit(Classifier(mlp(seed=3, width=8)), callback)
    second, reference = Classifier(mlp()), Classifier(mlp())
    fit(second, callback)
    fit(reference, quiet())
    assert same(weights(second), weights(reference))
    assert callback.group is not None
    assert callback.group.num_units == 32


@RULES
def test_one_trainer_fits_the_same_module_again(rule: str) -> None:
    module, run = Classifier(mlp()), trainer(quiet(rule=rule))
    run.fit(module, loader())
    net = mlp()
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    run.fit_loop.max_epochs = 4
    run.fit(module, loader())
    # configure_optimizers is called again, so momentum starts anew.
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches())
    assert same(weights(module), weights(net))
    assert is_clean(module)


@RULES
@EXAMPLES
def test_a_fast_dev_run_takes_its_one_step(example: Tensor | None, rule: str) -> None:
    module, net = Classifier(mlp(), example=example), mlp()
    fit(module, quiet(rule=rule), fast_dev_run=True)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches(count=1), epochs=1)
    assert same(weights(module), weights(net))
    assert is_clean(module)


class SkipsFirst(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.trainer.current_epoch == 0 and batch_idx == 0:
            return None
        return super().training_step(batch, batch_idx)


@RULES
def test_the_first_batch_may_be_skipped(rule: str) -> None:
    callback, module, net = quiet(rule=rule), SkipsFirst(mlp()), mlp()
    fit(module, callback, log_every_n_steps=1, max_epochs=1)
    train_plainly(net, wrapped(net, sgd(net), rule=rule), batches()[1:], epochs=1)
    assert same(weights(module), weights(net))
    assert callback.group is not None
    assert is_clean(module)


class Raises(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.net(batch[0])
        raise ArithmeticError("the user's own")


@EXAMPLES
def test_a_training_step_that_raises_leaves_the_module_clean(example: Tensor | None) -> None:
    module, before = Raises(mlp(), example=example), weights(mlp())
    with pytest.raises(ArithmeticError, match="the user's own"):
        fit(module, quiet())
    assert is_clean(module)
    assert same(weights(module), before)


def test_a_fit_without_a_step_leaves_the_module_clean() -> None:
    module = Classifier(mlp())
    fit(module, quiet(), max_epochs=0)
    assert is_clean(module)
    assert same(weights(module), weights(mlp()))


class OwnStep(Classifier):
    """Sets ``training_step`` on the instance, as some users do."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.training_step = self.other_step

    def other_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_training_step_of_the_instance_is_watched_and_kept() -> None:
    module, reference, callback = OwnStep(), Classifier(mlp()), quiet()
    own = vars(module)["training_step"]
    fit(module, callback)
    fit(reference, quiet())
    assert callback.group is not None
    assert vars(module)["training_step"] == own
    assert same(weights(module), weights(reference))


@RULES
def test_frozen_parameters_are_not_rescaled(rule: str) -> None:
    def frozen() -> nn.Sequential:
        net = mlp()
        net[0].requires_grad_(False)
        return net

    module, callback = Classifier(frozen()), quiet(rule=rule)
    fit(module, callback)
    assert callback.group is not None
    assert callback.group.num_units == 16
    assert same(weights(module.net[0]), weights(mlp()[0]))
    assert not same(weights(module.net[2]), weights(mlp()[2]))


class WithoutRate(SGD):
    """Finds its rate by itself, as transformers' Adafactor does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for options in self.param_groups:
            options["lr"] = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for options in self.param_groups:
            for p in options["params"]:
                p.sub_(p.grad, alpha=0.01)
        return loss


def test_an_optimizer_without_a_rate_trains_and_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    module = Classifier(mlp(), lambda m: WithoutRate(m.parameters()))
    before = weights(module)
    fit(module, EquivalentClassOptimization())
    assert not same(weights(module), before)
    assert "all used; lr is the relative length " in capsys.readouterr().out
