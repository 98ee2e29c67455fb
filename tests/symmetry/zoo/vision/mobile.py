"""Mobile networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import Activation, Classifier, DropPath, SqueezeExcitation, conv_norm


def mobilenet_v1() -> nn.Sequential:
    """The first MobileNet: depthwise separable convolutions."""

    def conv_dw(inp: int, oup: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
            nn.BatchNorm2d(inp),
            nn.ReLU(inplace=True),
            nn.Conv2d(inp, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
            nn.ReLU(inplace=True),
        )

    return nn.Sequential(
        conv_norm(1, 3, 3), conv_dw(3, 4, 2), conv_dw(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )


class InvertedResidual(nn.Module):
    """An inverted residual: expansion, depthwise convolution, perhaps squeeze and excitation, linear bottleneck."""

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expanded: int,
        activation: Activation,
        attention: Callable[[int], nn.Module] | None = None,
        drop_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expanded != inp:
            layers.append(conv_norm(inp, expanded, activation=activation))
        layers.append(conv_norm(expanded, expanded, 3, stride, groups=expanded, activation=activation))
        if attention is not None:
            layers.append(attention(expanded))
        layers.append(conv_norm(expanded, oup, activation=None))
        self.conv = nn.Sequential(*layers)
        self.stochastic_depth = DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        result = self.conv(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


def mobilenet_v2() -> Classifier:
    """The second MobileNet."""
    features = nn.Sequential(
        conv_norm(1, 2, 3, 2, activation=nn.ReLU6),
        InvertedResidual(2, 3, 1, 2, nn.ReLU6),
        InvertedResidual(3, 3, 1, 4, nn.ReLU6),
        InvertedResidual(3, 2, 2, 4, nn.ReLU6),
        conv_norm(2, 3, activation=nn.ReLU6),
    )
    return Classifier(features, nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1)))


def mobilenet_v3() -> Classifier:
    """The third MobileNet: ReLU, then hard-swish."""
    squeeze = partial(SqueezeExcitation, squeezed=2, scale_activation=nn.Hardsigmoid)
    features = nn.Sequential(
        conv_norm(1, 2, 3, 2, activation=nn.Hardswish),
        InvertedResidual(2, 2, 1, 2, nn.ReLU, squeeze),
        InvertedResidual(2, 3, 2, 4, nn.ReLU),
        InvertedResidual(3, 3, 1, 4, nn.Hardswish, squeeze),
        conv_norm(3, 4, activation=nn.Hardswish),
    )
    classifier = nn.Sequential(nn.Linear(4, 5), nn.Hardswish(inplace=True), nn.Dropout(0.2, True), nn.Linear(5, 2))
    return Classifier(features, classifier)


def efficientnet() -> Classifier:
    """An EfficientNet: SiLU, squeeze and excitation, stochastic depth."""
    squeeze = partial(SqueezeExcitation, squeezed=1, activation=nn.SiLU)
    features = nn.Sequential(
        conv_norm(1, 2, 3, 2, activation=nn.SiLU),
        InvertedResidual(2, 3, 1, 2, nn.SiLU, squeeze),
        InvertedResidual(3, 3, 1, 4, nn.SiLU, squeeze, drop_prob=0.1),
        InvertedResidual(3, 2, 2, 4, nn.SiLU, squeeze, drop_prob=0.2),
        conv_norm(2, 4, activation=nn.SiLU),
    )
    return Classifier(features, nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(4, 2)))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Mix the channels of the groups."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    """The unit of the second ShuffleNet: half of the channels pass by, and then all are shuffled."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv_norm(inp, inp, 3, stride, groups=inp, activation=None), conv_norm(inp, half)
            )
        self.branch2 = nn.Sequential(
            conv_norm(inp if stride > 1 else half, half),
            conv_norm(half, half, 3, stride, groups=half, activation=None),
            conv_norm(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    """The second ShuffleNet, with one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_norm(1, 2, 3)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleUnit(2, 4, 2), ShuffleUnit(4, 4, 1), ShuffleUnit(4, 4, 1))
        self.conv5 = conv_norm(4, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage2(x))
        x = x.mean([2, 3])
        return self.fc(x)


class GhostModule(nn.Module):
    """Channels, half of them cheaply made from the others."""

    def __init__(self, inp: int, oup: int, relu: bool = True) -> None:
        super().__init__()
        self.oup = oup
        init_channels = oup // 2
        activation = nn.ReLU if relu else None
        self.primary_conv = conv_norm(inp, init_channels, activation=activation)
        self.cheap_operation = conv_norm(init_channels, init_channels, 3, groups=init_channels, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.oup, :, :]


class HardGate(nn.Module):
    """Squeeze and excitation with a gate of clamped straight lines."""

    def __init__(self, in_chs: int, reduced_chs: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(in_chs, reduced_chs, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(reduced_chs, in_chs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.conv_expand(self.act1(self.conv_reduce(x_se)))
        return x * (F.relu6(x_se + 3.0) / 6.0)


class GhostBottleneck(nn.Module):
    """The bottleneck of a GhostNet."""

    def __init__(self, in_chs: int, mid_chs: int, out_chs: int, stride: int = 1, reduced: int | None = None) -> None:
        super().__init__()
        self.stride = stride
        self.ghost1 = GhostModule(in_chs, mid_chs)
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid_chs, mid_chs, 3, stride, padding=1, groups=mid_chs, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid_chs)
        self.se = None if reduced is None else HardGate(mid_chs, reduced)
        self.ghost2 = GhostModule(mid_chs, out_chs, relu=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_chs != out_chs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_chs, in_chs, 3, stride, padding=1, groups=in_chs, bias=False),
                nn.BatchNorm2d(in_chs),
                nn.Conv2d(in_chs, out_chs, 1, 1, padding=0, bias=False),
                nn.BatchNorm2d(out_chs),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.ghost1(x)
        if self.stride > 1:
            x = self.bn_dw(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x


def ghostnet() -> Classifier:
    """A GhostNet."""
    blocks = nn.Sequential(GhostBottleneck(2, 4, 2), GhostBottleneck(2, 4, 4, stride=2, reduced=2))
    return Classifier(nn.Sequential(conv_norm(1, 2, 3), *blocks), nn.Linear(4, 2))


MOBILE: list[Case] = [
    Case("MobileNetV1", mobilenet_v1, ((6, 1, 6, 6),), 3 + (3 + 4) + (4 + 5), good_for=Use.PATHS),
    # The linear bottlenecks; the residual keeps that of the first.
    Case("MobileNetV2", mobilenet_v2, ((3, 1, 12, 12),), 3 + 2),
    # ReLU and squeezed channels in the first block, ReLU in the second; its bottleneck; squeezed channels in the third.
    Case("MobileNetV3", mobilenet_v3, ((6, 1, 8, 8),), (2 + 2) + (4 + 4) + 3 + 2),
    # The linear bottlenecks.
    Case("EfficientNet", efficientnet, ((6, 1, 8, 8),), 3 + 2),
    # Each norm's output.
    Case(
        "ShuffleNetV2",
        ShuffleNet,
        ((6, 1, 8, 8),),
        2 + (2 + 2 + 3 * 2) + 3 * 2 + 3 * 2 + 5,
        good_for=Use.PATHS | Use.FAST,
    ),
    # The stem's stream, within the first block; within the second, squeezed, its stream, within its shortcut.
    Case("GhostNet", ghostnet, ((6, 1, 6, 6),), 2 + 4 + (4 + 4 + 2 + 4 + 2)),
]
