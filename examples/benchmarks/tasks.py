"""Networks and data of the accuracy benchmark."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Standardised images ``[N, C, S, S]`` and labels ``[N]`` to train on, to choose settings by, and to test on."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=2)
def load(dataset: str, folder: str, size: int, num_train: int, num_validation: int) -> Split:
    """``folder/dataset.npz`` in Keras layout, or the data set of torchvision where that is installed.

    The first images of one fixed random order of the training set are trained on, the next are for validation.

    Args:
        dataset: ``mnist`` or ``cifar10``.
        folder: where ``dataset.npz`` is, or torchvision's copy of it.
        size: images are averaged down to ``size`` by ``size`` pixels.
        num_train: number of images to train on.
        num_validation: number of images to choose settings by.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: if there are fewer images than asked for, or their size is no multiple of ``size``.
    """
    arrays = _arrays(dataset, Path(folder))
    if num_train + num_validation > len(arrays["x_train"]):
        raise ValueError(
            f"{dataset} has {len(arrays['x_train'])} training images, {num_train} + {num_validation} are asked for."
        )
    order = np.random.default_rng(0).permutation(len(arrays["x_train"]))[: num_train + num_validation]
    images, labels = arrays["x_train"][order], arrays["y_train"][order]
    mean, deviation = float(images[:num_train].mean() / 255), float(images[:num_train].std() / 255)

    def prepare(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2).float() / 255
        if x.shape[-1] % size:
            raise ValueError(f"Images of {dataset} are {x.shape[-1]} pixels wide, no multiple of {size}.")
        x = nn.functional.avg_pool2d(x, x.shape[-1] // size)
        return ((x - mean) / deviation).contiguous(), torch.from_numpy(labels.reshape(-1).astype(np.int64))

    return Split(
        prepare(images[:num_train], labels[:num_train]),
        prepare(images[num_train:], labels[num_train:]),
        prepare(arrays["x_test"], arrays["y_test"]),
    )


def _arrays(dataset: str, folder: Path) -> dict[str, np.ndarray]:
    path = folder / f"{dataset}.npz"
    if path.exists():
        with np.load(path) as stored:
            return {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision import datasets

        kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[dataset]
        parts = {part: kind(str(folder), train=part == "train") for part in ("train", "test")}
        return {f"x_{part}": np.asarray(found.data) for part, found in parts.items()} | {
            f"y_{part}": np.asarray(found.targets) for part, found in parts.items()
        }
    raise FileNotFoundError(
        f"There is no {path}. Give --data a folder with {dataset}.npz in Keras layout (x_train, y_train, x_test, "
        "y_test), or install torchvision and give the folder of its copy; nothing is downloaded."
    )


def mlp(inputs: int, hidden: int, width: int, bias: bool, init: str) -> nn.Module:
    """A multi-layer perceptron with ``hidden`` hidden layers."""
    sizes = [inputs] + hidden * [width]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(width, CLASSES, bias=bias)), init)


def vgg(channels: int, width: int, init: str) -> nn.Module:
    """Six convolutions in three stages and a linear layer, without normalisation."""
    layers: list[nn.Module] = []
    for stage in range(3):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width << stage, 3, padding=1), nn.ReLU()]
            channels = width << stage
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return initialise(nn.Sequential(*layers), init)


def plain(channels: int, width: int, init: str) -> nn.Module:
    """The plain 18-layer net of He et al., arXiv:1512.03385: ResNet-18 without its skip connections and norms."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    channels = width
    for stage in range(4):
        for number in range(4):
            stride = 2 if stage > 0 and number == 0 else 1
            layers += [nn.Conv2d(channels, width << stage, 3, stride, 1), nn.ReLU()]
            channels = width << stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return initialise(nn.Sequential(*layers), init)


class Block(nn.Module):
    """The basic residual block, with batch norm."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(channels: int, width: int, init: str) -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 stem, four stages of two blocks, batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(4):
        after = width << stage
        layers += [Block(before, after, 2 if stage > 0 else 1), Block(after, after, 1)]
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES)]
    return initialise(nn.Sequential(*layers), init)


def initialise(net: nn.Module, init: str) -> nn.Module:
    """Draw the weights: ``default`` as torch does; ``he`` normal with variance 2 / fan-in, zero biases.

    Raises:
        ValueError: for another name.
    """
    if init not in ("default", "he"):
        raise ValueError(f"init must be 'default' or 'he', got {init!r}")
    if init == "he":
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return net


NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "vgg": vgg, "plain": plain, "resnet": resnet}
