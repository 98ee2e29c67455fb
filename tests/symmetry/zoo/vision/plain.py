"""Plain stacks of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import Classifier


class LeNet(nn.Module):
    """The LeNet of the tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 5)
        self.conv2 = nn.Conv2d(2, 3, 2)
        self.fc1 = nn.Linear(3 * 2 * 2, 4)
        self.fc2 = nn.Linear(4, 3)
        self.fc3 = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

    def num_flat_features(self, x: Tensor) -> int:
        size = 1
        for length in x.size()[1:]:
            size *= length
        return size


def alexnet() -> Classifier:
    """AlexNet as in torchvision."""
    features = nn.Sequential(
        nn.Conv2d(1, 2, kernel_size=3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(2, 3, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
    )
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(2 * 2 * 2, 4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4, 3),
        nn.ReLU(inplace=True),
        nn.Linear(3, 2),
    )
    return Classifier(features, classifier, pool=2)


def vgg(*config: int | str) -> Classifier:
    """VGG with batch norm, its layers made from a list of widths and pools."""
    layers: list[nn.Module] = []
    channels = 1
    for v in config:
        if v == "M":
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            conv2d = nn.Conv2d(channels, int(v), kernel_size=3, padding=1)
            layers += [conv2d, nn.BatchNorm2d(int(v)), nn.ReLU(inplace=True)]
            channels = int(v)
    classifier = nn.Sequential(
        nn.Linear(channels * 2 * 2, 4),
        nn.ReLU(True),
        nn.Dropout(p=0.5),
        nn.Linear(4, 3),
        nn.ReLU(True),
        nn.Linear(3, 2),
    )
    return Classifier(nn.Sequential(*layers), classifier, pool=2)


def network_in_network() -> nn.Sequential:
    """Network in network: 1 x 1 convolutions, and a class for each channel of the last."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Dropout(0.5),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )


class CoordConv(nn.Module):
    """A convolution that also sees the coordinates and the distance from the centre."""

    def __init__(self, inputs: int, outputs: int, with_r: bool = False) -> None:
        super().__init__()
        self.with_r = with_r
        self.conv = nn.Conv2d(inputs + 2 + int(with_r), outputs, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.size()
        yy = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device).view(1, 1, height, 1)
        xx = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device).view(1, 1, 1, width)
        yy = yy.expand(batch, 1, height, width)
        xx = xx.repeat(batch, 1, height, 1)
        x = torch.cat([x, xx.type_as(x), yy.type_as(x)], dim=1)
        if self.with_r:
            x = torch.cat([x, torch.sqrt(torch.pow(xx - 0.5, 2) + torch.pow(yy - 0.5, 2))], dim=1)
        return self.conv(x)


PLAIN: list[Case] = [
    # Two convolutions and two hidden layers.
    Case("LeNet", LeNet, ((6, 1, 14, 14),), 2 + 3 + 4 + 3, good_for=Use.PATHS),
    # Three convolutions and two hidden layers.
    Case("AlexNet", alexnet, ((6, 1, 16, 16),), 2 + 3 + 2 + 4 + 3, good_for=Use.PATHS),
    # The gains of three norms and two hidden layers.
    Case(
        "VGG with batch norm",
        lambda: vgg(2, "M", 3, 3, "M"),
        ((6, 1, 8, 8),),
        2 + 3 + 3 + 4 + 3,
        good_for=Use.PATHS | Use.FAST,
    ),
    # The last convolution is the output.
    Case("network in network", network_in_network, ((6, 1, 8, 8),), 3 + 2 + 4, good_for=Use.PATHS),
    Case(
        "CoordConv",
        lambda: Classifier(
            nn.Sequential(CoordConv(1, 3), nn.ReLU(), nn.MaxPool2d(2), CoordConv(3, 2, with_r=True), nn.ReLU()),
            nn.Linear(2, 2),
        ),
        ((6, 1, 6, 6),),
        3 + 2,
        good_for=Use.PATHS,
    ),
]
