"""What the accuracy benchmark runs, from a YAML file: tasks, contenders and rates.

The entries of the file are the arguments of :class:`Grid`, :class:`Task` and :class:`Contender`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Metric:
    """What a run is judged by, on validation and on test data.

    Every choice and comparison is made by the *gain*, of which more is better: accuracy itself, or minus the loss.

    Args:
        name: in tables.
        unit: in tables.
        sign: of the gain.
        close: difference that counts as level with the best rate.
        hopeless: difference to the best rate beyond which no further rates are tried in that direction.
        digits: after the point, in tables.
    """

    name: str
    unit: str
    sign: int
    close: float
    hopeless: float
    digits: int

    def gain(self, value: float) -> float:
        """More is better."""
        return self.sign * value

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


ACCURACY = Metric("accuracy", "%", sign=1, close=1.0, hopeless=5.0, digits=2)
LOSS = Metric("loss", "nats", sign=-1, close=0.02, hopeless=0.2, digits=3)


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long.

    Args:
        network: name and arguments of one of :data:`tasks.NETWORKS`.
        data: arguments of :func:`tasks.load_images`, or of :func:`tasks.load_text`, but the folder.
        batch_size: images or windows of text in a step.
        epochs: passes over the training images; for text, ``steps`` instead.
        steps: number of steps; for images, ``epochs`` instead.
        rates: if they are not those of the grid.
        autocast: whether the network is under autocast to bfloat16.

    Raises:
        ValueError: if not one of ``epochs`` and ``steps`` is given.
    """

    network: dict[str, Any]
    data: dict[str, Any]
    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    rates: list[float] | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a task has either epochs (images) or steps (text)")

    @property
    def metric(self) -> Metric:
        """Text is judged by the loss, images by the accuracy."""
        return LOSS if "text" in self.data else ACCURACY

    def precision(self, device: torch.device) -> torch.autocast:
        """The context in which outputs and losses are computed."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)

    def net(self, outputs: int) -> nn.Module:
        from tasks import NETWORKS

        arguments = dict(self.network)
        return NETWORKS[arguments.pop("name")](**arguments, outputs=outputs)


@dataclass(frozen=True)
class Contender:
    """How it is trained.

    Args:
        base: one of :data:`training.BASES`.
        options: of the base.
        ec: options of the EquivalentClassOptimizer around it, if there is one.
        clip_norm: length to which the gradient of all parameters together is clipped.
        centralize: whether gradients are centralised (Yong et al., arXiv:2004.01461).
        enorm: whether ENorm follows each step.
        path_condition: whether the start is rescaled by PathCond.
        unit_skeleton: whether the start has skeleton weights of one, as the authors of EC-SGD have.
        plain: the contender that it is a form of; all seeds are trained at the best rate of that, too, and rates are
            tried until it is worse than the best of that.
        default_rate: one rate for all tasks, at which all seeds are trained, too.
        rescaled: whether it is trained from a rescaled start, too.
        tasks: names of those that it is trained on, if not on all.
        tier: contenders of lower tiers are run first, on all tasks.
    """

    base: str
    options: dict[str, Any] = field(default_factory=dict)
    ec: dict[str, Any] | None = None
    clip_norm: float | None = None
    centralize: bool = False
    enorm: bool = False
    path_condition: bool = False
    unit_skeleton: bool = False
    plain: str | None = None
    default_rate: float | None = None
    rescaled: bool = False
    tasks: list[str] | None = None
    tier: int = 1


@dataclass(frozen=True)
class Grid:
    """All that is run.

    Args:
        rates: the common grid of learning rates.
        seeds: number of seeds at the rates that are compared.
        search_seeds: number of those by which the best rate is chosen.
        warmup: share of the steps in which the rate rises.
        tasks: by name.
        contenders: by name.
        refine: whether the rates half-way from the best to its neighbours are tried, too.
    """

    rates: list[float]
    seeds: int
    warmup: float
    tasks: dict[str, Task]
    contenders: dict[str, Contender]
    search_seeds: int = 1
    refine: bool = True

    @classmethod
    def read(cls, path: Path) -> Grid:
        """From a YAML file.

        Raises:
            ValueError: if it names something that there is not.
        """
        raw = yaml.safe_load(path.read_text())
        try:
            parts = {
                "tasks": {name: Task(**entries) for name, entries in raw.pop("tasks").items()},
                "contenders": {name: Contender(**entries) for name, entries in raw.pop("contenders").items()},
            }
            grid = cls(**raw, **parts)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a grid of this benchmark: {error}") from error
        grid.check(path)
        return grid

    def check(self, path: Path) -> None:
        """Raises ValueError if a contender names a task or a contender that there is not."""
        for name, contender in self.contenders.items():
            unknown = set(contender.tasks or ()) - set(self.tasks)
            if unknown:
                raise ValueError(f"{path}: contender {name} names tasks that there are not: {sorted(unknown)}.")
            if contender.plain is not None and contender.plain not in self.contenders:
                raise ValueError(f"{path}: contender {name} is a form of {contender.plain}, which there is not.")

    def of(self, task: str) -> list[str]:
        """The contenders of a task."""
        return [name for name, one in self.contenders.items() if one.tasks is None or task in one.tasks]

    def rates_of(self, task: str) -> list[float]:
        """The rates of a task, in ascending order."""
        return sorted(self.tasks[task].rates or self.rates)

    def plain(self, task: str, contender: str) -> str | None:
        """The contender that this is a form of, if it is one of the task's."""
        plain = self.contenders[contender].plain
        return plain if plain in self.of(task) else None

    def pairs(self, tier: int) -> Iterator[tuple[str, str]]:
        """Tasks and contenders of a tier."""
        for task in self.tasks:
            for contender in self.of(task):
                if self.contenders[contender].tier == tier:
                    yield task, contender


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """``--scale`` and ``--grid``."""
    parser.add_argument("--scale", choices=("default", "full"), default="default", help="which of the two grids")
    parser.add_argument("--grid", type=Path, help="another grid, in YAML")


def chosen_grid(arguments: argparse.Namespace) -> Grid:
    """The grid that the options name."""
    return Grid.read(arguments.grid or HERE / f"{arguments.scale}.yaml")
