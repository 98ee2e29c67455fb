"""What ``step_overhead.py`` measures, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages
import torch
from architectures import GPT2, ViT, resnet50, vgg13
from tasks import mlp, resnet
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

RATE = 1e-6  # so small that the weights stay where they are


@dataclass(frozen=True)
class Network:
    """A network with its inputs.

    Args:
        title: in the tables.
        build: makes it.
        inputs: makes a batch of a number of images or texts.
        batch: of whole training steps.
        cpu_batch: likewise on a CPU.
        cpu_inputs: makes the batches of a CPU, if they are others.
        is_cnn: whether the target for whole training steps on a CPU is meant for it.
        is_large: whether the targets for the step alone, and for whole training steps on a GPU, are meant for it.
        has_pause: whether the pause at the start of a fit is measured.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int = 128
    cpu_batch: int = 128
    cpu_inputs: Callable[[int], Tensor] | None = None
    is_cnn: bool = False
    is_large: bool = True
    has_pause: bool = False

    def inputs_on(self, device: torch.device, batch: int | None = None) -> Tensor:
        """A batch of whole training steps on a device, of a size of its own if none is given."""
        if device.type == "cpu":
            return (self.cpu_inputs or self.inputs)(batch or self.cpu_batch)
        return self.inputs(batch or self.batch).to(device)


def images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    """Batches of images of ``size`` by ``size`` pixels."""
    return lambda batch: torch.randn(batch, channels, size, size)


def texts(tokens: int) -> Callable[[int], Tensor]:
    """Batches of texts of GPT-2's vocabulary."""
    return lambda batch: torch.randint(50257, (batch, tokens))


def small_mlp() -> nn.Module:
    """55,050 weights, so few that a step is nothing but calls from Python."""
    return mlp(784, 2, 64, True, "he")


def resnet18() -> nn.Module:
    """ResNet-18 for small images."""
    return resnet(3, 64, "he")


NETWORKS = {
    "mlp-small": Network("small MLP", small_mlp, images(28, 1), batch=64, cpu_batch=64, is_large=False),
    "mlp": Network("MLP 4 x 2048", lambda: mlp(784, 4, 2048, True, "he"), images(28, 1)),
    "vgg13": Network("VGG-13", vgg13, images(32), batch=512, is_cnn=True),
    "resnet18": Network("ResNet-18", resnet18, images(32), batch=512, is_cnn=True, has_pause=True),
    "resnet50": Network("ResNet-50", resnet50, images(224), batch=256, cpu_batch=2, is_cnn=True),
    "vit-b16": Network("ViT-B/16", ViT, images(224), cpu_batch=2),
    "gpt2": Network("GPT-2", GPT2, texts(1024), batch=16, cpu_batch=1, cpu_inputs=texts(128)),
}


@dataclass(frozen=True)
class Base:
    """A base optimizer."""

    title: str
    kind: Callable[..., Optimizer]
    options: Mapping[str, float]

    def make(self, net: nn.Module, setting: str) -> Optimizer:
        """For the parameters of a network, with ``setting`` switched on."""
        return self.kind(net.parameters(), lr=RATE, **self.options, **{setting: True})


OPTIMIZERS = {
    "sgd": Base("SGD", SGD, {}),
    "sgd-m": Base("SGD-M", SGD, {"momentum": 0.9}),
    "adam": Base("Adam", Adam, {}),
    "adamw": Base("AdamW", AdamW, {"weight_decay": 0.01}),
}
RULES = ("unit", "path")
IMPLEMENTATIONS = ("auto", "wrapped", "eager", "compiled", "triton")
PARTS = {  # what is measured
    "step": "the optimizer step alone",
    "host": "the time until a step returns, without waiting for the device",
    "training": "whole training steps",
    "pause": "the start of a fit: tracing and the first step",
}


@dataclass(frozen=True)
class Case:
    """One combination; ``part`` is one of :data:`PARTS`."""

    part: str
    device: str
    network: str
    optimizer: str
    rule: str
    implementation: str


@dataclass(frozen=True)
class Extras:
    """What the optimizer alone costs beside time. Pairs are of the base and of the equivalent-class form.

    Args:
        units: freedoms H.
        parameters: bytes of the parameters.
        tracing: seconds to find the scaling group.
        first: seconds of the first step.
        refresh: seconds by which a step with a refresh is longer than others.
        held: bytes.
        peaks: bytes.
        launches: of one step.
    """

    units: int
    parameters: int
    tracing: float
    first: float
    refresh: float
    held: int
    peaks: tuple[int, int]
    launches: tuple[int, int]


@dataclass(frozen=True)
class Result:
    """What was measured of one case.

    Args:
        case: which.
        setting: of the base, ``fused`` or ``foreach``.
        batch: of whole training steps.
        base: seconds of the runs, in the order in which they alternated with those of the equivalent-class form.
        ec: seconds of these.
        extras: of the step alone.
        autocast: whether whole training steps were under autocast to bfloat16.
        waits: number of steps in which the equivalent-class form waited for the device, of ten that are no refreshes;
            ``None`` on a CPU, and but for the part ``host``.
    """

    case: Case
    setting: str
    batch: int | None
    base: list[float]
    ec: list[float]
    extras: Extras | None = None
    autocast: bool = False
    waits: int | None = None

    @property
    def ratios(self) -> list[float]:
        return [ec / base for base, ec in zip(self.base, self.ec, strict=True)]


def read_results(path: Path) -> dict[Case, Result]:
    """The results of a file of JSON lines.

    Raises:
        ValueError: if a line is not one of this benchmark's.
    """

    def made(case: dict[str, Any], extras: dict[str, Any] | None, **rest: Any) -> Result:
        return Result(Case(**case), extras=Extras(**extras) if extras else None, **rest)

    return pages.read_results(path, "case", made)
