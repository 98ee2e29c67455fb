"""Networks for images: from LeNet to transformers, with the blocks, idioms and names of their well-known versions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case

Activation = Callable[..., nn.Module]

# ---------------------------------------------------------------------------------------------------------- bricks


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: Activation | None = nn.ReLU,
) -> nn.Sequential:
    """A convolution without bias, batch norm, and an activation in place."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """Features, a pool, and a classifier of what is flattened."""

    def __init__(self, features: nn.Module, classifier: nn.Module, pool: int = 1) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class SqueezeExcitation(nn.Module):
    """Gates of the channels that depend on their averages."""

    def __init__(
        self, channels: int, squeezed: int, activation: Activation = nn.ReLU, scale_activation: Activation = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.activation(self.fc1(scale))
        return self.scale_activation(self.fc2(scale)) * x


class DropPath(nn.Module):
    """Stochastic depth, per sample."""

    def __init__(self, drop_prob: float = 0.2) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random_tensor = x.new_empty(shape).bernoulli_(keep_prob)
        random_tensor.div_(keep_prob)
        return x * random_tensor


class LayerScale(nn.Module):
    """A gain for each channel, the last of the dimensions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """The feed-forward part of a transformer."""

    def __init__(self, dim: int, hidden: int, activation: Activation = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.drop1 = nn.Dropout(0.1)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


# --------------------------------------------------------------------------------------------- plain stacks of layers


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


# ------------------------------------------------------------------------------------------------- residual networks


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


# -------------------------------------------------------------------------------------- branches and concatenations


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


# ---------------------------------------------------------------------------------------------------- mobile networks


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


# ------------------------------------------------------------------------------------- images out of images, detection


class DoubleConv(nn.Sequential):
    """Two convolutions with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(conv_norm(in_channels, out_channels, 3), conv_norm(out_channels, out_channels, 3))


class UNet(nn.Module):
    """A U-Net that enlarges bilinearly or by transposed convolutions, and pads to the size of the skip."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(1, 2)
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2, 3))
        self.up = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if bilinear
            else nn.ConvTranspose2d(3, 2, kernel_size=2, stride=2)
        )
        self.conv = DoubleConv(2 + 3 if bilinear else 2 + 2, 2)
        self.outc = nn.Conv2d(2, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x2 = self.inc(x)
        x1 = self.up(self.down(x2))
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.outc(self.conv(x))


class FCN(nn.Module):
    """A fully convolutional network with a skip: scores are enlarged, cropped and added."""

    def __init__(self, n_class: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=5)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.conv2 = nn.Conv2d(2, 3, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.fc = nn.Conv2d(3, 4, 3)
        self.relu_fc = nn.ReLU(inplace=True)
        self.drop_fc = nn.Dropout2d()
        self.score_fr = nn.Conv2d(4, n_class, 1)
        self.score_pool1 = nn.Conv2d(2, n_class, 1)
        self.upscore2 = nn.ConvTranspose2d(n_class, n_class, 4, stride=2, bias=False)
        self.upscore = nn.ConvTranspose2d(n_class, n_class, 4, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pool1 = self.pool1(self.relu1(self.conv1(x)))
        h = self.pool2(self.relu2(self.conv2(pool1)))
        h = self.drop_fc(self.relu_fc(self.fc(h)))
        upscore2 = self.upscore2(self.score_fr(h))
        h = self.score_pool1(pool1 * 0.01)
        h = upscore2 + h[:, :, 1 : 1 + upscore2.size()[2], 1 : 1 + upscore2.size()[3]]
        h = self.upscore(h)
        return h[:, :, 2 : 2 + x.size()[2], 2 : 2 + x.size()[3]].contiguous()


class ASPPPooling(nn.Sequential):
    """The average of an image, spread over all places."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DeepLab(nn.Module):
    """A segmentation with dilated convolutions side by side and bilinear interpolation, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_norm(1, 2, 3, stride=2), conv_norm(2, 3, 3))
        dilated = nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True)
        )
        self.convs = nn.ModuleList([conv_norm(3, 2), dilated, ASPPPooling(3, 2)])
        self.project = nn.Sequential(conv_norm(6, 2), nn.Dropout(0.5))
        self.classifier = nn.Sequential(conv_norm(2, 3, 3), nn.Conv2d(3, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        x = self.backbone(x)
        x = self.project(torch.cat([conv(x) for conv in self.convs], dim=1))
        x = self.classifier(x)
        result = OrderedDict()
        result["out"] = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        return result


class FeaturePyramid(nn.Module):
    """A feature pyramid over three stages: lateral additions from the top down, all levels and a pool as outputs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 2, 3)
        self.body = nn.ModuleDict()
        inputs = 1
        for i, width in enumerate(widths):
            self.body[f"layer{i + 1}"] = nn.Sequential(nn.Conv2d(inputs, width, 3, 2, padding=1), nn.ReLU(inplace=True))
            inputs = width
        self.inner_blocks = nn.ModuleList([nn.Conv2d(width, 2, 1) for width in widths])
        self.layer_blocks = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1) for _ in widths])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = OrderedDict()
        for name, module in self.body.items():
            image = module(image)
            features[name] = image
        names = list(features.keys())
        x = list(features.values())

        last_inner = self.inner_blocks[-1](x[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(x) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](x[idx])
            feat_shape = inner_lateral.shape[-2:]
            inner_top_down = F.interpolate(last_inner, size=feat_shape, mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))

        names.append("pool")
        results.append(F.max_pool2d(results[-1], kernel_size=1, stride=2, padding=0))
        return OrderedDict(zip(names, results, strict=True))


class ESPCN(nn.Module):
    """Super-resolution by a shuffle of channels into places at the very end."""

    def __init__(self, upscale_factor: int = 2) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(1, 3, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(3, 3, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(3, 2, (3, 3), (1, 1), (1, 1))
        self.conv4 = nn.Conv2d(2, upscale_factor**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        return self.pixel_shuffle(self.conv4(x))


class SRBlock(nn.Module):
    """The residual block of a super-resolution ResNet."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(residual))


class SRResNet(nn.Module):
    """A super-resolution ResNet: PReLU, a long skip, and a shuffle of channels into places before the last layer."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.PReLU())
        self.block2 = SRBlock(channels, 3)
        self.block3 = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.upsample = nn.Sequential(
            nn.Conv2d(channels, channels * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(channels)
        )
        self.block4 = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        block1 = self.block1(x)
        block3 = self.block3(self.block2(block1))
        return (torch.tanh(self.block4(self.upsample(block1 + block3))) + 1) / 2


class ReflectedConv(nn.Module):
    """A convolution with reflection padding, after nearest upsampling if wanted."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, upsample: int | None = None) -> None:
        super().__init__()
        self.upsample = upsample
        self.reflection_pad = nn.ReflectionPad2d(kernel // 2)
        self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, mode="nearest", scale_factor=self.upsample)
        return self.conv2d(self.reflection_pad(x))


class StyleBlock(nn.Module):
    """The residual block of a style transfer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ReflectedConv(channels, channels, 3)
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.conv2 = ReflectedConv(channels, channels, 3)
        self.in2 = nn.InstanceNorm2d(channels, affine=True)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.in1(self.conv1(x)))
        out = self.in2(self.conv2(out))
        return out + residual


class StyleTransfer(nn.Module):
    """Fast style transfer: instance norms, a residual block, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ReflectedConv(1, 2, 3)
        self.in1 = nn.InstanceNorm2d(2, affine=True)
        self.conv2 = ReflectedConv(2, 3, 3, stride=2)
        self.in2 = nn.InstanceNorm2d(3, affine=True)
        self.res1 = StyleBlock(3)
        self.deconv1 = ReflectedConv(3, 2, 3, upsample=2)
        self.in4 = nn.InstanceNorm2d(2, affine=True)
        self.deconv2 = ReflectedConv(2, 1, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.res1(y)
        y = self.relu(self.in4(self.deconv1(y)))
        return self.deconv2(y)


class SpatialTransformer(nn.Module):
    """The spatial transformer network of the tutorials: the image is warped before it is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, kernel_size=3)
        self.conv2 = nn.Conv2d(2, 3, kernel_size=2)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(12, 4)
        self.fc2 = nn.Linear(4, 3)
        self.localization = nn.Sequential(
            nn.Conv2d(1, 2, kernel_size=3),
            nn.MaxPool2d(2, stride=2),
            nn.ReLU(True),
            nn.Conv2d(2, 2, kernel_size=2),
            nn.ReLU(True),
        )
        self.fc_loc = nn.Sequential(nn.Linear(2 * 2 * 2, 3), nn.ReLU(True), nn.Linear(3, 3 * 2))

    def stn(self, x: Tensor) -> Tensor:
        xs = self.localization(x)
        xs = xs.view(-1, 2 * 2 * 2)
        theta = torch.tanh(self.fc_loc(xs))
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stn(x)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(self.conv2_drop(self.conv2(x)))
        x = x.view(-1, 12)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


# ------------------------------------------------------------------------------------------- ConvNeXt and transformers


class LayerNorm2d(nn.Module):
    """Layer norm of the channels of an image, the first of its dimensions."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """The block of a ConvNeXt, its linear layers with the channels last."""

    def __init__(self, dim: int, hidden: int, activation: Activation, drop_path: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.norm(x)
        x = self.pwconv1(x)
        x = self.act(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return shortcut + self.drop_path(x)


class ConvNeXt(nn.Module):
    """A ConvNeXt of two stages."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, 3, kernel_size=2, stride=2), LayerNorm2d(3)),
                nn.Sequential(LayerNorm2d(3), nn.Conv2d(3, 4, kernel_size=2, stride=2)),
            ]
        )
        self.stages = nn.ModuleList(
            [ConvNeXtBlock(3, 6, activation, drop_path=0.0), ConvNeXtBlock(4, 5, activation, drop_path=0.2)]
        )
        self.norm = nn.LayerNorm(4, eps=1e-6)
        self.head = nn.Linear(4, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x.mean([-2, -1]))  # global average pooling, (N, C, H, W) -> (N, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class PoolFormerBlock(nn.Module):
    """The block of a PoolFormer: an average pool instead of attention, and layer scale."""

    def __init__(self, dim: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.norm2 = nn.GroupNorm(1, dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = activation()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop_path = DropPath(0.1)
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)

    def token_mixer(self, x: Tensor) -> Tensor:
        return self.pool(x) - x

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1.unsqueeze(-1).unsqueeze(-1) * self.token_mixer(self.norm1(x)))
        x = x + self.drop_path(self.layer_scale_2.unsqueeze(-1).unsqueeze(-1) * self.mlp(self.norm2(x)))
        return x


class PoolFormer(nn.Module):
    """A PoolFormer of one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 3, kernel_size=3, stride=2, padding=1)
        self.network = nn.Sequential(PoolFormerBlock(3, 5, nn.ReLU), PoolFormerBlock(3, 4, nn.GELU))
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.network(self.patch_embed(x)))
        return self.head(x.mean([-2, -1]))


class MixerBlock(nn.Module):
    """The block of an MLP-Mixer: one MLP across the patches, one across the channels."""

    def __init__(self, dim: int, seq_len: int, tokens_dim: int, channels_dim: int, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = Mlp(seq_len, tokens_dim, activation)
        self.drop_path = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim, channels_dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        x = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return x


class Mixer(nn.Module):
    """An MLP-Mixer."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(MixerBlock(4, 4, 3, 5, activation), MixerBlock(4, 4, 2, 4, activation))
        self.norm = nn.LayerNorm(4, eps=1e-6)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


class EncoderBlock(nn.Module):
    """The block of a vision transformer as in torchvision."""

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = Mlp(hidden_dim, mlp_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        torch._assert(tokens.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {tokens.shape}")
        x = self.ln_1(tokens)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x)
        x = x + tokens
        y = self.ln_2(x)
        y = self.mlp(y)
        return x + y


class VisionTransformer(nn.Module):
    """A vision transformer as in torchvision."""

    def __init__(self, hidden_dim: int = 4) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv_proj = nn.Conv2d(1, hidden_dim, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + 4, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.Sequential(EncoderBlock(2, hidden_dim, 6), EncoderBlock(2, hidden_dim, 5))
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, 2)))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.conv_proj(x)
        x = x.reshape(n, self.hidden_dim, -1)
        x = x.permute(0, 2, 1)
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = self.ln(self.layers(self.dropout(x + self.pos_embedding)))
        return self.heads(x[:, 0])


class Attention(nn.Module):
    """Attention as in timm: one layer makes queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, fused_attn: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused_attn
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        x = self.proj(x)
        return self.proj_drop(x)


class TimmBlock(nn.Module):
    """The block of a vision transformer as in timm, with layer scale."""

    def __init__(self, dim: int, num_heads: int, hidden: int, activation: Activation, fused_attn: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, fused_attn)
        self.ls1 = LayerScale(dim)
        self.drop_path1 = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, activation)
        self.ls2 = LayerScale(dim)
        self.drop_path2 = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class TimmTransformer(nn.Module):
    """A vision transformer as in timm, classified by the average of its patches."""

    def __init__(self, dim: int = 4, fused_attn: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 4, dim) * 0.02)
        self.blocks = nn.Sequential(
            TimmBlock(dim, 2, 5, nn.ReLU, fused_attn), TimmBlock(dim, 1, 6, nn.GELU, fused_attn)
        )
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        x = x[:, 1:].mean(dim=1)
        return self.head(self.fc_norm(x))


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """The windows of an image, each a sample of its own."""
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """The image of windows."""
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    """Attention within windows, with a bias for each relative position."""

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        coords = torch.stack(torch.meshgrid([torch.arange(window_size)] * 2, indexing="ij"))
        coords_flatten = torch.flatten(coords, 1)
        relative_coords = coords_flatten[:, :, None] - coords_flatten[:, None, :]
        relative_coords = relative_coords.permute(1, 2, 0).contiguous() + window_size - 1
        relative_coords[:, :, 0] *= 2 * window_size - 1
        self.register_buffer("relative_position_index", relative_coords.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        relative_position_bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        relative_position_bias = relative_position_bias.permute(2, 0, 1).contiguous()
        attn = attn + relative_position_bias.unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax(attn))
        x = (attn @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj_drop(self.proj(x))


class SwinBlock(nn.Module):
    """The block of a Swin transformer; every second one shifts its windows."""

    def __init__(
        self, dim: int, resolution: int, num_heads: int, window_size: int, shift_size: int, hidden: int, act: Activation
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.drop_path = DropPath(0.1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, act)
        attn_mask = None
        if shift_size > 0:
            img_mask = torch.zeros((1, resolution, resolution, 1))
            slices = (slice(0, -window_size), slice(-window_size, -shift_size), slice(-shift_size, None))
            cnt = 0
            for h in slices:
                for w in slices:
                    img_mask[:, h, w, :] = cnt
                    cnt += 1
            mask_windows = window_partition(img_mask, window_size).view(-1, window_size * window_size)
            attn_mask = mask_windows.unsqueeze(1) - mask_windows.unsqueeze(2)
            attn_mask = attn_mask.masked_fill(attn_mask != 0, -100.0).masked_fill(attn_mask == 0, 0.0)
        self.register_buffer("attn_mask", attn_mask)

    def forward(self, x: Tensor) -> Tensor:
        H = W = self.resolution
        B, _, C = x.shape
        shortcut = x
        x = self.norm1(x)
        x = x.view(B, H, W, C)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        x_windows = window_partition(x, self.window_size)
        x_windows = x_windows.view(-1, self.window_size * self.window_size, C)
        attn_windows = self.attn(x_windows, mask=self.attn_mask)
        attn_windows = attn_windows.view(-1, self.window_size, self.window_size, C)
        x = window_reverse(attn_windows, self.window_size, H, W)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        x = x.view(B, H * W, C)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbouring patches become one with more channels."""

    def __init__(self, resolution: int, dim: int, outputs: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.reduction = nn.Linear(4 * dim, outputs, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        x = x.view(B, self.resolution, self.resolution, C)
        x0 = x[:, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, :]
        x3 = x[:, 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1)
        x = x.view(B, -1, 4 * C)
        return self.reduction(self.norm(x))


class SwinTransformer(nn.Module):
    """A Swin transformer of one stage and a merging of patches."""

    def __init__(self, dim: int = 4, outputs: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.patch_norm = nn.LayerNorm(dim)
        self.pos_drop = nn.Dropout(p=0.1)
        self.blocks = nn.ModuleList(
            [SwinBlock(dim, 4, 2, 2, 0, hidden=4, act=nn.GELU), SwinBlock(dim, 4, 2, 2, 1, hidden=4, act=nn.ReLU)]
        )
        self.downsample = PatchMerging(4, dim, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.pos_drop(self.patch_norm(x))
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(self.downsample(x))
        x = self.avgpool(x.transpose(1, 2))
        return self.head(torch.flatten(x, 1))


VISION: list[Case] = [
    # Two convolutions and two hidden layers.
    Case("LeNet", LeNet, ((6, 1, 14, 14),), 2 + 3 + 4 + 3),
    # Three convolutions and two hidden layers.
    Case("AlexNet", alexnet, ((6, 1, 16, 16),), 2 + 3 + 2 + 4 + 3),
    # The gains of three norms and two hidden layers.
    Case("VGG with batch norm", lambda: vgg(2, "M", 3, 3, "M"), ((6, 1, 8, 8),), 2 + 3 + 3 + 4 + 3),
    # The last convolution is the output.
    Case("network in network", network_in_network, ((6, 1, 8, 8),), 3 + 2 + 4),
    Case(
        "CoordConv",
        lambda: Classifier(
            nn.Sequential(CoordConv(1, 3), nn.ReLU(), nn.MaxPool2d(2), CoordConv(3, 2, with_r=True), nn.ReLU()),
            nn.Linear(2, 2),
        ),
        ((6, 1, 6, 6),),
        3 + 2,
    ),
    # The stream of the stem, within two blocks, the stream after the projection.
    Case("ResNet, basic blocks", lambda: ResNet(BasicBlock, (2, 3), (1, 1)), ((6, 1, 8, 8),), 2 + 2 + 3 + 3),
    # The stem, the stream, twice within each of the two blocks.
    Case("ResNet, bottlenecks", lambda: ResNet(Bottleneck, (2,), (2,)), ((6, 1, 8, 8),), 2 + 4 + (2 + 2) + (2 + 2)),
    Case("ResNeXt", lambda: ResNet(Bottleneck, (2,), (1,), groups=2), ((6, 1, 8, 8),), 2 + 4 + (4 + 4)),
    # The norms at the beginning of the blocks hold the stream; each norm's output is free.
    Case("pre-activation ResNet", preact_resnet, ((6, 1, 6, 6),), (2 + 2) + (2 + 3) + 3),
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
    Case("normalizer-free ResNet", normalizer_free_resnet, ((6, 1, 6, 6),), 2 + (2 + 1 + 2) + (2 + 1 + 1) + 4),
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
    # The norms of each layer and of the transition, the last norm.
    Case("DenseNet-BC", DenseNet, ((6, 1, 8, 8),), (3 + 4) + (5 + 4) + 7 + 3),
    # The last convolution is the output.
    Case("SqueezeNet", SqueezeNet, ((6, 1, 9, 9),), 3 + (2 + 3 + 2) + (2 + 2 + 3)),
    # The stem, the four branches, the branch that narrows; pools pass on.
    Case("Inception", inception, ((6, 1, 9, 9),), 2 + 2 + (2 + 1 + 2) + (1 + 2) + 1 + 2),
    # The stem; in each block between the halves of its separable convolutions, after the first of these, and its
    # stream; the last separable convolution.
    Case("Xception", xception, ((6, 1, 7, 7),), 2 + (2 + 3 + 3 + 3) + (3 + 2 + 2 + 2) + (2 + 4)),
    Case("MobileNetV1", mobilenet_v1, ((6, 1, 6, 6),), 3 + (3 + 4) + (4 + 5)),
    # The linear bottlenecks; the residual keeps that of the first.
    Case("MobileNetV2", mobilenet_v2, ((3, 1, 12, 12),), 3 + 2),
    # ReLU and squeezed channels in the first block, ReLU in the second; its bottleneck; squeezed channels in the third.
    Case("MobileNetV3", mobilenet_v3, ((6, 1, 8, 8),), (2 + 2) + (4 + 4) + 3 + 2),
    # The linear bottlenecks.
    Case("EfficientNet", efficientnet, ((6, 1, 8, 8),), 3 + 2),
    # Each norm's output.
    Case("ShuffleNetV2", ShuffleNet, ((6, 1, 8, 8),), 2 + (2 + 2 + 3 * 2) + 3 * 2 + 3 * 2 + 5),
    # The stem's stream, within the first block; within the second, squeezed, its stream, within its shortcut.
    Case("GhostNet", ghostnet, ((6, 1, 6, 6),), 2 + 4 + (4 + 4 + 2 + 4 + 2)),
    Case("U-Net, bilinear", lambda: UNet(bilinear=True), ((2, 1, 5, 5),), (2 + 2) + (3 + 3) + (2 + 2)),
    # The channels out of the transposed convolution too.
    Case("U-Net, transposed", lambda: UNet(bilinear=False), ((2, 1, 5, 5),), (2 + 2) + (3 + 3) + 2 + (2 + 2)),
    # Three convolutions, the first scores, the sum of scores.
    Case("fully convolutional network", FCN, ((2, 1, 5, 5),), 2 + 3 + 4 + 2 + 2),
    # Two convolutions, three branches, the projection, the last hidden layer.
    Case("DeepLab", DeepLab, ((2, 1, 6, 6),), 2 + 3 + (2 + 2 + 2) + 2 + 3),
    # Three stages, and the channels of the pyramid.
    Case("feature pyramid", FeaturePyramid, ((1, 1, 12, 12),), 2 + 2 + 3 + 2),
    Case("ESPCN", ESPCN, ((2, 1, 4, 4),), 3 + 3 + 2),
    # The stream, within the residual block, the channels after the shuffle.
    Case("SRResNet", SRResNet, ((2, 1, 3, 3),), 2 + 3 + 2),
    # Two norms before the block, that within it, that after it. The biases before the norms never matter.
    Case("style transfer", StyleTransfer, ((1, 1, 8, 8),), 2 + 3 + 3 + 2),
    # The localisation's three layers and the classifier's three.
    Case("spatial transformer", SpatialTransformer, ((6, 1, 8, 8),), (2 + 2 + 3) + (2 + 3 + 4)),
    # For each block the norm's output and layer scale; the last norms of a stage.
    Case("ConvNeXt", lambda: ConvNeXt(nn.GELU), ((6, 1, 8, 8),), (3 + 3) + 3 + (4 + 4) + 4),
    # The hidden layers too.
    Case("ConvNeXt with ReLU", lambda: ConvNeXt(nn.ReLU), ((6, 1, 8, 8),), (3 + 6 + 3) + 3 + (4 + 5 + 4) + 4),
    # For each block the first norm up to its layer scale, the second norm, the layer scale after the MLP; the last
    # norm. The biases of the first norms never matter: the pool of a constant is the constant.
    Case("PoolFormer", PoolFormer, ((6, 1, 6, 6),), (3 + 3 + 5 + 3) + (3 + 3 + 3) + 3),
    # All channels share the weights across patches, so that the first norm of a block has one common scale. The biases
    # after those weights never matter: norms of the channels remove what they add.
    Case("MLP-Mixer", lambda: Mixer(nn.GELU), ((6, 1, 4, 4),), (1 + 4) + (1 + 4) + 4),
    Case("MLP-Mixer with ReLU", lambda: Mixer(nn.ReLU), ((6, 1, 4, 4),), (1 + 3 + 4 + 5) + (1 + 2 + 4 + 4) + 4),
    # For each block two norms, queries with keys, values; the last norm. The biases of the keys never matter.
    Case("vision transformer", VisionTransformer, ((6, 1, 4, 4),), 2 * (4 + 4 + 4 + 4) + 4),
    # Layer scale twice in each block, and a hidden layer with ReLU.
    Case("vision transformer of timm", TimmTransformer, ((6, 1, 4, 4),), 2 * (4 + 4 + 4 + 4 + 4 + 4) + 5 + 4),
    Case(
        "vision transformer of timm, attention by hand",
        lambda: TimmTransformer(fused_attn=False),
        ((6, 1, 4, 4),),
        2 * (4 + 4 + 4 + 4 + 4 + 4) + 5 + 4,
    ),
    # A hidden layer with ReLU in one of two blocks; the norm of merged patches, the last norm.
    Case("Swin transformer", SwinTransformer, ((6, 1, 8, 8),), 2 * (4 + 4 + 4 + 4) + 4 + 16 + 5),
]
