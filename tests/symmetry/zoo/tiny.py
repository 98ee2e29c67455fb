"""Networks small enough that their freedoms can be counted without any knowledge of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, norm_cnn, plain_cnn
from tests.symmetry.zoo.case import Case, Use


class Function(nn.Module):
    """Modules and parameters, called the way a function says."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class OptionA(nn.Module):
    """A residual block that narrows the image and widens the stream without any parameters in the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1 = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
        return self.head(x.mean((2, 3)))


class SmallResNet(nn.Module):
    """Batch norm, an identity block and a block with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (2, 3, 2, 2, 3, 3)])
        widths = ((2, 3), (3, 2), (2, 2), (2, 3), (2, 3))
        self.convs = nn.ModuleList([nn.Conv2d(i, o, 1, bias=False) for i, o in widths])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        y = F.relu_(self.norms[1](self.convs[0](x)))
        x = F.relu(self.norms[2](self.convs[1](y)) + x)
        y = F.relu(self.norms[3](self.convs[2](x)))
        x = F.relu(self.norms[4](self.convs[3](y)) + self.norms[5](self.convs[4](x)))
        return self.head(x.mean((2, 3)))


def _siamese(join: Callable[[Tensor, Tensor], Tensor], features: int) -> Function:
    def forward(m: Function, a: Tensor, b: Tensor) -> Tensor:
        return m.head(join(F.relu(m.branch(a)), F.relu(m.branch(b))))

    return Function(forward, branch=nn.Linear(3, 4), head=nn.Linear(features, 2))


def _between(op: Callable[[Tensor], Tensor]) -> Function:
    return Function(lambda m, x: m.two(op(m.one(x))), one=nn.Linear(3, 4), two=nn.Linear(4, 2))


def _conv_net(dimensions: int, pool: nn.Module, groups: int = 1) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return nn.Sequential(
        conv(2, 4, 2),
        nn.ReLU(),
        pool,
        conv(4, 2 * groups, 1, groups=groups),
        nn.ReLU(),
        nn.Flatten(2),
        Mean(),
        nn.Linear(2 * groups, 2),
    )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def _dense() -> Function:
    def forward(m: Function, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        x = torch.cat([x, F.relu(m.one(x))], 1)
        x = torch.cat([x, F.relu(m.two(x))], 1)
        return m.head(x)

    return Function(forward, stem=nn.Linear(2, 3), one=nn.Linear(3, 2), two=nn.Linear(5, 2), head=nn.Linear(7, 2))


TINY = [
    Case("prelu mlp", lambda: mlp(6, 7, 9, 4, activation=nn.PReLU), ((4, 6),), 16, good_for=Use.PATHS),
    Case("residual mlp", ResidualMLP, ((8, 3),), 9, good_for=Use.PATHS),
    Case("unequal widths", lambda: mlp(3, 6, 2, 5, 2), ((8, 3),), 13, good_for=Use.PATHS),
    Case("no biases", lambda: mlp(3, 4, 5, 2, bias=False), ((8, 3),), 9, good_for=Use.PATHS),
    Case("one wide", lambda: mlp(2, 1, 1, 1), ((8, 2),), 2, good_for=Use.PATHS),
    Case("leaky relu", lambda: mlp(3, 5, 4, 2, activation=nn.LeakyReLU), ((8, 3),), 9, good_for=Use.PATHS),
    Case("relu squeezed between tanh", lambda: nn.Sequential(*mlp(3, 4, 4), nn.Tanh(), *mlp(4, 3, 2)), ((8, 3),), 7),
    Case("gelu", lambda: mlp(3, 5, 2, activation=nn.GELU), ((8, 3),), 0),
    Case("no activation", lambda: mlp(3, 4, 2, activation=nn.Identity), ((8, 3),), 4, good_for=Use.PATHS),
    Case(
        "conv, batch norm",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        ((6, 1, 4, 4),),
        4,
        good_for=Use.PATHS,
    ),
    Case(
        "linear, batch norm",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
        ((8, 3),),
        4,
        good_for=Use.PATHS,
    ),
    Case(
        "batch norm without gains",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2)),
        ((8, 3),),
        0,
        good_for=Use.PATHS,
    ),
    Case(
        "layer norm",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, eps=0.1), nn.ReLU(), nn.Linear(4, 2)),
        ((8, 3),),
        4,
    ),
    Case(
        "group norm",
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4, eps=0.1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
        ),
        ((8, 2, 3),),
        4,
    ),
    Case("conv1d", lambda: _conv_net(1, nn.MaxPool1d(2)), ((8, 2, 5),), 6, good_for=Use.PATHS),
    Case("conv2d", lambda: _conv_net(2, nn.AvgPool2d(2, padding=1)), ((6, 2, 4, 4),), 6, good_for=Use.PATHS),
    Case("conv3d", lambda: _conv_net(3, nn.MaxPool3d(2)), ((6, 2, 3, 3, 3),), 6, good_for=Use.PATHS),
    Case("adaptive average", lambda: _conv_net(2, nn.AdaptiveAvgPool2d(2)), ((6, 2, 4, 4),), 6, good_for=Use.PATHS),
    Case("adaptive maximum", lambda: _conv_net(1, nn.AdaptiveMaxPool1d(2)), ((8, 2, 5),), 6, good_for=Use.PATHS),
    Case("grouped conv", lambda: _conv_net(1, nn.Identity(), groups=2), ((8, 2, 4),), 8, good_for=Use.PATHS),
    Case("depthwise conv", lambda: _conv_net(1, nn.Identity(), groups=4), ((8, 2, 4),), 12, good_for=Use.PATHS),
    Case(
        "transposed conv",
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.ReLU(), nn.ConvTranspose1d(3, 2, 2, stride=2)),
        ((6, 2, 3),),
        3,
        good_for=Use.PATHS,
    ),
    Case(
        "grouped transposed conv",
        lambda: nn.Sequential(
            nn.Conv1d(1, 4, 2),
            nn.ReLU(),
            nn.ConvTranspose1d(4, 6, 2, groups=2),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 2, 1, groups=2),
        ),
        ((8, 1, 3),),
        10,
        good_for=Use.PATHS | Use.SHARDS | Use.FOUR_SHARDS,
    ),
    Case(
        "flattened image",
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)),
        ((6, 1, 5, 5),),
        3,
        good_for=Use.PATHS,
    ),
    Case("concatenation", _dense, ((8, 2),), 7, good_for=Use.PATHS),
    Case("resnet", SmallResNet, ((4, 1, 3, 3),), 2 + 3 + 2 + 3, good_for=Use.PATHS),
    Case("option A", OptionA, ((6, 1, 4, 4),), 2 + 3 + 2, good_for=Use.PATHS),
    Case(
        "siamese, concatenated",
        lambda: _siamese(lambda a, b: torch.cat([a, b], 1), 8),
        ((8, 3), (8, 3)),
        4,
        good_for=Use.PATHS,
    ),
    Case("siamese, subtracted", lambda: _siamese(torch.sub, 4), ((8, 3), (8, 3)), 4, good_for=Use.PATHS),
    Case(
        "written by hand",
        lambda: Function(
            lambda m, x: torch.relu(x @ m.w + m.b) @ m.v + m.c,
            w=torch.zeros(3, 4),
            b=torch.zeros(4),
            v=torch.zeros(4, 2),
            c=torch.zeros(2),
        ),
        ((8, 3),),
        4,
        good_for=Use.PATHS,
    ),
    Case("relu in place", lambda: _between(F.relu_), ((8, 3),), 4, good_for=Use.PATHS),
    Case("leaky relu by where", lambda: _between(lambda x: torch.where(x > 0, x, 0.1 * x)), ((8, 3),), 4),
    Case("relu by clamp", lambda: _between(lambda x: x.clamp(min=0)), ((8, 3),), 4, good_for=Use.PATHS),
    Case("relu6", lambda: _between(F.relu6), ((8, 3),), 0),
    Case("glu by halves", lambda: _between(lambda x: torch.cat([x[:, :2] * x[:, 2:].sigmoid()] * 2, 1)), ((8, 3),), 2),
    Case(
        "gated layer",
        lambda: Function(
            lambda m, x: m.head(m.gate(x).sigmoid() * m.value(x)),
            gate=nn.Linear(3, 4),
            value=nn.Linear(3, 4),
            head=nn.Linear(4, 2),
        ),
        ((8, 3),),
        4,
    ),
    Case(
        "channel gains",
        lambda: Function(
            lambda m, x: m.head(F.relu(m.stem(x)) * m.gain),
            stem=nn.Linear(3, 4),
            gain=torch.zeros(4),
            head=nn.Linear(4, 2),
        ),
        ((8, 3),),
        8,
        good_for=Use.PATHS,
    ),
    # The frozen matrix mixes all channels, so that on either side only one common scale is left, and it passes through.
    Case("frozen weight", lambda: mlp(3, 4, 5, 2, bias=False), ((8, 3),), 1, ("2.weight",), good_for=Use.PATHS),
    Case("frozen layer", lambda: mlp(3, 4, 5, 2), ((8, 3),), 0, ("2.weight", "2.bias"), good_for=Use.PATHS),
    Case("frozen weight, free bias", lambda: mlp(3, 4, 5, 2), ((8, 3),), 1, ("2.weight",), good_for=Use.PATHS),
    Case(
        "frozen first layer",
        lambda: mlp(3, 4, 5, 2),
        ((8, 3),),
        5,
        ("0.weight", "0.bias"),
        good_for=Use.PATHS | Use.SHARDS,
    ),
    Case("frozen bias", lambda: mlp(3, 4, 5, 2), ((8, 3),), 4, ("2.bias",), good_for=Use.PATHS),
    Case(
        "frozen grouped conv",
        lambda: nn.Sequential(
            nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2, bias=False), nn.ReLU(), nn.Conv1d(4, 2, 2)
        ),
        ((8, 1, 4),),
        2,
        ("2.weight",),
        good_for=Use.PATHS,
    ),
    Case(
        "skip from the input",
        lambda: Function(
            lambda m, x: m.head(F.relu(x + m.down(F.relu(m.up(x))))),
            up=nn.Linear(3, 5),
            down=nn.Linear(5, 3),
            head=nn.Linear(3, 2),
        ),
        ((8, 3),),
        5,
        good_for=Use.PATHS,
    ),
    Case(
        "layer of its own output",
        lambda: Function(
            lambda m, x: m.head(F.relu(m.same(F.relu(m.same(F.relu(m.stem(x))))))),
            stem=nn.Linear(2, 3),
            same=nn.Linear(3, 3),
            head=nn.Linear(3, 2),
        ),
        ((8, 2),),
        3,
        good_for=Use.PATHS | Use.SHARDS,
    ),
]

SHARED = [
    Case("ResidualMLP", ResidualMLP, ((8, 3),), 9, good_for=Use.FAST | Use.PATHS),
    Case("ResNet", ResNet, ((3, 1, 6, 6),), 3 + 3 + 4 + 4, good_for=Use.FAST | Use.PATHS | Use.SHARDS),
    Case("DenseNet", DenseNet, ((3, 1, 5, 5),), 7, good_for=Use.FAST | Use.PATHS),
    Case("mlp", lambda: mlp(3, 5, 4, 2), ((8, 3),), 9, good_for=Use.FAST | Use.PATHS | Use.SHARDS | Use.FOUR_SHARDS),
    Case("plain_cnn", plain_cnn, ((3, 1, 8, 8),), 10, good_for=Use.FAST | Use.PATHS),
    Case("norm_cnn", norm_cnn, ((4, 1, 8, 8),), 9, good_for=Use.FAST | Use.PATHS),
]
