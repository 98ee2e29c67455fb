"""Optimizers of pytorch_optimizer that run another one: within ours, or around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, scaling_group
from tests.lightning_integration.modules import (
    Classifier,
    batches,
    fit,
    is_clean,
    loader,
    mlp,
    quiet,
    same,
    same_state,
    train_plainly,
    trainer,
    weights,
    wrapped,
)
from tests.optim.training import batches as batch_of
from tests.optim.training import distance, loss_of, problem, rescaled, same_bits, through_a_file, train
from tests.selection import few

library = pytest.importorskip("pytorch_optimizer")

# Optimizers that run another one, or treat matrices whole, as the base of ours ----------------------------------------


def marked(params: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups for a Muon."""
    own = list(params)
    matrices = [p for p in own if p.ndim == 2][:-1]
    others = [p for p in own if all(p is not matrix for matrix in matrices)]
    return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False, "lr": 0.02}]


BASES: dict[str, Callable[[Any], Optimizer]] = {
    "lookahead": lambda params: library.Lookahead(SGD(params, lr=0.1, momentum=0.9), k=2),
    "pullback": lambda params: library.Lookahead(SGD(params, lr=0.1, momentum=0.9), k=2, pullback_momentum="pullback"),
    "reset": lambda params: library.Lookahead(SGD(params, lr=0.1, momentum=0.9), k=2, pullback_momentum="reset"),
    "lookahead of adamw": lambda params: library.Lookahead(AdamW(params, lr=0.02), k=3),
    "orthograd": lambda params: library.OrthoGrad(SGD(params, lr=0.1, momentum=0.9)),
    "schedule-free": lambda params: library.ScheduleFreeWrapper(SGD(params, lr=0.1)),
    "muon": lambda params: library.Muon(marked(params)),
    "normuon": lambda params: library.NorMuon(marked(params)),
    "lookahead of muon": lambda params: library.Lookahead(library.Muon(marked(params)), k=3),
}
EACH = pytest.mark.parametrize("base", few(list(BASES), ["lookahead", "orthograd", "schedule-free", "muon"]))
RULES = pytest.mark.parametrize("rule", few(["unit", "path"], ["unit"]))


def ours(module: nn.Module, x: Tensor, base: Callable[[Any], Optimizer], **options: Any) -> EquivalentClassOptimizer:
    """The optimizer around a base, ready to train."""
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(base(module.parameters()), group, **{"refresh_interval": 5, **options})
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@RULES
@EACH
def test_a_run_depends_on_the_class_alone(base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other, start = rescaled(module, x), copy.deepcopy(module)
    losses = []
    for one in (module, other):
        optimizer = ours(one, x, BASES[base], rule=rule)
        losses.append(train(one, optimizer, x, y, range(16)))
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    assert sum(losses[0][-4:]) < sum(losses[0][:4])
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert distance(module, other, x) < 1e-8
    assert distance(module, start, x) > 1e-3


@RULES
@EACH
def test_a_run_is_resumed_bit_identical(base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    optimizer = ours(module, x, BASES[base], rule=rule)
    train(module, optimizer, x, y, range(7))
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(module, optimizer, x, y, range(7, 14))
    other, _, _ = problem(5, 8, 6, 2, seed=1)
    resumed = ours(other, x, BASES[base], rule=rule)
    other.load_state_dict(saved["module"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, x, y, range(7, 14)) == expected
    assert same_bits(module, other)
    assert same_state(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("base", ["muon", "normuon", "lookahead of muon"])
def test_what_a_muon_steps_is_shown_gradients_as_they_are(base: str) -> None:
    """They are neither centred nor clipped, and all elements of a matrix are divided by one number."""
    module, x, y = problem(5, 8, 6, 2)
    optimizer = ours(module, x, BASES[base])
    plain = optimizer.optimizer
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    step = plain.step

    def spy(*args: Any) -> Any:
        shown.extend((p.detach().clone(), p.grad.clone(), before[p]) for p in before if p.grad is not None)
        return step(*args)

    plain.step = spy
    for number in range(4):
        optimizer.zero_grad()
        loss_of(module, *batch_of(x, y, number)).backward()
        if number == 0:
            optimizer.start()  # balance, so that nothing else happens to the weights before the step
        before = {p: p.detach().clone() for p in module.parameters()}
        gradients = {p: p.grad.clone() for p in before if p.grad is not None}
        shown.clear()
        optimizer.step()
        for (weight, gradient, old), p in zip(shown, before, strict=True):
            if p.ndim == 2:
                is_whole, ratio = p is not module[4].weight, old / weight
                assert torch.equal(gradient, gradients[p]) == is_whole
                assert bool((ratio / ratio[0, 0] - 1).abs().max() < 1e-12) == is_whole


class InOne(SGD):
    """SGD with momentum, and whatever is to be done before or behind, written as one optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.steps = 0

    def before(self, p: Tensor) -> None:
        """Change the gradient."""

    def behind(self, p: Tensor) -> None:
        """Change the weight."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for p in (p for options in self.param_groups for p in options["params"]):
            self.before(p)
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            p.sub_(0.1 * momentum.mul_(0.9).add_(p.grad))
            self.behind(p)


class LookaheadInOne(InOne):
    def before(self, p: Tensor) -> None:
        self.state[p].setdefault("slow_buffer", p.detach().clone())

    def behind(self, p: Tensor) -> None:
        if self.steps % 2 == 0:
            p.copy_(self.state[p]["slow_buffer"].lerp_(p, 0.5))


class OrthogonalInOne(InOne):
    def before(self, p: Tensor) -> None:
        assert p.grad is not None
        w, g = p.detach().flatten(), p.grad.flatten()
        orthogonal = g - w.dot(g) / w.dot(w) * w
        p.grad.copy_((orthogonal * (g.norm() / orthogonal.norm())).view_as(p))


IN_ONE: dict[str, Callable[[Any], Optimizer]] = {
    "lookahead": LookaheadInOne,
    "orthograd": OrthogonalInOne,
    "schedule-free": lambda params: library.ScheduleFreeSGD(params, lr=0.1, momentum=0.9),
}


#: ScheduleFreeSGD is not derived from SGD, so that the rule "unit" takes its rate for one of another kind.
ONE_AND_BOTH = [
    (base, rule) for base in IN_ONE for rule in ("unit", "path") if (base, rule) != ("schedule-free", "unit")
]


@pytest.mark.parametrize(
    ("base", "rule"), few(ONE_AND_BOTH, [(base, rule) for base, rule in ONE_AND_BOTH if rule == "unit"])
)
def test_two_optimizers_do_what_one_does_that_is_both(base: str, rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other = copy.deepcopy(module)
    losses = [
        train(one, ours(one, x, made[base], rule=rule), x, y, range(12))
        for one, made in ((module, BASES), (other, IN_ONE))
    ]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@RULES
def test_before_it_looks_back_lookahead_is_what_it_runs(rule: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other = copy.deepcopy(module)
    looks = ours(
        module, x, lambda params: library.Lookahead(AdamW(params, lr=0.02), k=100), rule=rule, implementation="wrapped"
    )
    alone = ours(other, x, lambda params: AdamW(params, lr=0.02), rule=rule, implementation="wrapped")
    assert train(module, looks, x, y, range(12)) == train(other, alone, x, y, range(12))


class Trained(Classifier):
    """A module whose optimizer may have a mode of its own."""

    def on_train_epoch_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()


@EACH
def test_the_callback_equals_a_loop_and_resumes(base: str, tmp_path: Path) -> None:
    def configured(module: LightningModule) -> Optimizer:
        return BASES[base](module.parameters())

    module = Trained(configure=configured)
    run = fit(module, quiet(), max_epochs=3)
    net = mlp()
    plain = wrapped(net, BASES[base](net.parameters()))
    if hasattr(plain, "train"):
        plain.train()
    train_plainly(net, plain, batches(), epochs=3)
    assert same(weights(module.net), weights(net))
    assert is_clean(module)
    first = fit(Trained(configure=configured), quiet(), max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = Trained(mlp(1), configure=configured)
    second = fit_from(resumed, tmp_path / "first.ckpt")
    assert same(weights(resumed), weights(module))
    assert same_state(second.optimizers[0].state_dict(), run.optimizers[0].state_dict())


def fit_from(module: LightningModule, path: Path) -> Any:
    """Go on from a checkpoint, until the third epoch is over."""
    run = trainer(quiet(), max_epochs=3)
    run.fit(module, loader(), ckpt_path=path)
    return run


# Optimizers that look at other weights first, around ours -------------------------------------------------------------

Sam = Callable[[nn.Module], Any]
SAMS: dict[str, Sam] = {
    "SAM": lambda module: library.SAM(module.parameters(), ECSGD, lr=0.1, momentum=0.9, refresh_interval=5),
    "ASAM": lambda module: library.SAM(
        module.parameters(), ECSGD, adaptive=True, lr=0.1, momentum=0.9, refresh_interval=5
    ),
    "WSAM": lambda module: library.WSAM(  # whose other form moves the weights by itself, which is told as such
        module, module.parameters(), ECSGD, decouple=False, lr=0.1, momentum=0.9, refresh_interval=5
    ),
    # It adds an earlier direction to the gradient, which is not that of the loss then.
    "LookSAM": lambda module: library.LookSAM(
        module.parameters(), ECSGD, k=3, lr=0.1, momentum=0.9, refresh_interval=5, check=None
    ),
    "FriendlySAM": lambda module: library.FriendlySAM(
        module.parameters(), ECSGD, lr=0.1, momentum=0.9, refresh_interval=5
    ),
    "GSAM": lambda module: gsam(module),
}
AROUND = pytest.mark.parametrize("sam", few(list(SAMS), ["SAM", "WSAM"]))


def gsam(module: nn.Module) -> Any:
    base = ECSGD(module.parameters(), lr=0.1, momentum=0.9, refresh_interval=5)
    rates = ConstantLR(base, factor=1.0)
    radii = library.ProportionScheduler(rates, max_lr=0.1, min_lr=0.1, max_value=0.05, min_value=0.05)
    return library.GSAM(module.parameters(), base, module, radii)


def train_sharply(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: range) -> list[float]:
    """Train with an optimizer that computes gradients twice in a step."""
    losses = []
    for step in steps:
        inputs, targets = batch_of(x, y, step)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module, inputs, targets)
            loss.backward()
            return loss

        if isinstance(optimizer, library.GSAM):
            optimizer.set_closure(nn.functional.mse_loss, inputs, targets)
            losses.append(float(optimizer.step()[1].detach()))
        else:
            losses.append(float(closure().detach()))
            optimizer.step(closure)
    return losses


@AROUND
def test_what_looks_for_flat_minima_runs_ours(sam: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    start = weights(module)
    optimizer = SAMS[sam](module)
    losses = train_sharply(module, optimizer, x, y, range(24))
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not any(torch.equal(p, q) for p, q in zip(weights(module), start, strict=True))
    assert optimizer.base_optimizer.group.num_units == 14
    assert optimizer.base_optimizer.statistics().dormant_units == 0
    assert is_clean(module)


@AROUND
def test_what_looks_for_flat_minima_depends_on_the_class_alone_from_balanced_weights(sam: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    other = rescaled(module, x)
    losses = []
    for one in (module, other):
        optimizer = SAMS[sam](one)
        optimizer.base_optimizer.bind(scaling_group(one, x))
        optimizer.base_optimizer.start()  # how far it looks depends on the weights, so balance them first
        losses.append(train_sharply(one, optimizer, x, y, range(10)))
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert distance(module, other, x) < 1e-8


@AROUND
def test_what_looks_for_flat_minima_is_resumed_bit_identical(sam: str) -> None:
    module, x, y = problem(5, 8, 6, 2)
    optimizer = SAMS[sam](module)
    train_sharply(module, optimizer, x, y, range(7))
    # SAM itself saves the state that it shares with ours, but not what the rule keeps beside.
    saved = through_a_file([module.state_dict(), optimizer.base_optimizer.state_dict(), optimizer.state_dict()])
    expected = train_sharply(module, optimizer, x, y, range(7, 14))
    other, _, _ = problem(5, 8, 6, 2, seed=1)
    resumed = SAMS[sam](other)
    for one, state in zip((other, resumed.base_optimizer, resumed), saved, strict=True):
        one.load_state_dict(state)
    loss_of(other, *batch_of(x, y, 0))  # the freedoms are found in a call, which comes before the next step anyway
    assert train_sharply(other, resumed, x, y, range(7, 14)) == expected
    assert same_bits(module, other)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: library.SAM(params, SGD, lr=0.1),
        lambda params: library.FriendlySAM(params, SGD, lr=0.1),
        lambda params: library.BSAM(params, num_data=128, lr=0.1),
    ],
    ids=["SAM", "FriendlySAM", "BSAM"],
)
def test_the_callback_says_to_turn_them_inside_out(make: Callable[[Any], Optimizer], manual: bool) -> None:
    class Sharp(Classifier):
        def __init__(self) -> None:
            super().__init__(configure=lambda module: make(module.parameters()))
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not manual:
                return super().training_step(batch, batch_idx)
            optimizer: Any = self.optimizers()

            def closure() -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            closure()
            optimizer.step(closure=closure)
            return None

    module = Sharp()
    start = weights(module)
    with pytest.raises((RuntimeError, MisconfigurationException), match=r"base_optimizer=ECSGD"):
        fit(module, quiet())
    assert same(weights(module), start)
    assert is_clean(module)
