"""ConvNeXt and transformers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.vision.bricks import Activation, DropPath, LayerScale, Mlp


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


TRANSFORMERS: list[Case] = [
    # For each block the norm's output and layer scale; the last norms of a stage.
    Case("ConvNeXt", lambda: ConvNeXt(nn.GELU), ((6, 1, 8, 8),), (3 + 3) + 3 + (4 + 4) + 4),
    # The hidden layers too.
    Case(
        "ConvNeXt with ReLU",
        lambda: ConvNeXt(nn.ReLU),
        ((6, 1, 8, 8),),
        (3 + 6 + 3) + 3 + (4 + 5 + 4) + 4,
        good_for=Use.FAST,
    ),
    # For each block the first norm up to its layer scale, the second norm, the layer scale after the MLP; the last
    # norm. The biases of the first norms never matter: the pool of a constant is the constant.
    Case("PoolFormer", PoolFormer, ((6, 1, 6, 6),), (3 + 3 + 5 + 3) + (3 + 3 + 3) + 3),
    # All channels share the weights across patches, so that the first norm of a block has one common scale. The biases
    # after those weights never matter: norms of the channels remove what they add.
    Case("MLP-Mixer", lambda: Mixer(nn.GELU), ((6, 1, 4, 4),), (1 + 4) + (1 + 4) + 4),
    Case(
        "MLP-Mixer with ReLU",
        lambda: Mixer(nn.ReLU),
        ((6, 1, 4, 4),),
        (1 + 3 + 4 + 5) + (1 + 2 + 4 + 4) + 4,
        good_for=Use.PRODUCTS,
    ),
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
