"""Images out of images, and detection."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import conv_norm


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


IMAGES: list[Case] = [
    Case(
        "U-Net, bilinear", lambda: UNet(bilinear=True), ((2, 1, 5, 5),), (2 + 2) + (3 + 3) + (2 + 2), good_for=Use.PATHS
    ),
    # The channels out of the transposed convolution too.
    Case(
        "U-Net, transposed",
        lambda: UNet(bilinear=False),
        ((2, 1, 5, 5),),
        (2 + 2) + (3 + 3) + 2 + (2 + 2),
        good_for=Use.PATHS | Use.SHARDS | Use.FAST,
    ),
    # Three convolutions, the first scores, the sum of scores.
    Case("fully convolutional network", FCN, ((2, 1, 5, 5),), 2 + 3 + 4 + 2 + 2, good_for=Use.PATHS),
    # Two convolutions, three branches, the projection, the last hidden layer.
    Case("DeepLab", DeepLab, ((2, 1, 6, 6),), 2 + 3 + (2 + 2 + 2) + 2 + 3, good_for=Use.PATHS),
    # Three stages, and the channels of the pyramid.
    Case("feature pyramid", FeaturePyramid, ((1, 1, 12, 12),), 2 + 2 + 3 + 2, good_for=Use.PATHS),
    Case("ESPCN", ESPCN, ((2, 1, 4, 4),), 3 + 3 + 2, good_for=Use.PATHS),
    # The stream, within the residual block, the channels after the shuffle.
    Case("SRResNet", SRResNet, ((2, 1, 3, 3),), 2 + 3 + 2),
    # Two norms before the block, that within it, that after it. The biases before the norms never matter.
    Case("style transfer", StyleTransfer, ((1, 1, 8, 8),), 2 + 3 + 3 + 2, good_for=Use.FAST),
    # The localisation's three layers and the classifier's three.
    Case("spatial transformer", SpatialTransformer, ((6, 1, 8, 8),), (2 + 2 + 3) + (2 + 3 + 4)),
]
