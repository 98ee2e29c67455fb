"""Networks and data of the accuracy benchmark."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from attention import decoder, vit
from torch import Tensor, nn

EPOCH_OF_TEXT = 500  # steps from one refresh to the next, where there is no pass over the data
EVALUATED = 1000  # images, or windows of text divided by eight, that are evaluated at a time

Pair = tuple[Tensor, Tensor]


class Data(Protocol):
    """What is trained and tested on."""

    outputs: int

    @property
    def example(self) -> Tensor:
        """Two inputs, to trace the network with."""

    def steps_of_epoch(self, batch_size: int) -> int:
        """Steps from one refresh to the next."""

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        """Batches of inputs and labels; the generator is one of the CPU."""

    def held_out(self, part: str) -> Iterator[Pair]:
        """All of ``validation`` or ``test``, in pieces."""


@dataclass(frozen=True)
class Images:
    """Standardised images ``[N, C, S, S]`` and labels ``[N]`` to train on, to choose settings by, and to test on.

    ``augment`` shifts each training image by up to an eighth of its width and mirrors every other one.
    """

    train: Pair
    validation: Pair
    test: Pair
    outputs: int
    augment: bool = False

    @property
    def example(self) -> Tensor:
        return self.train[0][:2]

    def steps_of_epoch(self, batch_size: int) -> int:
        return len(self.train[1]) // batch_size

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        images, labels = self.train
        order = torch.randperm(len(labels), generator=generator)[: self.steps_of_epoch(batch_size) * batch_size]
        for batch in order.to(images.device).split(batch_size):
            x = images[batch]
            yield (self._augmented(x, generator) if self.augment else x), labels[batch]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        number, _, size, _ = images.shape
        pad = size // 8
        padded = nn.functional.pad(images, 4 * (pad,))
        shift = torch.randint(2 * pad + 1, (2, number, 1), generator=generator) + torch.arange(size)  # [2, N, S]
        mirrored = torch.rand(number, 1, generator=generator) < 0.5
        down, right = shift[0], torch.where(mirrored, shift[1].flip(1), shift[1])
        down, right = down.to(images.device), right.to(images.device)
        which = torch.arange(number, device=images.device)[:, None, None]
        return padded[which, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def held_out(self, part: str) -> Iterator[Pair]:
        images, labels = getattr(self, part)
        return zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True)


@dataclass(frozen=True)
class Text:
    """Tokens ``[N]`` to train on, to choose settings by, and to test on; a label is the token that comes next.

    Training windows of ``context`` tokens begin anywhere, evaluated ones one behind the other.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    outputs: int
    context: int

    @property
    def example(self) -> Tensor:
        return self.train[: 2 * self.context].view(2, self.context)

    def steps_of_epoch(self, batch_size: int) -> int:
        return EPOCH_OF_TEXT

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        window = torch.arange(self.context, device=self.train.device)
        for _ in range(EPOCH_OF_TEXT):
            start = torch.randint(len(self.train) - self.context, (batch_size, 1), generator=generator)
            at = start.to(self.train.device) + window
            yield self.train[at], self.train[at + 1]

    def held_out(self, part: str) -> Iterator[Pair]:
        tokens = getattr(self, part)
        number = (len(tokens) - 1) // self.context * self.context
        x, y = tokens[:number].view(-1, self.context), tokens[1 : number + 1].view(-1, self.context)
        return zip(x.split(EVALUATED // 8), y.split(EVALUATED // 8), strict=True)


@functools.cache
def load(folder: str, device: str, **arguments: Any) -> Data:
    """The data of a task: :func:`load_text` of its arguments if there is a ``text``, else :func:`load_images`."""
    loader: Callable[..., Images | Text] = load_text if "text" in arguments else load_images
    data = loader(Path(folder), **arguments)

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(part.to(device) for part in value) if isinstance(value, tuple) else value

    return type(data)(**{name: moved(value) for name, value in vars(data).items()})


def load_text(folder: Path, text: str, context: int) -> Text:
    """``folder/text.txt``, character by character: the first 90 % to train on, 5 % for validation, 5 % to test on.

    Args:
        folder: where the file is.
        text: its name, without ``.txt``.
        context: characters in a window.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if its twentieth is shorter than a window.
    """
    path = folder / f"{text}.txt"
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Give --data a folder with {text}.txt, any text of a megabyte or so; "
            "nothing is downloaded."
        )
    characters = path.read_text(encoding="utf-8")
    vocabulary = {character: number for number, character in enumerate(sorted(set(characters)))}
    tokens = torch.tensor([vocabulary[character] for character in characters])
    first, second = round(0.9 * len(tokens)), round(0.95 * len(tokens))
    if min(len(tokens) - second, second - first) <= context:
        raise ValueError(
            f"{path} has {len(tokens)} characters; a twentieth of them is no window of {context}: take a longer text."
        )
    return Text(tokens[:first], tokens[first:second], tokens[second:], len(vocabulary), context)


def load_images(
    folder: Path, dataset: str, size: int, num_train: int, num_validation: int, augment: bool = False
) -> Images:
    """``folder/dataset.npz`` in Keras layout, or the data set of torchvision where that is installed.

    The first images of one fixed random order of the training set are trained on, the next are for validation.

    Args:
        folder: where ``dataset.npz`` is, or torchvision's copy of it.
        dataset: name of the file, without ``.npz``; ``mnist`` and ``cifar10`` are torchvision's, too.
        size: images are averaged down to ``size`` by ``size`` pixels.
        num_train: number of images to train on.
        num_validation: number of images to choose settings by.
        augment: whether training images are shifted and mirrored.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: if there are fewer images than asked for, or their size is no multiple of ``size``.
    """
    arrays = _arrays(dataset, folder)
    if num_train + num_validation > len(arrays["x_train"]):
        raise ValueError(
            f"{dataset} has {len(arrays['x_train'])} training images, {num_train} + {num_validation} are asked for."
        )
    order = np.random.default_rng(0).permutation(len(arrays["x_train"]))[: num_train + num_validation]
    images, labels = arrays["x_train"][order], arrays["y_train"][order]
    mean, deviation = float(images[:num_train].mean() / 255), float(images[:num_train].std() / 255)

    def prepare(images: np.ndarray, labels: np.ndarray) -> Pair:
        x = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2).float() / 255
        if x.shape[-1] % size:
            raise ValueError(f"Images of {dataset} are {x.shape[-1]} pixels wide, no multiple of {size}.")
        x = nn.functional.avg_pool2d(x, x.shape[-1] // size)
        return ((x - mean) / deviation).contiguous(), torch.from_numpy(labels.reshape(-1).astype(np.int64))

    return Images(
        prepare(images[:num_train], labels[:num_train]),
        prepare(images[num_train:], labels[num_train:]),
        prepare(arrays["x_test"], arrays["y_test"]),
        outputs=int(arrays["y_train"].max()) + 1,
        augment=augment,
    )


def _arrays(dataset: str, folder: Path) -> dict[str, np.ndarray]:
    path = folder / f"{dataset}.npz"
    if path.exists():
        with np.load(path) as stored:
            return {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    if dataset in ("mnist", "cifar10") and importlib.util.find_spec("torchvision") is not None:
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


def mlp(inputs: int, hidden: int, width: int, bias: bool, init: str, outputs: int = 10) -> nn.Module:
    """A multi-layer perceptron with ``hidden`` hidden layers."""
    sizes = [inputs] + hidden * [width]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return initialise(nn.Sequential(*layers, nn.Linear(width, outputs, bias=bias)), init)


def vgg(channels: int, width: int, init: str, outputs: int = 10) -> nn.Module:
    """Six convolutions in three stages and a linear layer, without normalisation."""
    layers: list[nn.Module] = []
    for stage in range(3):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width << stage, 3, padding=1), nn.ReLU()]
            channels = width << stage
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)]
    return initialise(nn.Sequential(*layers), init)


PLAIN_CONVOLUTIONS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}  # by stage


def plain(channels: int, width: int, init: str, depth: int = 18, outputs: int = 10) -> nn.Module:
    """The plain nets of He et al., arXiv:1512.03385: ResNet-18 or -34 without skip connections and norms.

    Raises:
        ValueError: for another depth.
    """
    if depth not in PLAIN_CONVOLUTIONS:
        raise ValueError(f"depth must be one of {sorted(PLAIN_CONVOLUTIONS)}, got {depth}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    channels = width
    for stage, convolutions in enumerate(PLAIN_CONVOLUTIONS[depth]):
        for number in range(convolutions):
            stride = 2 if stage > 0 and number == 0 else 1
            layers += [nn.Conv2d(channels, width << stage, 3, stride, 1), nn.ReLU()]
            channels = width << stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)]
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


def resnet(channels: int, width: int, init: str, outputs: int = 10) -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 stem, four stages of two blocks, batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(4):
        after = width << stage
        layers += [Block(before, after, 2 if stage > 0 else 1), Block(after, after, 1)]
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs)]
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


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "vgg": vgg,
    "plain": plain,
    "resnet": resnet,
    "vit": vit,
    "decoder": decoder,
}
