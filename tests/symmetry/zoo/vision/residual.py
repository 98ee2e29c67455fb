"""Residual networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import Classifier, DropPath, SqueezeExcitation, conv_norm


class BasicBlock(nn.Module):
    """The basic block of a ResNet, as in torchvision."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """The bottleneck of a ResNet or, with groups, of a ResNeXt."""

    expansion = 2

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        width = planes * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class ResNet(nn.Module):
    """A ResNet as in torchvision: a stem and stages of blocks."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], planes: Sequence[int], layers: Sequence[int], groups: int = 1
    ) -> None:
        super().__init__()
        self.inplanes = 2
        self.groups = groups
        self.conv1 = nn.Conv2d(1, self.inplanes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layers = nn.Sequential(
            *(
                self._make_layer(block, width, depth, 1 if i == 0 else 2)
                for i, (width, depth) in enumerate(zip(planes, layers, strict=True))
            )
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[-1] * block.expansion, 2)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample, self.groups)]
        self.inplanes = planes * block.expansion
        layers += [block(self.inplanes, planes, groups=self.groups) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layers(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class PreActBlock(nn.Module):
    """The pre-activation block of a ResNet; its norm and ReLU come before the projection too."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


def preact_resnet() -> Classifier:
    """A pre-activation ResNet."""
    features = nn.Sequential(
        nn.Conv2d(1, 2, kernel_size=3, padding=1, bias=False),
        PreActBlock(2, 2),
        PreActBlock(2, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
    )
    return Classifier(features, nn.Linear(3, 2))


class RegNetBlock(nn.Module):
    """The block of a RegNetY: a bottleneck with groups and squeeze and excitation."""

    def __init__(self, width_in: int, width_out: int, stride: int, group_width: int, squeezed: int) -> None:
        super().__init__()
        self.proj = None
        if width_in != width_out or stride != 1:
            self.proj = conv_norm(width_in, width_out, stride=stride, activation=None)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["a"] = conv_norm(width_in, width_out)
        layers["b"] = conv_norm(width_out, width_out, 3, stride, groups=width_out // group_width)
        layers["se"] = SqueezeExcitation(width_out, squeezed)
        layers["c"] = conv_norm(width_out, width_out, activation=None)
        self.f = nn.Sequential(layers)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


def regnet() -> Classifier:
    """A RegNetY: a stem and one stage of two blocks."""
    features = nn.Sequential(
        OrderedDict(
            stem=conv_norm(1, 2, 3, stride=2),
            block1=nn.Sequential(RegNetBlock(2, 4, 2, group_width=2, squeezed=1), RegNetBlock(4, 4, 1, 2, squeezed=2)),
        )
    )
    return Classifier(features, nn.Linear(4, 2))


class CBAMBlock(nn.Module):
    """A residual block with attention to channels and then to places."""

    def __init__(self, planes: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Sequential(
            nn.Conv2d(planes, squeezed, 1, bias=False), nn.ReLU(), nn.Conv2d(squeezed, planes, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def channel_attention(self, x: Tensor) -> Tensor:
        avg_out = self.fc(F.adaptive_avg_pool2d(x, 1))
        max_out = self.fc(F.adaptive_max_pool2d(x, 1))
        return self.sigmoid(avg_out + max_out)

    def spatial_attention(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return self.sigmoid(self.spatial(torch.cat([avg_out, max_out], dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.channel_attention(out) * out
        out = self.spatial_attention(out) * out
        out += residual
        return self.relu(out)


class StdConv2d(nn.Conv2d):
    """A convolution whose weights are standardised."""

    eps = 1e-10

    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        w = (self.weight - m) / torch.sqrt(v + self.eps)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class GroupNormBottleneck(nn.Module):
    """The pre-activation bottleneck of a big transfer network: group norms and some kind of convolution."""

    def __init__(self, cin: int, cmid: int, cout: int, conv: type[nn.Conv2d], stride: int = 1) -> None:
        super().__init__()
        self.gn1 = nn.GroupNorm(2, cin)
        self.conv1 = conv(cin, cmid, 1, bias=False)
        self.gn2 = nn.GroupNorm(1, cmid)
        self.conv2 = conv(cmid, cmid, 3, stride, padding=1, bias=False)
        self.gn3 = nn.GroupNorm(1, cmid)
        self.conv3 = conv(cmid, cout, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        if stride != 1 or cin != cout:
            self.downsample = conv(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        residual = x
        if hasattr(self, "downsample"):
            residual = self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.gn2(out)))
        out = self.conv3(self.relu(self.gn3(out)))
        return out + residual


def big_transfer(conv: type[nn.Conv2d]) -> nn.Sequential:
    """A big transfer network (ResNetV2) with group norms."""
    return nn.Sequential(
        OrderedDict(
            root=nn.Sequential(
                OrderedDict(
                    conv=conv(1, 4, 3, padding=1, bias=False),
                    pad=nn.ConstantPad2d(1, 0),
                    pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=0),
                )
            ),
            body=nn.Sequential(GroupNormBottleneck(4, 2, 4, conv), GroupNormBottleneck(4, 3, 6, conv, stride=2)),
            head=nn.Sequential(
                OrderedDict(
                    gn=nn.GroupNorm(2, 6),
                    relu=nn.ReLU(inplace=True),
                    avg=nn.AdaptiveAvgPool2d(output_size=1),
                    conv=nn.Conv2d(6, 2, kernel_size=1, bias=True),
                )
            ),
        )
    )


class ScaledStdConv2d(nn.Conv2d):
    """A convolution with standardised and scaled weights and a gain, by way of a batch norm of the weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), 1.0))
        self.scale = self.weight[0].numel() ** -0.5
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormFreeBlock(nn.Module):
    """The block of a network without norms: scaled activations, squeeze and excitation, a gain of the whole."""

    def __init__(self, in_chs: int, mid_chs: int, out_chs: int, squeezed: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.act1 = nn.ReLU()
        self.downsample = (
            nn.Sequential(
                nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), ScaledStdConv2d(in_chs, out_chs, 1)
            )
            if in_chs != out_chs
            else None
        )
        self.conv1 = ScaledStdConv2d(in_chs, mid_chs, 1)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = ScaledStdConv2d(mid_chs, mid_chs, 3, stride=1 if in_chs == out_chs else 2)
        self.act3 = nn.ReLU(inplace=True)
        self.conv3 = ScaledStdConv2d(mid_chs, out_chs, 1)
        self.attn_last = SqueezeExcitation(out_chs, squeezed)
        self.drop_path = DropPath(0.2)
        self.skipinit_gain = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(x) * self.beta
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act2(out) * 1.7139588594436646)
        out = self.conv3(self.act3(out) * 1.7139588594436646)
        out = 2.0 * self.attn_last(out)
        out = self.drop_path(out)
        out = out * self.skipinit_gain
        return out * self.alpha + shortcut


def normalizer_free_resnet() -> Classifier:
    """A network without norms of activations."""
    features = nn.Sequential(
        ScaledStdConv2d(1, 2, 3),
        NormFreeBlock(2, 2, 3, squeezed=2, alpha=0.2, beta=1.0),
        NormFreeBlock(3, 2, 3, squeezed=1, alpha=0.2, beta=0.9805806756909201),
        ScaledStdConv2d(3, 4, 1),
        nn.ReLU(inplace=True),
    )
    return Classifier(features, nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2)))


class HighwayLayer(nn.Module):
    """A convolution, and a gate between what it makes and what it gets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.plain = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate.bias.data.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.plain(x))
        t = torch.sigmoid(self.gate(x))
        return h * t + x * (1.0 - t)


class DarknetResidual(nn.Module):
    """The residual of a Darknet, after its last activation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        leaky = partial(nn.LeakyReLU, 0.1)
        self.layer1 = conv_norm(channels, hidden, activation=leaky)
        self.layer2 = conv_norm(hidden, channels, 3, activation=leaky)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer2(self.layer1(x))


class Yolo(nn.Module):
    """A detector: a Darknet, a passthrough that turns places into channels, and boxes for each anchor."""

    def __init__(self, num_anchors: int = 1, num_classes: int = 1) -> None:
        super().__init__()
        leaky = partial(nn.LeakyReLU, 0.1)
        self.num_anchors = num_anchors
        self.stem = conv_norm(1, 2, 3, activation=leaky)
        self.residual = DarknetResidual(2, 3)
        self.down = conv_norm(2, 3, 3, stride=2, activation=leaky)
        self.mix = conv_norm(2 * 4 + 3, 3, activation=leaky)
        self.head = nn.Conv2d(3, num_anchors * (5 + num_classes), 1)

    def reorg(self, x: Tensor, s: int = 2) -> Tensor:
        b, c, h, w = x.size()
        x = x.view(b, c, h // s, s, w // s, s).transpose(3, 4).contiguous()
        x = x.view(b, c, h // s * w // s, s * s).transpose(2, 3).contiguous()
        x = x.view(b, c, s * s, h // s, w // s).transpose(1, 2).contiguous()
        return x.view(b, s * s * c, h // s, w // s)

    def forward(self, x: Tensor) -> Tensor:
        route = self.residual(self.stem(x))
        x = torch.cat((self.reorg(route), self.down(route)), 1)
        x = self.head(self.mix(x))
        batch, _, height, width = x.shape
        x = x.view(batch, self.num_anchors, -1, height, width).permute(0, 1, 3, 4, 2).contiguous()
        xy, wh, rest = x[..., :2].sigmoid(), x[..., 2:4], torch.sigmoid(x[..., 4:])
        return torch.cat((xy, wh, rest), -1).view(batch, height * width * self.num_anchors, -1)


RESIDUAL: list[Case] = [
    # The stream of the stem, within two blocks, the stream after the projection.
    Case(
        "ResNet, basic blocks",
        lambda: ResNet(BasicBlock, (2, 3), (1, 1)),
        ((6, 1, 8, 8),),
        2 + 2 + 3 + 3,
        good_for=Use.PATHS | Use.FAST,
    ),
    # The stem, the stream, twice within each of the two blocks.
    Case(
        "ResNet, bottlenecks",
        lambda: ResNet(Bottleneck, (2,), (2,)),
        ((6, 1, 8, 8),),
        2 + 4 + (2 + 2) + (2 + 2),
        good_for=Use.PATHS,
    ),
    Case(
        "ResNeXt",
        lambda: ResNet(Bottleneck, (2,), (1,), groups=2),
        ((6, 1, 8, 8),),
        2 + 4 + (4 + 4),
        good_for=Use.PATHS,
    ),
    # The norms at the beginning of the blocks hold the stream; each norm's output is free.
    Case("pre-activation ResNet", preact_resnet, ((6, 1, 6, 6),), (2 + 2) + (2 + 3) + 3, good_for=Use.PATHS),
    # The stem, the stream; two convolutions and the squeezed channels in each block.
    Case("RegNet", regnet, ((6, 1, 8, 8),), 2 + 4 + (4 + 4 + 1) + (4 + 4 + 2)),
    # Mean and maximum over the channels tie those of the stream to each other; within the block and the squeezed.
    Case(
        "ResNet with CBAM",
        lambda: Classifier(nn.Sequential(conv_norm(1, 3, 3), CBAMBlock(3, 2)), nn.Linear(3, 2)),
        ((6, 1, 6, 6),),
        1 + 3 + 2,
    ),
    # Each norm's output: three in each block, and that of the head.
    Case("ResNet with group norm", lambda: big_transfer(nn.Conv2d), ((6, 1, 6, 6),), (4 + 2 + 2) + (4 + 3 + 3) + 6),
    # Standardised weights cannot follow their inputs: only the output of the last norm is free.
    Case("group norm, standardised weights", lambda: big_transfer(StdConv2d), ((6, 1, 6, 6),), 6),
    # Standardised weights cannot follow their inputs one by one, but their gains can follow all of these together: one
    # scale for each of the two streams, and for each block two within it, its last gains against the gain of the whole
    # and the squeezed channels; the gains of the last convolution.
    Case(
        "normalizer-free ResNet",
        normalizer_free_resnet,
        ((6, 1, 6, 6),),
        2 + (2 + 1 + 2) + (2 + 1 + 1) + 4,
        good_for=Use.FAST,
    ),
    # One stream through it all.
    Case(
        "highway network",
        lambda: Classifier(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), HighwayLayer(3), nn.MaxPool2d(2), HighwayLayer(3)),
            nn.Linear(3, 2),
        ),
        ((6, 1, 6, 6),),
        3,
    ),
    # The stem with the residual, within the residual, after narrowing, the mixture of both.
    Case("YOLO", Yolo, ((2, 1, 4, 4),), 2 + 3 + 3 + 3),
]
