"""Hugging Face's accelerate prepares our optimizers as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ecopt import ECAdamW, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.modules import is_clean, same, same_state, weights
from tests.optim.training import distance, loss_of, problem, rescaled
from tests.selection import few

accelerate = pytest.importorskip("accelerate")

#: Ways to make the optimizer of a module: the freedoms known at once, from its next call, and from the calls of parts.
Make = Callable[[nn.Module, torch.Tensor], EquivalentClassOptimizer]
MAKE: dict[str, Make] = {
    "known": lambda module, x: EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.1, momentum=0.9), scaling_group(module, x), refresh_interval=3
    ),
    "next call": lambda module, x: ec_sgd(module, lr=0.1, momentum=0.9, refresh_interval=3),
    "parts": lambda module, x: ECAdamW(module.parameters(), lr=0.02, refresh_interval=3),
}
EACH = pytest.mark.parametrize("make", list(MAKE))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerators share their settings, which must not stay for other tests."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A loop as accelerate's guide has it, over the batches of a regression, with a rate that falls.

    Args:
        module: the module that is trained, in place.
        make: makes its optimizer.
        accumulate: batches to a step.
        clip: the largest norm of the gradients of a step.
    """

    def __init__(
        self, module: nn.Module, make: Make, accumulate: int = 1, clip: float | None = None, **options: Any
    ) -> None:
        _, x, y = problem(5, 8, 6, 2)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        self.original, self.clip = module, clip
        optimizer = make(module, x)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        data = DataLoader(TensorDataset(x, y), 8)
        self.module, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            module, optimizer, data, schedule
        )

    @property
    def ours(self) -> EquivalentClassOptimizer:
        assert isinstance(self.optimizer, Optimizer)
        assert isinstance(self.optimizer.optimizer, EquivalentClassOptimizer)
        return self.optimizer.optimizer

    def epoch(self) -> list[float]:
        """Four batches; their losses."""
        losses = []
        for x, y in self.data:
            with self.accelerator.accumulate(self.module):
                loss = loss_of(self.module, x, y)
                self.accelerator.backward(loss)
                if self.clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.module.parameters(), self.clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


def by_hand(
    module: nn.Module, make: Make, accumulate: int, clip: float | None, epochs: int
) -> EquivalentClassOptimizer:
    """The same without accelerate."""
    _, x, y = problem(5, 8, 6, 2)
    optimizer = make(module, x)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(4 * epochs):
        rows = slice(8 * (step % 4), 8 * (step % 4) + 8)
        (loss_of(module, x[rows], y[rows]) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return optimizer


@EACH
@pytest.mark.parametrize(("accumulate", "clip"), few([(1, None), (2, None), (1, 0.1), (2, 0.1)], [(1, None), (2, 0.1)]))
def test_a_run_equals_a_loop(accumulate: int, clip: float | None, make: str) -> None:
    module, other = problem(5, 8, 6, 2)[0], problem(5, 8, 6, 2)[0]
    run = Run(module, MAKE[make], accumulate, clip)
    losses = [run.epoch() for _ in range(4)]
    optimizer = by_hand(other, MAKE[make], accumulate, clip, epochs=4)
    assert sum(losses[-1]) < 0.99 * sum(losses[0])
    assert same(weights(module), weights(other))
    assert same_state(run.ours.state_dict(), optimizer.state_dict())
    assert run.ours.group is not None
    assert run.ours.group.num_units == 14
    assert is_clean(module)


@EACH
def test_a_saved_run_goes_on_bit_identical(make: str, tmp_path: Path) -> None:
    whole = Run(problem(5, 8, 6, 2)[0], MAKE[make])
    whole.epoch()  # four steps, one of them after a refresh
    whole.accelerator.save_state(str(tmp_path))
    losses = [whole.epoch() for _ in range(2)]
    resumed = Run(problem(5, 8, 6, 2, seed=1)[0], MAKE[make])
    resumed.accelerator.load_state(str(tmp_path))
    assert [resumed.epoch() for _ in range(2)] == losses
    assert same(weights(resumed.original), weights(whole.original))
    assert same_state(resumed.ours.state_dict(), whole.ours.state_dict())


@EACH
def test_a_run_depends_on_the_class_alone(make: str) -> None:
    module, x, _ = problem(5, 8, 6, 2)
    other = rescaled(module, x)
    losses = []
    for one in (module, other):
        run = Run(one, MAKE[make], accumulate=2)
        losses.append([loss for _ in range(3) for loss in run.epoch()])
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    assert distance(module, other, x) < 1e-9


def test_clipping_depends_on_the_class_alone_once_the_weights_are_balanced() -> None:
    module, x, _ = problem(5, 8, 6, 2)
    other = rescaled(module, x)
    for one in (module, other):
        run = Run(one, MAKE["known"], clip=0.1)
        run.ours.start()
        for _ in range(3):
            run.epoch()
    assert distance(module, other, x) < 1e-9


@EACH
def test_mixed_precision_trains(make: str) -> None:
    module = problem(5, 8, 6, 2, dtype=torch.float32)[0]
    run = Run(module, MAKE[make], mixed_precision="bf16")
    run.data = [(x.float(), y.float()) for x, y in run.data]
    losses = [sum(run.epoch()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert run.ours.group is not None
    assert run.ours.group.num_units == 14
    plain = run.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    assert plain(run.data[0][0]).dtype == torch.float32
    assert not is_watched(module)


def test_precision_is_mixed_before_and_after_the_call_that_is_watched() -> None:
    outputs = []
    for make in (MAKE["known"], MAKE["next call"]):
        run = Run(problem(5, 8, 6, 2, dtype=torch.float32)[0], make, mixed_precision="bf16")
        run.data = [(x.float(), y.float()) for x, y in run.data]
        outputs.append(run.epoch())
    assert outputs[0] == outputs[1]


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module would still be traced."""
    modes: list[Any] = []

    def note(*args: Any) -> None:
        modes.append(torch.utils._python_dispatch._get_current_dispatch_mode())

    with module[0].register_forward_hook(note):
        module(torch.zeros(1, 5))
    return modes != [None]


def test_methods_of_ours_are_reached_through_the_optimizer_of_accelerate() -> None:
    run = Run(problem(5, 8, 6, 2)[0], MAKE["next call"])
    run.epoch()
    refreshed = weights(run.original)
    run.ours.refresh()
    run.optimizer.zero_grad()
    run.optimizer.step()  # without gradients nothing but a refresh happens
    assert not same(weights(run.original), refreshed)
    assert run.ours.statistics() is not None
    run.optimizer.train()  # accelerate calls them on any optimizer that has them, which SGD has not
    run.optimizer.eval()
