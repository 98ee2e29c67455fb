"""Kinds of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import Residual, RMSNorm, causal_mask, numbers
from tests.symmetry.zoo.sequence.llama import Rotary, apply_rotary


class SelfAttention(nn.Module):
    """Self-attention with one packed projection, as in timm; the queries and keys of a head may be normed."""

    def __init__(self, dim: int = 4, num_heads: int = 2, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` of one sequence or of two."""

    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        if key is None:
            return self.attn(query, query, query)[0]
        return self.attn(query, key, value, need_weights=False)[0]


class MultiQueryAttention(nn.Module):
    """One head of keys and values for all heads of queries, with einsum over bare parameters as in the paper."""

    def __init__(self, dim: int = 4, heads: int = 2, keys: int = 3, values: int = 2) -> None:
        super().__init__()
        self.w_q = nn.Parameter(torch.randn(heads, dim, keys))
        self.w_k = nn.Parameter(torch.randn(dim, keys))
        self.w_v = nn.Parameter(torch.randn(dim, values))
        self.w_o = nn.Parameter(torch.randn(heads, dim, values))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bnd,hdk->bhnk", x, self.w_q)
        k = torch.einsum("bmd,dk->bmk", x, self.w_k)
        v = torch.einsum("bmd,dv->bmv", x, self.w_v)
        logits = torch.einsum("bhnk,bmk->bhnm", q, k)
        weights = torch.softmax(logits + causal_mask(x), dim=-1)
        o = torch.einsum("bhnm,bmv->bhnv", weights, v)
        return torch.einsum("bhnv,hdv->bnd", o, self.w_o)


class AlibiAttention(nn.Module):
    """Causal attention with a penalty of distance that differs from head to head, in the manner of MPT and BLOOM."""

    def __init__(self, dim: int = 4, n_heads: int = 2, max_len: int = 8) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        slopes = torch.tensor([2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)])
        distance = torch.arange(max_len)[None, :] - torch.arange(max_len)[:, None]
        self.register_buffer("alibi", slopes[:, None, None] * distance)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        query, key, value = self.wqkv(x).chunk(3, dim=2)
        query = query.view(b, t, self.n_heads, -1).transpose(1, 2)
        key = key.view(b, t, self.n_heads, -1).permute(0, 2, 3, 1)
        value = value.view(b, t, self.n_heads, -1).transpose(1, 2)
        scores = query.matmul(key) / math.sqrt(d // self.n_heads)
        scores = scores + self.alibi[:, :t, :t] + causal_mask(x)
        context = torch.softmax(scores, dim=-1).matmul(value)
        return self.out_proj(context.transpose(1, 2).contiguous().view(b, t, d))


class LinearAttention(nn.Module):
    """Linear attention with the feature map elu + 1, keys and values first, as in fast-transformers."""

    def __init__(self, dim: int = 4, n_heads: int = 2) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.eps = 1e-6
        self.query_projection = nn.Linear(dim, dim)
        self.key_projection = nn.Linear(dim, dim)
        self.value_projection = nn.Linear(dim, dim)
        self.out_projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        queries = self.query_projection(x).view(n, length, self.n_heads, -1)
        keys = self.key_projection(x).view(n, length, self.n_heads, -1)
        values = self.value_projection(x).view(n, length, self.n_heads, -1)
        q, k = F.elu(queries) + 1, F.elu(keys) + 1
        kv = torch.einsum("nshd,nshm->nhmd", k, values)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + self.eps)
        v = torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z)
        return self.out_projection(v.contiguous().view(n, length, -1))


class LiteAttention(nn.Module):
    """Linear attention with ReLU whose normaliser is an additional value of one, as in EfficientViT."""

    def __init__(self, dim: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.eps = 1e-15
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        q, k, v = torch.chunk(qkv, 3, -1)
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 1), mode="constant", value=1)
        out = torch.matmul(q, torch.matmul(k.transpose(-1, -2), v))
        out = out[..., :-1] / (out[..., -1:] + self.eps)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class GatedAttentionUnit(nn.Module):
    """The gated attention unit: one projection for queries and keys, squared ReLU instead of the softmax, a gate."""

    def __init__(self, dim: int = 4, hidden_dim: int = 5, query_key_dim: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_hidden = nn.Sequential(nn.Linear(dim, hidden_dim * 2), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(dim, query_key_dim), nn.SiLU())
        self.gamma = nn.Parameter(torch.ones(2, query_key_dim))
        self.beta = nn.Parameter(torch.zeros(2, query_key_dim))
        self.to_out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        v, gate = self.to_hidden(normed).chunk(2, dim=-1)
        qk = self.to_qk(normed)
        q, k = (torch.einsum("...d,hd->...hd", qk, self.gamma) + self.beta).unbind(dim=-2)
        sim = torch.einsum("bid,bjd->bij", q, k) / x.shape[1]
        out = torch.einsum("bij,bjd->bid", F.relu(sim) ** 2, v)
        return self.to_out(out * gate) + x


class LatentAttention(nn.Module):
    """Keys and values from a common narrow projection with a norm, and rotary keys shared by all heads: DeepSeek."""

    def __init__(
        self, dim: int = 4, heads: int = 2, nope: int = 2, rope: int = 4, v_dim: int = 2, rank: int = 3
    ) -> None:
        super().__init__()
        self.num_heads, self.nope, self.rope, self.v_dim, self.rank = heads, nope, rope, v_dim, rank
        self.input_layernorm = RMSNorm(dim)
        self.q_proj = nn.Linear(dim, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(rank)
        self.kv_b_proj = nn.Linear(rank, heads * (nope + v_dim), bias=False)
        self.o_proj = nn.Linear(heads * v_dim, dim, bias=False)
        self.rotary_emb = Rotary(rope)

    def forward(self, x: Tensor) -> Tensor:
        residual, x = x, self.input_layernorm(x)
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.nope + self.rope).transpose(1, 2)
        q_nope, q_pe = torch.split(q, [self.nope, self.rope], dim=-1)
        compressed_kv, k_pe = torch.split(self.kv_a_proj_with_mqa(x), [self.rank, self.rope], dim=-1)
        k_pe = k_pe.view(b, t, 1, self.rope).transpose(1, 2)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed_kv))
        kv = kv.view(b, t, self.num_heads, self.nope + self.v_dim).transpose(1, 2)
        k_nope, value = torch.split(kv, [self.nope, self.v_dim], dim=-1)
        cos, sin = self.rotary_emb(x)
        q_pe, k_pe = apply_rotary(self._interleave(q_pe), self._interleave(k_pe), cos, sin)
        query = k_pe.new_empty(b, self.num_heads, t, self.nope + self.rope)
        query[:, :, :, : self.nope] = q_nope
        query[:, :, :, self.nope :] = q_pe
        key = torch.cat([k_nope, k_pe.expand(-1, self.num_heads, -1, -1)], dim=-1)
        scores = torch.matmul(query, key.transpose(2, 3)) * (self.nope + self.rope) ** -0.5 + causal_mask(x)
        attn = F.softmax(scores, dim=-1).to(query.dtype)
        out = torch.matmul(attn, value).transpose(1, 2).contiguous()
        return residual + self.o_proj(out.reshape(b, t, self.num_heads * self.v_dim))

    @staticmethod
    def _interleave(x: Tensor) -> Tensor:
        b, h, s, d = x.shape
        return x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)


# In attention, "queries" are the channels of a head in which queries and keys meet; "values" pass to the output.
ATTENTION: list[Case] = [
    # norm + queries + values
    Case(
        "pre-norm self-attention",
        lambda: Residual(4, SelfAttention()),
        ((2, 4, 4),),
        4 + 4 + 4,
        good_for=Use.PRODUCTS | Use.FAST,
    ),
    # queries + values
    Case("multi-head self-attention", TorchAttention, (), 4 + 4, sample=numbers((3, 4, 4))),
    # queries + values, with the additional key among the keys and the additional value among the values
    Case(
        "multi-head cross attention",
        lambda: TorchAttention(kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True),
        (),
        4 + 4,
        sample=numbers((3, 3, 4), (3, 4, 3), (3, 4, 5)),
        good_for=Use.FAST,
    ),
    # norm + queries + values, for the one head of keys and values
    Case("multi-query attention", lambda: Residual(4, MultiQueryAttention()), ((2, 4, 4),), 4 + 3 + 2),
    # norm + gains of queries against gains of keys, the same for both heads + values
    Case("layer norms of queries and keys", lambda: Residual(4, SelfAttention(qk_norm=True)), ((2, 4, 4),), 4 + 2 + 4),
    # norm + queries + values
    Case("alibi", lambda: Residual(4, AlibiAttention()), ((2, 4, 4),), 4 + 4 + 4),
    # norm + values; elu + 1 is not homogeneous
    Case("linear attention with elu", lambda: Residual(4, LinearAttention()), ((2, 4, 4),), 4 + 4),
    # norm + queries + values; epsilon pins the scale of the normaliser
    Case(
        "linear attention with relu",
        lambda: Residual(4, LiteAttention()),
        ((2, 4, 4),),
        4 + 4 + 4,
        good_for=Use.PRODUCTS,
    ),
    # norm + gains and offsets of queries against those of keys + all of the attention against the output layer
    Case("gated attention unit", GatedAttentionUnit, (), 4 + 3 + 1, sample=numbers((2, 4, 4))),
    # norm + norm of the narrow projection + queries + pairs that rotate, the same for both heads + values
    Case("latent attention", LatentAttention, ((2, 4, 4),), 4 + 3 + 4 + 2 + 4),
]
