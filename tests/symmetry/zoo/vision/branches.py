"""Networks with branches and concatenations."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import Classifier, conv_norm


class DenseLayer(nn.Module):
    """A layer of a DenseNet: norm, ReLU and convolution, twice, from all the features so far."""

    def __init__(self, num_input_features: int, growth_rate: int, bn_size: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, stride=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, stride=1, padding=1, bias=False)
        self.drop_rate = 0.1

    def forward(self, features: list[Tensor]) -> Tensor:
        concated_features = torch.cat(features, 1)
        bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck_output)))
        return F.dropout(new_features, p=self.drop_rate, training=self.training)


class DenseBlock(nn.ModuleDict):
    """The layers of a DenseNet between two poolings."""

    def __init__(self, num_layers: int, num_input_features: int, bn_size: int, growth_rate: int) -> None:
        super().__init__()
        for i in range(num_layers):
            self.add_module(
                f"denselayer{i + 1}", DenseLayer(num_input_features + i * growth_rate, growth_rate, bn_size)
            )

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """A DenseNet as in torchvision, with one block and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(1, 3, kernel_size=3, padding=1, bias=False),
                norm0=nn.BatchNorm2d(3),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                denseblock1=DenseBlock(num_layers=2, num_input_features=3, bn_size=2, growth_rate=2),
                transition1=nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(7),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(7, 3, kernel_size=1, stride=1, bias=False),
                        pool=nn.AvgPool2d(kernel_size=2, stride=2),
                    )
                ),
                norm5=nn.BatchNorm2d(3),
            )
        )
        self.classifier = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


class Fire(nn.Module):
    """The module of a SqueezeNet."""

    def __init__(self, inplanes: int, squeeze_planes: int, expand1x1_planes: int, expand3x3_planes: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze_planes, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze_planes, expand1x1_planes, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze_planes, expand3x3_planes, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    """A SqueezeNet as in torchvision, with two fire modules."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 3, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(3, 2, 3, 2),
            Fire(5, 2, 2, 3),
        )
        final_conv = nn.Conv2d(5, 3, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


class InceptionConv(nn.Module):
    """The convolution of an Inception, with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: int | tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class InceptionA(nn.Module):
    """Four branches at one resolution; one of them splits again."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = InceptionConv(in_channels, 2, kernel_size=1)
        self.branch3x3_1 = InceptionConv(in_channels, 2, kernel_size=1)
        self.branch3x3_2a = InceptionConv(2, 1, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = InceptionConv(2, 2, kernel_size=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = InceptionConv(in_channels, 1, kernel_size=1)
        self.branch3x3dbl_2 = InceptionConv(1, 2, kernel_size=3, padding=1)
        self.branch_pool = InceptionConv(in_channels, pool_features, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)

        branch3x3 = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)]
        branch3x3 = torch.cat(branch3x3, 1)

        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))

        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)

        return torch.cat([branch1x1, branch3x3, branch3x3dbl, branch_pool], 1)


class InceptionB(nn.Module):
    """Branches that narrow the image, one of them a pool alone."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = InceptionConv(in_channels, 2, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3(x)
        branch_pool = F.max_pool2d(x, kernel_size=3, stride=2)
        return torch.cat([branch3x3, branch_pool], 1)


def inception() -> Classifier:
    """An Inception as in torchvision."""
    features = nn.Sequential(InceptionConv(1, 2, kernel_size=3), InceptionA(2, pool_features=1), InceptionB(8))
    return Classifier(features, nn.Sequential(nn.Dropout(), nn.Linear(10, 2)))


class SeparableConv2d(nn.Module):
    """A depthwise convolution and a pointwise one, nothing between them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """Separable convolutions and a max pool around which a projection skips."""

    def __init__(self, in_filters: int, out_filters: int, start_with_relu: bool) -> None:
        super().__init__()
        self.skip = nn.Conv2d(in_filters, out_filters, 1, stride=2, bias=False)
        self.skipbn = nn.BatchNorm2d(out_filters)
        rep: list[nn.Module] = [
            nn.ReLU(inplace=False),
            SeparableConv2d(in_filters, out_filters),
            nn.BatchNorm2d(out_filters),
            nn.ReLU(inplace=True),
            SeparableConv2d(out_filters, out_filters),
            nn.BatchNorm2d(out_filters),
            nn.MaxPool2d(3, 2, 1),
        ]
        self.rep = nn.Sequential(*rep[0 if start_with_relu else 1 :])

    def forward(self, inp: Tensor) -> Tensor:
        x = self.rep(inp)
        skip = self.skipbn(self.skip(inp))
        x += skip
        return x


def xception() -> Classifier:
    """An Xception."""
    features = nn.Sequential(
        conv_norm(1, 2, 3),
        XceptionBlock(2, 3, start_with_relu=False),
        XceptionBlock(3, 2, start_with_relu=True),
        SeparableConv2d(2, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
    )
    return Classifier(features, nn.Linear(4, 2))


BRANCHES: list[Case] = [
    # The norms of each layer and of the transition, the last norm.
    Case("DenseNet-BC", DenseNet, ((6, 1, 8, 8),), (3 + 4) + (5 + 4) + 7 + 3, good_for=Use.PATHS | Use.FAST),
    # The last convolution is the output.
    Case("SqueezeNet", SqueezeNet, ((6, 1, 9, 9),), 3 + (2 + 3 + 2) + (2 + 2 + 3), good_for=Use.PATHS),
    # The stem, the four branches, the branch that narrows; pools pass on.
    Case("Inception", inception, ((6, 1, 9, 9),), 2 + 2 + (2 + 1 + 2) + (1 + 2) + 1 + 2, good_for=Use.PATHS),
    # The stem; in each block between the halves of its separable convolutions, after the first of these, and its
    # stream; the last separable convolution.
    Case("Xception", xception, ((6, 1, 7, 7),), 2 + (2 + 3 + 3 + 3) + (3 + 2 + 2 + 2) + (2 + 4), good_for=Use.PATHS),
]
