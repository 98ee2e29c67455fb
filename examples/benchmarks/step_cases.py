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
        cpu_batch: the batch of whole training steps on a CPU.
        is_cnn: whether the target for whole training steps is meant for it.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    cpu_batch: int = 128
    is_cnn: bool = False


def images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    """Batches of images of ``size`` by ``size`` pixels."""
    return lambda batch: torch.randn(batch, channels, size, size)


NETWORKS = {
    "mlp": Network("MLP 4 x 2048", lambda: mlp(784, 4, 2048, True, "he"), images(28, 1)),
    "vgg13": Network("VGG-13", vgg13, images(32), is_cnn=True),
    "resnet18": Network("ResNet-18", lambda: resnet(3, 64, "he"), images(32), is_cnn=True),
    "resnet50": Network("ResNet-50", resnet50, images(224), cpu_batch=2, is_cnn=True),
    "vit-b16": Network("ViT-B/16", ViT, images(224), cpu_batch=2),
    "gpt2": Network("GPT-2", GPT2, lambda batch: torch.randint(50257, (batch, 128)), cpu_batch=1),
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


@dataclass(frozen=True)
class Case:
    """One combination; ``part`` is ``step`` for the optimizer alone, ``training`` for whole training steps."""

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
    """Seconds of the runs of one case in the order in which they alternated, and in which setting the base was."""

    case: Case
    setting: str
    batch: int | None
    base: list[float]
    ec: list[float]
    extras: Extras | None = None

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
