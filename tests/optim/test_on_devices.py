"""Steps on a GPU, if there is one, are those of the CPU and of the plain version, and do not wait for it.

On a CPU the same tests run where they mean something: ``examples/benchmarks/gpu.sh`` runs them on either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import norm_cnn
from tests.optim.training import RULES
from tests.selection import full

pytestmark = full

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
BASES: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
}
CLOSE = 1e-7  # biases before batch norm have no gradient but rounding, which Adam makes larger
STEADY = 6  # steps from which on nothing is looked at any more, after a refresh


class Run:
    """A small network with batch norm on a device, and its optimizer."""

    def __init__(self, device: str, base: str, rule: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = norm_cnn().to(dtype)
        self.x, self.y = torch.randn(24, 1, 6, 6, dtype=dtype), torch.randint(3, (24,))
        self.module, self.x, self.y = (part.to(device) for part in (self.module, self.x, self.y))
        group = scaling_group(self.module, self.x)
        options = {"rule": rule, "refresh_interval": None, **options}
        self.optimizer = EquivalentClassOptimizer(BASES[base](self.module.parameters()), group, **options)

    def backward(self, number: int, autocast: bool = False) -> Tensor:
        """The gradients of a batch; returns the loss."""
        batch = slice(8 * (number % 3), 8 * (number % 3) + 8)
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(self.module(self.x[batch]), self.y[batch])
        loss.backward()
        return loss.detach()

    def train(self, steps: int, autocast: bool = False) -> list[float]:
        """Take steps, with a rate that changes; returns the losses."""
        losses = []
        for number in range(steps):
            losses.append(self.backward(number, autocast))
            for options in self.optimizer.param_groups:
                options["lr"] *= 0.99
            self.optimizer.step()
        return [float(loss) for loss in losses]

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.module.parameters()).detach().cpu()


@DEVICES
@RULES
@pytest.mark.parametrize("base", BASES)
def test_a_step_in_one_pass_is_that_of_the_base_between_scalings(device: str, rule: str, base: str) -> None:
    """On a GPU that is Triton against eager operations."""
    fused = "triton" if device == "cuda" else "eager"
    found, eager, plain = (Run(device, base, rule, implementation=kind) for kind in (fused, "eager", "wrapped"))
    losses = [run.train(20) for run in (found, eager, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert losses[0] == pytest.approx(losses[2], rel=CLOSE)
    torch.testing.assert_close(found.weights(), plain.weights(), rtol=CLOSE, atol=CLOSE)


@DEVICES
@RULES
@pytest.mark.parametrize("base", BASES)
def test_a_device_trains_as_the_cpu(device: str, rule: str, base: str) -> None:
    there, here = Run(device, base, rule, refresh_interval=8), Run("cpu", base, rule, refresh_interval=8)
    assert there.train(20) == pytest.approx(here.train(20), rel=CLOSE)


@DEVICES
@RULES
def test_under_autocast_all_units_stay_free_and_the_loss_falls(device: str, rule: str) -> None:
    run = Run(device, "sgd", rule, torch.float32, refresh_interval=5)
    run.optimizer.follow_precision(lambda: "bf16-mixed")
    losses = run.train(60, autocast=True)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert run.optimizer.violation == 0.0
    assert run.optimizer.group is not None
    assert int(run.optimizer.usable_units().sum()) == run.optimizer.group.num_units


@DEVICES
def test_a_checkpoint_goes_from_the_device_to_the_cpu_and_back(device: str) -> None:
    there, here = Run(device, "adamw", "unit"), Run("cpu", "adamw", "unit")
    there.train(7)
    here.module.load_state_dict(there.module.state_dict())
    here.optimizer.load_state_dict(copy.deepcopy(there.optimizer.state_dict()))
    back = Run(device, "adamw", "unit")
    back.module.load_state_dict(here.module.state_dict())
    back.optimizer.load_state_dict(copy.deepcopy(here.optimizer.state_dict()))
    losses = [run.train(5) for run in (there, here, back)]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert losses[0] == pytest.approx(losses[2], rel=CLOSE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error where the program waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("device", [GPU])
@RULES
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("autocast", [False, True])
def test_no_step_waits_for_the_gpu_but_those_at_a_refresh(device: str, rule: str, base: str, autocast: bool) -> None:
    run = Run(device, base, rule, torch.float32)
    run.train(STEADY, autocast)
    for number in range(10):
        run.backward(number, autocast)
        for options in run.optimizer.param_groups:
            options["lr"] *= 0.99
        with no_waiting():
            run.optimizer.step()
