"""Networks of sequences and sets: attention, recurrence, causal convolution, embeddings, experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Sample

# Inputs


def tokens(*shapes: tuple[int, ...], vocabulary: int = 5) -> Sample:
    """Draws one tensor of tokens for each shape."""
    return lambda generator, size: tuple(torch.randint(0, vocabulary, shape, generator=generator) for shape in shapes)


def numbers(*shapes: tuple[int, ...], scale: float = 0.3) -> Sample:
    """Draws normally distributed numbers that are small enough to leave a softmax soft."""
    return lambda generator, size: tuple(
        scale * size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def bert_inputs(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Padded tokens, segments, and a mask that hides the padding."""
    mask = (torch.arange(4) < torch.randint(2, 5, (4, 1), generator=generator)).long()
    return torch.randint(1, 5, (4, 4), generator=generator) * mask, torch.tensor([0, 0, 1, 1]).expand(4, 4), mask


def sentences(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor]:
    """Padded sentences and their lengths."""
    lengths = torch.randint(1, 5, (6,), generator=generator)
    return torch.randint(1, 6, (6, 4), generator=generator) * (torch.arange(4) < lengths[:, None]), lengths


def bags(generator: torch.Generator, size: float) -> tuple[Tensor, Tensor]:
    """All words of all texts in a row, and where each text begins."""
    return torch.randint(0, 6, (12,), generator=generator), torch.tensor([0, 3, 5, 9])


# Bricks


class RMSNorm(nn.Module):
    """Root mean square norm as in Llama and T5: no mean, no bias."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class Residual(nn.Module):
    """What a function of the normed stream returns is added to the stream."""

    def __init__(self, dim: int, fn: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


def causal_mask(x: Tensor) -> Tensor:
    """What is added to the scores of the sequence in the second dimension."""
    length = x.shape[1]
    return torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)


# Attention


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


# Transformers of torch.nn


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` with a classifier of the first token."""

    def __init__(self, norm_first: bool, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, norm_first=norm_first, batch_first=True)
        norm = nn.LayerNorm(4) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class TorchDecoder(nn.Module):
    """`nn.TransformerDecoderLayer` with norms first and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 4, norm_first=True)

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:
        mask = torch.ones(len(tgt), len(tgt), dtype=torch.bool).triu(1)
        return self.layer(tgt, memory, tgt_mask=mask)


class PositionalEncoding(nn.Module):
    """Sines and cosines, added to the embeddings."""

    def __init__(self, d_model: int, max_len: int = 8) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[:, : x.size(1)].requires_grad_(False))


class TorchTranslator(nn.Module):
    """`nn.Transformer` between embeddings and a generator, as in the tutorial on translation."""

    def __init__(self, vocabulary: int = 5, d_model: int = 4) -> None:
        super().__init__()
        self.d_model = d_model
        self.transformer = nn.Transformer(d_model, 2, 1, 1, 3, batch_first=True)
        self.generator = nn.Linear(d_model, vocabulary)
        self.src_tok_emb = nn.Embedding(vocabulary, d_model)
        self.tgt_tok_emb = nn.Embedding(vocabulary, d_model)
        self.positional_encoding = PositionalEncoding(d_model)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src_emb = self.positional_encoding(self.src_tok_emb(src) * math.sqrt(self.d_model))
        tgt_emb = self.positional_encoding(self.tgt_tok_emb(tgt) * math.sqrt(self.d_model))
        tgt_mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), dtype=tgt_emb.dtype)
        return self.generator(self.transformer(src_emb, tgt_emb, tgt_mask=tgt_mask))


# The annotated transformer


def clones(module: nn.Module, count: int) -> nn.ModuleList:
    """Copies of a module."""
    return nn.ModuleList([copy.deepcopy(module) for _ in range(count)])


class AnnotatedLayerNorm(nn.Module):
    """A layer norm with the standard deviation of the sample, to which epsilon is added."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(features))
        self.b_2 = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class SublayerConnection(nn.Module):
    """A residual connection around a norm and a sublayer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = AnnotatedLayerNorm(size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class MultiHeadedAttention(nn.Module):
    """Attention with four cloned linear layers; it remembers its weights."""

    def __init__(self, h: int, d_model: int) -> None:
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.attn: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        self.attn = scores.softmax(dim=-1)
        x = torch.matmul(self.attn, value)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class PositionwiseFeedForward(nn.Module):
    """Two linear layers with a ReLU."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d_model, d_ff)
        self.w_2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.w_1(x).relu()))


class AnnotatedTransformer(nn.Module):
    """Encoder and decoder of the annotated transformer, one layer each."""

    def __init__(self, vocabulary: int = 5, size: int = 4) -> None:
        super().__init__()
        self.src_embed = nn.Embedding(vocabulary, size)
        self.tgt_embed = nn.Embedding(vocabulary, size)
        self.position = PositionalEncoding(size)
        self.self_attn = MultiHeadedAttention(2, size)
        self.feed_forward = PositionwiseFeedForward(size, 3)
        self.encoder_sublayer = clones(SublayerConnection(size), 2)
        self.encoder_norm = AnnotatedLayerNorm(size)
        self.tgt_attn, self.src_attn = MultiHeadedAttention(2, size), MultiHeadedAttention(2, size)
        self.tgt_feed_forward = PositionwiseFeedForward(size, 3)
        self.decoder_sublayer = clones(SublayerConnection(size), 3)
        self.decoder_norm = AnnotatedLayerNorm(size)
        self.proj = nn.Linear(size, vocabulary)

    def encode(self, src: Tensor) -> Tensor:
        x = self.position(self.src_embed(src) * math.sqrt(4))
        x = self.encoder_sublayer[0](x, lambda x: self.self_attn(x, x, x))
        return self.encoder_norm(self.encoder_sublayer[1](x, self.feed_forward))

    def decode(self, tgt: Tensor, m: Tensor, tgt_mask: Tensor) -> Tensor:
        x = self.position(self.tgt_embed(tgt) * math.sqrt(4))
        x = self.decoder_sublayer[0](x, lambda x: self.tgt_attn(x, x, x, tgt_mask))
        x = self.decoder_sublayer[1](x, lambda x: self.src_attn(x, m, m))
        return self.decoder_norm(self.decoder_sublayer[2](x, self.tgt_feed_forward))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        tgt_mask = torch.triu(torch.ones(1, tgt.size(1), tgt.size(1)), diagonal=1).type(torch.uint8) == 0
        return F.log_softmax(self.proj(self.decode(tgt, self.encode(src), tgt_mask)), dim=-1)


# BERT


class BertEmbeddings(nn.Module):
    """Embeddings of words, positions and segments, added and normed."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(5, hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(4, hidden_size)
        self.token_type_embeddings = nn.Embedding(2, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(4).expand((1, -1)), persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        embeddings += self.position_embeddings(self.position_ids[:, : input_ids.size(1)])
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    """Attention with three projections and an additive mask."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, hidden_size // heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        attention_scores = torch.matmul(query_layer, key_layer.transpose(-1, -2)) / math.sqrt(self.head_size)
        attention_probs = self.dropout(nn.functional.softmax(attention_scores + attention_mask, dim=-1))
        context_layer = torch.matmul(attention_probs, value_layer).permute(0, 2, 1, 3).contiguous()
        return context_layer.view(*context_layer.size()[:-2], self.heads * self.head_size)


class BertOutput(nn.Module):
    """A linear layer, the residual connection, and the norm behind it."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Bert(nn.Module):
    """BERT with one layer, its pooler and a classifier."""

    def __init__(self, hidden_size: int = 4, intermediate_size: int = 5) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(hidden_size)
        self.attention = BertSelfAttention(hidden_size, 2)
        self.attention_output = BertOutput(hidden_size, hidden_size)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = BertOutput(intermediate_size, hidden_size)
        self.pooler = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, 2)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        extended_attention_mask = attention_mask[:, None, None, :].to(dtype=x.dtype)
        extended_attention_mask = (1.0 - extended_attention_mask) * torch.finfo(x.dtype).min
        x = self.attention_output(self.attention(x, extended_attention_mask), x)
        x = self.output(F.gelu(self.intermediate(x)), x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


# GPT


class CausalSelfAttention(nn.Module):
    """nanoGPT's attention, by hand or with the fused function."""

    def __init__(self, n_embd: int, n_head: int, block_size: int, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.1)
        self.n_embd, self.n_head, self.flash = n_embd, n_head, flash
        if not flash:
            mask = torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
            self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class SquaredReLU(nn.Module):
    """The square of the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class GPTBlock(nn.Module):
    """Attention and two linear layers, each behind a norm and beside the stream."""

    def __init__(self, n_embd: int, block_size: int, hidden: int, activation: nn.Module, flash: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, 2, block_size, flash)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, hidden), activation, nn.Linear(hidden, n_embd), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT: the token embedding and the output layer are one parameter."""

    def __init__(self, layers: int, hidden: int, activation: nn.Module, flash: bool = False) -> None:
        super().__init__()
        vocabulary, n_embd, block_size = 5, 4, 4
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([GPTBlock(n_embd, block_size, hidden, activation, flash) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class GPTJ(nn.Module):
    """GPT-J: attention and feed-forward beside each other behind one norm, rotation of a part of each head."""

    def __init__(self, n_embd: int = 4, heads: int = 2, head_dim: int = 4, rotary_dim: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rotary_dim = heads, head_dim, rotary_dim
        self.wte = nn.Embedding(5, n_embd)
        self.ln_1 = nn.LayerNorm(n_embd)
        self.k_proj = nn.Linear(n_embd, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, heads * head_dim, bias=False)
        self.q_proj = nn.Linear(n_embd, heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, n_embd, bias=False)
        self.fc_in = nn.Linear(n_embd, 5)
        self.fc_out = nn.Linear(5, n_embd)
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, 5)
        angles = torch.arange(4)[:, None] / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
        self.register_buffer("embed_positions", torch.cat((angles.sin(), angles.cos()), dim=1))

    def _rotate(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        sin = torch.repeat_interleave(sin[None, :, None, :], 2, 3)
        cos = torch.repeat_interleave(cos[None, :, None, :], 2, 3)
        every_two = torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)
        return x * cos + every_two * sin

    def attention(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.heads, self.head_dim)
        query, key, value = self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)
        sin, cos = torch.split(self.embed_positions[: x.size(1)], self.rotary_dim // 2, dim=-1)
        k_rot, k_pass = key[..., : self.rotary_dim], key[..., self.rotary_dim :]
        q_rot, q_pass = query[..., : self.rotary_dim], query[..., self.rotary_dim :]
        key = torch.cat([self._rotate(k_rot, sin, cos), k_pass], dim=-1).permute(0, 2, 1, 3)
        query = torch.cat([self._rotate(q_rot, sin, cos), q_pass], dim=-1).permute(0, 2, 1, 3)
        weights = torch.matmul(query, key.transpose(-1, -2))
        mask = torch.tril(torch.ones(x.size(1), x.size(1), dtype=torch.bool))
        weights = torch.where(mask, weights, torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype))
        weights = F.softmax(weights / math.sqrt(self.head_dim), dim=-1).to(value.dtype)
        out = torch.matmul(weights, value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).contiguous()
        return self.out_proj(out.view(*x.size()[:-1], self.heads * self.head_dim))

    def forward(self, idx: Tensor) -> Tensor:
        residual = self.wte(idx)
        x = self.ln_1(residual)
        x = self.attention(x) + self.fc_out(F.gelu(self.fc_in(x), approximate="tanh")) + residual
        return self.lm_head(self.ln_f(x))


# Llama


class Rotary(nn.Module):
    """Cosines and sines of the positions, for halves of a head."""

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        freqs = torch.outer(torch.arange(x.shape[1]).to(self.inv_freq.dtype), self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """The second half of each head, negative, before the first."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned by the angle of their position."""
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    """Keys or values, repeated for all queries of their group."""
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


class LlamaAttention(nn.Module):
    """Rotary attention with grouped heads as in transformers; Qwen3 norms queries and keys."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim, self.groups = head_dim, heads // kv_heads
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        input_shape = x.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(x).view(hidden_shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(x).view(hidden_shape)).transpose(1, 2)
        value_states = self.v_proj(x).view(hidden_shape).transpose(1, 2)
        query_states, key_states = apply_rotary(query_states, key_states, *position_embeddings)
        key_states, value_states = repeat_kv(key_states, self.groups), repeat_kv(value_states, self.groups)
        attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) * self.head_dim**-0.5
        attn_weights = F.softmax(attn_weights + causal_mask(x), dim=-1).to(query_states.dtype)
        attn_output = torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())


class LlamaMLP(nn.Module):
    """A feed-forward layer with a gate."""

    def __init__(self, dim: int, hidden: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Llama(nn.Module):
    """Llama of one layer, as in transformers."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor] = F.silu, kv_heads: int = 1, qk_norm: bool = False) -> None:
        super().__init__()
        dim, heads, head_dim = 4, 2, 4
        self.embed_tokens = nn.Embedding(5, dim)
        self.rotary_emb = Rotary(head_dim)
        self.input_layernorm = RMSNorm(dim)
        self.self_attn = LlamaAttention(dim, heads, kv_heads, head_dim, qk_norm)
        self.post_attention_layernorm = RMSNorm(dim)
        self.mlp = LlamaMLP(dim, 5, act_fn)
        self.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, 5, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        x = x + self.self_attn(self.input_layernorm(x), self.rotary_emb(x))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return self.lm_head(self.norm(x))


class ComplexLlama(nn.Module):
    """Llama of one layer as first published: neighbours in a head are the parts of a complex number that rotates."""

    def __init__(self, dim: int = 4, n_heads: int = 2, n_kv_heads: int = 1, head_dim: int = 4) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.tok_embeddings = nn.Embedding(5, dim)
        self.attention_norm = RMSNorm(dim)
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.w1 = nn.Linear(dim, 5, bias=False)
        self.w2 = nn.Linear(5, dim, bias=False)
        self.w3 = nn.Linear(dim, 5, bias=False)
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, 5, bias=False)
        freqs = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        freqs = torch.outer(torch.arange(8, dtype=torch.float64), freqs)
        self.freqs_cis = torch.polar(torch.ones_like(freqs), freqs)

    @staticmethod
    def _rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
        x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x_ * freqs_cis[None, :, None, :]).flatten(3).type_as(x)

    def attention(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk = self._rotate(xq, freqs_cis), self._rotate(xk, freqs_cis)
        keys = torch.repeat_interleave(xk, dim=2, repeats=self.n_heads // self.n_kv_heads).transpose(1, 2)
        values = torch.repeat_interleave(xv, dim=2, repeats=self.n_heads // self.n_kv_heads).transpose(1, 2)
        scores = torch.matmul(xq.transpose(1, 2), keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = F.softmax(scores + mask, dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        seqlen = tokens.shape[1]
        mask = torch.triu(torch.full((seqlen, seqlen), float("-inf")), diagonal=1).type_as(h)
        h = h + self.attention(self.attention_norm(h), self.freqs_cis[:seqlen], mask)
        x = self.ffn_norm(h)
        h = h + self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.output(self.norm(h))


# T5


class T5Attention(nn.Module):
    """Attention without biases or scale; the bias of the scores is embedded from the bucket of the distance."""

    def __init__(self, d_model: int, d_kv: int, n_heads: int, relative: bool, bidirectional: bool) -> None:
        super().__init__()
        self.n_heads, self.d_kv, self.bidirectional = n_heads, d_kv, bidirectional
        self.num_buckets, self.max_distance = 4, 4
        self.q = nn.Linear(d_model, n_heads * d_kv, bias=False)
        self.k = nn.Linear(d_model, n_heads * d_kv, bias=False)
        self.v = nn.Linear(d_model, n_heads * d_kv, bias=False)
        self.o = nn.Linear(n_heads * d_kv, d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(self.num_buckets, n_heads) if relative else None

    def _bucket(self, relative_position: Tensor) -> Tensor:
        relative_buckets, num_buckets = torch.zeros_like(relative_position), self.num_buckets
        if self.bidirectional:
            num_buckets //= 2
            relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
            relative_position = torch.abs(relative_position)
        else:
            relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
        max_exact = num_buckets // 2
        is_small = relative_position < max_exact
        log_ratio = torch.log(relative_position.double() / max_exact) / math.log(self.max_distance / max_exact)
        large = max_exact + (log_ratio * (num_buckets - max_exact)).clamp(min=0).to(torch.long)
        large = torch.min(large, torch.full_like(large, num_buckets - 1))
        return relative_buckets + torch.where(is_small, relative_position, large)

    def compute_bias(self, length: int) -> Tensor:
        context_position = torch.arange(length, dtype=torch.long)[:, None]
        memory_position = torch.arange(length, dtype=torch.long)[None, :]
        values = self.relative_attention_bias(self._bucket(memory_position - context_position))
        return values.permute([2, 0, 1]).unsqueeze(0)

    def forward(self, hidden_states: Tensor, key_value_states: Tensor | None = None) -> Tensor:
        batch, length = hidden_states.shape[:2]
        states = hidden_states if key_value_states is None else key_value_states
        query_states = self.q(hidden_states).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        key_states = self.k(states).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        value_states = self.v(states).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        scores = torch.matmul(query_states, key_states.transpose(3, 2))
        if self.relative_attention_bias is not None:
            position_bias = self.compute_bias(length)
            if not self.bidirectional:
                position_bias = position_bias + causal_mask(hidden_states)
            scores += position_bias
        attn_weights = nn.functional.softmax(scores, dim=-1).type_as(scores)
        attn_output = torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()
        return self.o(attn_output.view(batch, -1, self.n_heads * self.d_kv))


class T5Block(nn.Module):
    """Self-attention, cross attention in the decoder, and a feed-forward layer with ReLU."""

    def __init__(self, d_model: int, is_decoder: bool) -> None:
        super().__init__()
        self.self_norm = RMSNorm(d_model)
        self.self_attention = T5Attention(d_model, 2, 2, relative=True, bidirectional=not is_decoder)
        if is_decoder:
            self.cross_norm = RMSNorm(d_model)
            self.cross_attention = T5Attention(d_model, 2, 2, relative=False, bidirectional=True)
        self.ff_norm = RMSNorm(d_model)
        self.wi = nn.Linear(d_model, 3, bias=False)
        self.wo = nn.Linear(3, d_model, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.self_attention(self.self_norm(x)))
        if memory is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory))
        return x + self.dropout(self.wo(self.dropout(F.relu(self.wi(self.ff_norm(x))))))


class T5(nn.Module):
    """T5 with one layer on either side; one embedding is shared by both sides and the output."""

    def __init__(self, d_model: int = 4) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, d_model)
        self.encoder, self.encoder_norm = T5Block(d_model, is_decoder=False), RMSNorm(d_model)
        self.decoder, self.decoder_norm = T5Block(d_model, is_decoder=True), RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, 5, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.encoder_norm(self.encoder(self.shared(input_ids)))
        sequence_output = self.decoder_norm(self.decoder(self.shared(decoder_input_ids), memory))
        return self.lm_head(sequence_output * (self.lm_head.in_features**-0.5))


# Feed-forward layers


class GLU(nn.Module):
    """A feed-forward layer with a gate: the halves of one projection."""

    def __init__(self, dim: int, hidden: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden * 2)
        self.gate = gate
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden_states, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(hidden_states * self.gate(gate))


class DenseMoE(nn.Module):
    """A mixture of all experts, whose weights are stacked."""

    def __init__(self, dim: int = 4, experts: int = 3, hidden: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden))
        self.b1 = nn.Parameter(torch.zeros(experts, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim))
        self.b2 = nn.Parameter(torch.zeros(experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(dim=-1)
        hidden = F.relu(torch.einsum("btd,edh->bteh", x, self.w1) + self.b1)
        outputs = torch.einsum("bteh,ehd->bted", hidden, self.w2) + self.b2
        return torch.einsum("bte,bted->btd", gates, outputs)


def router(dim: int, experts: int) -> nn.Linear:
    """A layer that at first sends tokens to all experts, whatever the seed: each has a channel of its own."""
    layer = nn.Linear(dim, experts, bias=False)
    nn.init.eye_(layer.weight)
    return layer


class SwitchFeedForward(nn.Module):
    """Each token goes to the one expert that its router prefers."""

    def __init__(self, d_model: int = 4, n_experts: int = 3, d_ff: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList([PositionwiseFeedForward(d_model, d_ff) for _ in range(n_experts)])
        self.switch = router(d_model, n_experts)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        route_prob = F.softmax(self.switch(x), dim=-1)
        route_prob_max, routes = torch.max(route_prob, dim=-1)
        final_output = x.new_zeros(x.shape)
        for i, expert in enumerate(self.experts):
            index = torch.eq(routes, i).nonzero(as_tuple=True)[0]
            final_output[index, :] = expert(x[index, :])
        return (final_output * route_prob_max.view(-1, 1)).view(shape)


class SparseMoE(nn.Module):
    """Mixtral: each token goes to two gated experts, the weights of which are normed to a sum of one."""

    def __init__(self, hidden_dim: int = 4, num_experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts
        self.gate = router(hidden_dim, num_experts)
        self.experts = nn.ModuleList([LlamaMLP(hidden_dim, 3, F.silu) for _ in range(num_experts)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        routing_weights = F.softmax(self.gate(hidden_states), dim=1)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = self.experts[expert_idx](current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)


class LoRALinear(nn.Module):
    """A layer that stays, and a product of two thin matrices that learns beside it."""

    def __init__(self, base: nn.Linear, r: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        self.scaling = alpha / r
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling


class LoRAAttention(nn.Module):
    """Attention with adapters of queries and values, between a norm and a classifier."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q, self.v = LoRALinear(nn.Linear(dim, dim)), LoRALinear(nn.Linear(dim, dim))
        self.k, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.classifier = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.classifier((x + self.o(y)).mean(1))


# State spaces, shifts and convolutions


class Mamba(nn.Module):
    """The block of mamba-minimal, with a norm before it and the stream beside it."""

    def __init__(self, d_model: int = 3, d_inner: int = 4, d_state: int = 2, dt_rank: int = 1, d_conv: int = 3) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, dt_rank
        self.norm = RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, dt_rank + d_state * 2, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1).repeat(d_inner, 1)))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x_and_res = self.in_proj(self.norm(x))
        u, res = x_and_res.split(split_size=[self.d_inner, self.d_inner], dim=-1)
        u = self.conv1d(u.transpose(1, 2))[:, :, :length].transpose(1, 2)
        y = self.ssm(F.silu(u)) * F.silu(res)
        return self.out_proj(y) + x

    def ssm(self, x: Tensor) -> Tensor:
        A = -torch.exp(self.A_log)
        delta, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        return self.selective_scan(x, delta, A, B, C, self.D)

    @staticmethod
    def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        b, length, d_in = u.shape
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, u)
        x = torch.zeros((b, d_in, A.shape[1]), device=deltaA.device, dtype=u.dtype)
        ys = []
        for i in range(length):
            x = deltaA[:, i] * x + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", x, C[:, i, :]))
        return torch.stack(ys, dim=1) + u * D


class RWKV(nn.Module):
    """RWKV-4: a running mean of values with learned decay, and channel mixing with squared ReLU; both see a shift."""

    def __init__(self, n_embd: int = 3, n_ffn: int = 4) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_decay = nn.Parameter(torch.zeros(n_embd))
        self.time_first = nn.Parameter(torch.zeros(n_embd))
        self.time_mix_k = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_mix_v = nn.Parameter(torch.ones(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.ones(1, 1, n_embd))
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)
        self.ffn_mix_k = nn.Parameter(torch.ones(1, 1, n_embd))
        self.ffn_mix_r = nn.Parameter(torch.ones(1, 1, n_embd))
        self.ffn_key = nn.Linear(n_embd, n_ffn, bias=False)
        self.ffn_receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.ffn_value = nn.Linear(n_ffn, n_embd, bias=False)

    def time_mixing(self, x: Tensor) -> Tensor:
        xx = self.time_shift(x)
        k = self.key(x * self.time_mix_k + xx * (1 - self.time_mix_k))
        v = self.value(x * self.time_mix_v + xx * (1 - self.time_mix_v))
        r = self.receptance(x * self.time_mix_r + xx * (1 - self.time_mix_r))
        return self.output(torch.sigmoid(r) * self.wkv(k, v))

    def wkv(self, k: Tensor, v: Tensor) -> Tensor:
        aa, bb, pp = torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]), torch.full_like(v[:, 0], -1e30)
        out = []
        for kk, vv in zip(k.unbind(1), v.unbind(1), strict=True):
            ww = self.time_first + kk
            p = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - p), torch.exp(ww - p)
            out.append((e1 * aa + e2 * vv) / (e1 * bb + e2))
            ww = pp - torch.exp(self.time_decay)
            p = torch.maximum(ww, kk)
            e1, e2 = torch.exp(ww - p), torch.exp(kk - p)
            aa, bb, pp = e1 * aa + e2 * vv, e1 * bb + e2, p
        return torch.stack(out, dim=1)

    def channel_mixing(self, x: Tensor) -> Tensor:
        xx = self.time_shift(x)
        k = self.ffn_key(x * self.ffn_mix_k + xx * (1 - self.ffn_mix_k))
        r = self.ffn_receptance(x * self.ffn_mix_r + xx * (1 - self.ffn_mix_r))
        return torch.sigmoid(r) * self.ffn_value(torch.square(torch.relu(k)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.time_mixing(self.ln1(x))
        return x + self.channel_mixing(self.ln2(x))


class Chomp1d(nn.Module):
    """Cuts off what a causal convolution must not see."""

    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """Two causal convolutions, and a convolution of size one beside them if the width changes."""

    def __init__(self, n_inputs: int, n_outputs: int, dilation: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (n_inputs, n_outputs):
            conv = nn.Conv1d(width, n_outputs, 2, padding=dilation, dilation=dilation)
            layers += [conv, Chomp1d(dilation), nn.ReLU(), nn.Dropout(0.2)]
        self.net = nn.Sequential(*layers)
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    """Temporal convolutional network that classifies the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(2, 3, 1), TemporalBlock(3, 3, 2))
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


class WaveNet(nn.Module):
    """Dilated convolutions with gates, a stream between them, and skips that are summed."""

    def __init__(self, classes: int = 2, residual: int = 2, dilation: int = 3, skip: int = 3, end: int = 4) -> None:
        super().__init__()
        self.start_conv = nn.Conv1d(classes, residual, 1)
        self.filter_convs, self.gate_convs = nn.ModuleList(), nn.ModuleList()
        self.residual_convs, self.skip_convs = nn.ModuleList(), nn.ModuleList()
        for i in range(2):
            self.filter_convs.append(nn.Conv1d(residual, dilation, 2, dilation=2**i))
            self.gate_convs.append(nn.Conv1d(residual, dilation, 2, dilation=2**i))
            self.residual_convs.append(nn.Conv1d(dilation, residual, 1))
            self.skip_convs.append(nn.Conv1d(dilation, skip, 1))
        self.end_conv_1 = nn.Conv1d(skip, end, 1)
        self.end_conv_2 = nn.Conv1d(end, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start_conv(x)
        skip: Tensor | int = 0
        for filter_conv, gate_conv, residual_conv, skip_conv in zip(
            self.filter_convs, self.gate_convs, self.residual_convs, self.skip_convs, strict=True
        ):
            residual = x
            x = torch.tanh(filter_conv(x)) * torch.sigmoid(gate_conv(x))
            s = skip_conv(x)
            if isinstance(skip, Tensor):
                skip = skip[:, :, -s.size(2) :]
            skip = s + skip
            x = residual_conv(x)
            x = x + residual[:, :, -x.size(2) :]
        return self.end_conv_2(F.relu(self.end_conv_1(F.relu(skip))))


class GatedConvLM(nn.Module):
    """Language model of causal convolutions with gated linear units."""

    def __init__(self, vocabulary: int = 5, embedding: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.convs = nn.ModuleList([nn.Conv1d(width, 2 * channels, 2) for width in (embedding, channels)])
        self.fc = nn.Linear(channels, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).transpose(1, 2)
        for conv in self.convs:
            x = F.glu(conv(F.pad(x, (1, 0))), dim=1)
        return self.fc(x.transpose(1, 2))


# Recurrence


class LSTMClassifier(nn.Module):
    """A bidirectional `nn.LSTM` of packed sentences."""

    def __init__(self, embedding_dim: int = 3, hidden_dim: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, embedding_dim, padding_idx=0)
        self.rnn = nn.LSTM(embedding_dim, hidden_dim, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(hidden_dim * 2, 2)
        self.dropout = nn.Dropout(0.1)

    def forward(self, text: Tensor, text_lengths: Tensor) -> Tensor:
        embedded = self.dropout(self.embedding(text))
        packed = nn.utils.rnn.pack_padded_sequence(embedded, text_lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.rnn(packed)
        return self.fc(self.dropout(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)))


class GRURegressor(nn.Module):
    """A layer with ReLU, `nn.GRU`, and a layer of its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 4)
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.size(0), 3, dtype=x.dtype, device=x.device)
        out, _ = self.gru(F.relu(self.encoder(x)), h0)
        return self.fc(out[:, -1])


class ReLURNN(nn.Module):
    """`nn.RNN` of two layers with ReLU, and a layer of every output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 3, num_layers=2, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(output)


class ReLUCell(nn.Module):
    """A recurrent layer written by hand: it starts from a learned state and fills a tensor with its states."""

    def __init__(self, input_size: int = 2, hidden_size: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = nn.Linear(input_size, hidden_size)
        self.h2h = nn.Linear(hidden_size, hidden_size, bias=False)
        self.h0 = nn.Parameter(torch.zeros(hidden_size))
        self.h2o = nn.Linear(hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        h = self.h0.expand(batch, -1)
        out = torch.zeros(batch, steps, self.hidden_size, dtype=x.dtype, device=x.device)
        for t in range(steps):
            h = torch.relu(self.i2h(x[:, t]) + self.h2h(h))
            out[:, t] = h
        return self.h2o(out)


class ProjectedLSTM(nn.Module):
    """An LSTM written by hand, whose output is projected to fewer channels before it returns."""

    def __init__(self, input_sz: int = 3, hidden_sz: int = 3, proj_sz: int = 2) -> None:
        super().__init__()
        self.hidden_size, self.proj_size = hidden_sz, proj_sz
        self.embedding = nn.Embedding(5, input_sz)
        self.W = nn.Parameter(torch.randn(input_sz, hidden_sz * 4))
        self.U = nn.Parameter(torch.randn(proj_sz, hidden_sz * 4))
        self.bias = nn.Parameter(torch.zeros(hidden_sz * 4))
        self.proj = nn.Linear(hidden_sz, proj_sz, bias=False)
        self.fc = nn.Linear(proj_sz, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        bs, seq_sz, _ = x.size()
        h_t, c_t = x.new_zeros(bs, self.proj_size), x.new_zeros(bs, self.hidden_size)
        hidden_seq = []
        for t in range(seq_sz):
            gates = x[:, t, :] @ self.W + h_t @ self.U + self.bias
            i_t, f_t, g_t, o_t = gates.chunk(4, 1)
            c_t = torch.sigmoid(f_t) * c_t + torch.sigmoid(i_t) * torch.tanh(g_t)
            h_t = self.proj(torch.sigmoid(o_t) * torch.tanh(c_t))
            hidden_seq.append(h_t.unsqueeze(0))
        return self.fc(torch.cat(hidden_seq, dim=0).transpose(0, 1).contiguous())


class MinGRU(nn.Module):
    """A gated recurrence without a bound: the candidate does not depend on the state."""

    def __init__(self, dim: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.linear_z = nn.Linear(dim, hidden)
        self.linear_h = nn.Linear(dim, hidden)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        z, candidate = torch.sigmoid(self.linear_z(x)), self.linear_h(x)
        h = torch.zeros_like(candidate[:, 0])
        states = []
        for t in range(x.size(1)):
            h = torch.lerp(h, candidate[:, t], z[:, t])
            states.append(h)
        return self.head(torch.stack(states, 1))


class Seq2Seq(nn.Module):
    """Two recurrent networks with additive attention between them, fed with the right words."""

    def __init__(self, vocabulary: int = 4, emb_dim: int = 2, hid_dim: int = 2) -> None:
        super().__init__()
        self.src_embedding = nn.Embedding(vocabulary, emb_dim)
        self.encoder = nn.GRU(emb_dim, hid_dim, bidirectional=True)
        self.encoder_fc = nn.Linear(hid_dim * 2, hid_dim)
        self.attn = nn.Linear(hid_dim * 2 + hid_dim, hid_dim)
        self.v = nn.Linear(hid_dim, 1, bias=False)
        self.trg_embedding = nn.Embedding(vocabulary, emb_dim)
        self.decoder = nn.GRU(hid_dim * 2 + emb_dim, hid_dim)
        self.fc_out = nn.Linear(hid_dim * 2 + hid_dim + emb_dim, vocabulary)

    def attention(self, hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        hidden = hidden.unsqueeze(1).repeat(1, encoder_outputs.shape[0], 1)
        encoder_outputs = encoder_outputs.permute(1, 0, 2)
        energy = torch.tanh(self.attn(torch.cat((hidden, encoder_outputs), dim=2)))
        return F.softmax(self.v(energy).squeeze(2), dim=1)

    def step(self, token: Tensor, hidden: Tensor, encoder_outputs: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.trg_embedding(token.unsqueeze(0))
        a = self.attention(hidden, encoder_outputs).unsqueeze(1)
        weighted = torch.bmm(a, encoder_outputs.permute(1, 0, 2)).permute(1, 0, 2)
        output, hidden = self.decoder(torch.cat((embedded, weighted), dim=2), hidden.unsqueeze(0))
        features = torch.cat((output.squeeze(0), weighted.squeeze(0), embedded.squeeze(0)), dim=1)
        return self.fc_out(features), hidden.squeeze(0)

    def forward(self, src: Tensor, trg: Tensor) -> Tensor:
        encoder_outputs, hidden = self.encoder(self.src_embedding(src))
        hidden = torch.tanh(self.encoder_fc(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)))
        outputs = torch.zeros(*trg.shape, self.fc_out.out_features, dtype=hidden.dtype)
        for t in range(1, trg.shape[0]):
            outputs[t], hidden = self.step(trg[t - 1], hidden, encoder_outputs)
        return outputs


# Sets


class PerceiverAttention(nn.Module):
    """Attention of a query to a context, as in perceiver-pytorch."""

    def __init__(self, query_dim: int, context_dim: int, heads: int = 2, dim_head: int = 2) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(context_dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, query_dim)

    def _heads_first(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.reshape(b, n, self.heads, -1).transpose(1, 2).reshape(b * self.heads, n, -1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (self._heads_first(part) for part in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        out = out.reshape(x.shape[0], self.heads, x.shape[1], -1).transpose(1, 2).flatten(2)
        return self.to_out(out)


class Perceiver(nn.Module):
    """Learned latents that attend to the input, a feed-forward layer with GEGLU, and a mean of the latents."""

    def __init__(self, input_dim: int = 3, latent_dim: int = 4, num_latents: int = 2) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.norm, self.norm_context = nn.LayerNorm(latent_dim), nn.LayerNorm(input_dim)
        self.cross_attn = PerceiverAttention(latent_dim, input_dim)
        self.cross_ff = Residual(latent_dim, GLU(latent_dim, 5, F.gelu))
        self.to_logits = nn.Sequential(nn.LayerNorm(latent_dim), nn.Linear(latent_dim, 2))

    def forward(self, data: Tensor) -> Tensor:
        x = self.latents.unsqueeze(0).repeat(data.shape[0], 1, 1)
        x = self.cross_attn(self.norm(x), context=self.norm_context(data)) + x
        return self.to_logits(self.cross_ff(x).mean(dim=1))


class MAB(nn.Module):
    """Multihead attention block of the set transformer: the queries themselves are the residual stream."""

    def __init__(self, dim_Q: int, dim_K: int, dim_V: int, num_heads: int = 2) -> None:
        super().__init__()
        self.dim_V, self.num_heads = dim_V, num_heads
        self.fc_q = nn.Linear(dim_Q, dim_V)
        self.fc_k = nn.Linear(dim_K, dim_V)
        self.fc_v = nn.Linear(dim_K, dim_V)
        self.fc_o = nn.Linear(dim_V, dim_V)

    def forward(self, Q: Tensor, K: Tensor) -> Tensor:
        Q = self.fc_q(Q)
        K, V = self.fc_k(K), self.fc_v(K)
        dim_split = self.dim_V // self.num_heads
        Q_ = torch.cat(Q.split(dim_split, 2), 0)
        K_ = torch.cat(K.split(dim_split, 2), 0)
        V_ = torch.cat(V.split(dim_split, 2), 0)
        A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(self.dim_V), 2)
        out = torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)
        return out + F.relu(self.fc_o(out))


class SetTransformer(nn.Module):
    """Set transformer: induced points, the set, and a seed that pools it."""

    def __init__(self, dim_input: int = 2, dim_hidden: int = 4, num_inds: int = 2) -> None:
        super().__init__()
        self.I = nn.Parameter(torch.randn(1, num_inds, dim_hidden))
        self.mab0 = MAB(dim_hidden, dim_input, dim_hidden)
        self.mab1 = MAB(dim_input, dim_hidden, dim_hidden)
        self.S = nn.Parameter(torch.randn(1, 1, dim_hidden))
        self.pma = MAB(dim_hidden, dim_hidden, dim_hidden)
        self.dec = nn.Linear(dim_hidden, 2)

    def forward(self, X: Tensor) -> Tensor:
        H = self.mab0(self.I.repeat(X.size(0), 1, 1), X)
        H = self.mab1(X, H)
        return self.dec(self.pma(self.S.repeat(X.size(0), 1, 1), H)).squeeze(1)


class DeepSets(nn.Module):
    """A network of each element, a sum, and a network of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU())
        self.rho = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(dim=1))


# Embeddings without a norm


class CBOW(nn.Module):
    """A word from the mean of its neighbours."""

    def __init__(self, vocabulary: int = 5, dim: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, dim)
        self.linear1 = nn.Linear(dim, 4)
        self.linear2 = nn.Linear(4, vocabulary)

    def forward(self, context: Tensor) -> Tensor:
        hidden = F.relu(self.linear1(self.embeddings(context).mean(dim=1)))
        return F.log_softmax(self.linear2(hidden), dim=-1)


class NGram(nn.Module):
    """A word from its predecessors, whose embeddings lie side by side."""

    def __init__(self, vocabulary: int = 5, dim: int = 3, context_size: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, dim)
        self.linear1 = nn.Linear(context_size * dim, 4)
        self.linear2 = nn.Linear(4, vocabulary)

    def forward(self, context: Tensor) -> Tensor:
        embeds = self.embeddings(context).view((len(context), -1))
        return self.linear2(F.relu(self.linear1(embeds)))


class TextClassifier(nn.Module):
    """`nn.EmbeddingBag` of texts of different lengths."""

    def __init__(self, vocabulary: int = 6, dim: int = 3) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, dim, mode="mean")
        self.fc = nn.Sequential(nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.embedding(text, offsets))


class SkipGram(nn.Module):
    """Words and the contexts they are found in have embeddings of their own, the products of which are scores."""

    def __init__(self, vocabulary: int = 5, dim: int = 3) -> None:
        super().__init__()
        self.u_embeddings = nn.Embedding(vocabulary, dim)
        self.v_embeddings = nn.Embedding(vocabulary, dim)

    def forward(self, pos_u: Tensor, pos_v: Tensor, neg_v: Tensor) -> Tensor:
        emb_u, emb_v, emb_neg_v = self.u_embeddings(pos_u), self.v_embeddings(pos_v), self.v_embeddings(neg_v)
        score = F.logsigmoid(torch.sum(torch.mul(emb_u, emb_v), dim=1))
        neg_score = torch.bmm(emb_neg_v, emb_u.unsqueeze(2)).squeeze(2)
        return score + F.logsigmoid(-neg_score).sum(dim=1)


class TiedMLP(nn.Module):
    """A network between an embedding and the same embedding."""

    def __init__(self, vocabulary: int = 5, dim: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, dim)
        self.up = nn.Linear(dim, 4)
        self.down = nn.Linear(4, dim)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, context: Tensor) -> Tensor:
        x = self.encoder(context).sum(dim=1)
        x = self.down(F.relu(self.up(x)))
        return F.linear(x, self.encoder.weight, self.bias)


class WordLanguageModel(nn.Module):
    """The recurrent model of PyTorch's examples with a ReLU, whose decoder is its encoder."""

    def __init__(self, ntoken: int = 5, ninp: int = 3) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.RNN(ninp, ninp, 1, nonlinearity="relu")
        self.decoder = nn.Linear(ninp, ntoken)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder.weight.new_zeros(1, tokens.size(1), 3)
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).view(-1, self.decoder.out_features)


def _glu(gate: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Residual(4, GLU(4, 5, gate))


def _llama(act_fn: Callable[[Tensor], Tensor] = F.silu, **options: int | bool) -> Callable[[], nn.Module]:
    return lambda: Llama(act_fn, **options)


LORA_FROZEN = tuple(f"{layer}.{kind}" for layer in ("q.base", "k", "v.base", "o") for kind in ("weight", "bias"))

# In attention, "queries" are the channels of a head in which queries and keys meet; "values" pass to the output.
SEQUENCE = [
    # norm + queries + values
    Case("pre-norm self-attention", lambda: Residual(4, SelfAttention()), ((2, 4, 4),), 4 + 4 + 4),
    # queries + values
    Case("multi-head self-attention", TorchAttention, (), 4 + 4, sample=numbers((3, 4, 4))),
    # queries + values, with the additional key among the keys and the additional value among the values
    Case(
        "multi-head cross attention",
        lambda: TorchAttention(kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True),
        (),
        4 + 4,
        sample=numbers((3, 3, 4), (3, 4, 3), (3, 4, 5)),
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
    Case("linear attention with relu", lambda: Residual(4, LiteAttention()), ((2, 4, 4),), 4 + 4 + 4),
    # norm + gains and offsets of queries against those of keys + all of the attention against the output layer
    Case("gated attention unit", GatedAttentionUnit, (), 4 + 3 + 1, sample=numbers((2, 4, 4))),
    # norm + norm of the narrow projection + queries + pairs that rotate, the same for both heads + values
    Case("latent attention", LatentAttention, ((2, 4, 4),), 4 + 3 + 4 + 2 + 4),
    # two layers of norm + queries + values + norm + hidden, and the last norm
    Case("transformer encoder, pre-norm", lambda: TorchEncoder(True), ((6, 3, 4),), 2 * (4 + 4 + 4 + 4 + 5) + 4),
    # two layers of queries + values + hidden, and the last norm: the stream passes through each of the others
    Case("transformer encoder, post-norm", lambda: TorchEncoder(False), ((6, 3, 4),), 2 * (4 + 4 + 5) + 4),
    # norm + queries + values of either attention, norm + hidden
    Case("transformer decoder layer", TorchDecoder, ((4, 2, 4), (3, 2, 4)), 2 * (4 + 4 + 4) + 4 + 4),
    # queries + values + hidden + last norm of the encoder; queries + values, twice, + hidden + last norm of the decoder
    Case(
        "transformer",
        TorchTranslator,
        (),
        (4 + 4 + 3 + 4) + (2 * (4 + 4) + 3 + 4),
        sample=tokens((6, 3), (6, 3)),
    ),
    # norm + queries + values + norm + hidden + last norm, with one more attention in the decoder
    Case(
        "annotated transformer",
        AnnotatedTransformer,
        (),
        (4 + 4 + 4 + 4 + 3 + 4) + (2 * (4 + 4 + 4) + 4 + 3 + 4),
        sample=tokens((3, 4), (3, 4)),
    ),
    # queries + values + last norm; gelu pins the hidden layer
    Case("bert", Bert, (), 4 + 4 + 4, sample=bert_inputs),
    # two layers of norm + queries + values + norm; the last norm is tied to the embedding, and gelu pins
    Case("gpt", lambda: GPT(2, 8, nn.GELU()), (), 2 * (4 + 4 + 4 + 4), sample=tokens((3, 4))),
    # norm + queries + values + norm + hidden
    Case("gpt with squared relu", lambda: GPT(1, 16, SquaredReLU(), True), (), 4 * 4 + 16, sample=tokens((3, 4))),
    # norm + queries (one pair that rotates, two that do not, in either head) + values + last norm
    Case("gpt-j", GPTJ, (), 4 + 2 * (1 + 2) + 8 + 4, sample=tokens((3, 4))),
    # norm + rotating pairs of queries + values (for the one head of keys and values) + norm + up + last norm
    Case("llama", _llama(), (), 4 + 2 + 4 + 4 + 5 + 4, sample=tokens((3, 4))),
    # likewise for two heads of keys and values, and gate + up in the feed-forward layer
    Case("llama with relu", _llama(F.relu, kv_heads=2), (), 4 + 4 + 8 + 4 + (5 + 5) + 4, sample=tokens((3, 4))),
    # norm + gains of queries against those of keys (pairs, the same for all heads) + values + norm + up + last norm
    Case(
        "llama with norms of queries and keys",
        _llama(kv_heads=2, qk_norm=True),
        (),
        4 + 2 + 8 + 4 + 5 + 4,
        sample=tokens((3, 4)),
    ),
    # as "llama"
    Case("llama with complex numbers", ComplexLlama, (), 4 + 2 + 4 + 4 + 5 + 4, sample=tokens((3, 4))),
    # norm + queries + values + norm + hidden + last norm; the same and cross attention in the decoder, where the last
    # norm is tied to the embedding
    Case("t5", T5, (), (4 + 4 + 4 + 4 + 3 + 4) + (2 * (4 + 4 + 4) + 4 + 3), sample=tokens((3, 4), (3, 4))),
    # norm + both factors
    Case("bilinear gate", _glu(nn.Identity()), ((4, 2, 4),), 4 + 5 + 5),
    Case("relu gate", _glu(F.relu), ((4, 2, 4),), 4 + 5 + 5),
    # norm + the factor that does not pass through gelu
    Case("gelu gate", _glu(F.gelu), ((4, 2, 4),), 4 + 5),
    # norm + hidden of three experts
    Case("mixture of all experts", lambda: Residual(4, DenseMoE()), ((4, 3, 4),), 4 + 3 * 3),
    Case("mixture with one expert a token", lambda: Residual(4, SwitchFeedForward(), RMSNorm), ((4, 5, 4),), 4 + 3 * 3),
    # norm + up of three experts
    Case("mixture with two experts a token", lambda: Residual(4, SparseMoE(), RMSNorm), ((4, 5, 4),), 4 + 3 * 3),
    # inner channels of either adapter; all else is tied to what is frozen
    Case("low-rank adapters", LoRAAttention, ((4, 3, 4),), 2 + 2, LORA_FROZEN),
    # norm + channels between the layer and the depthwise convolution + inner channel of the step size + states (in
    # against out) + what all states and the skip have in common, against the output layer
    Case("mamba", Mamba, ((3, 5, 3),), 3 + 4 + 1 + 2 + 1),
    # norm + values + norm + hidden
    Case("rwkv", RWKV, ((3, 4, 3),), 3 + 3 + 3 + 4),
    # hidden of the first block + the stream + hidden of the second block
    Case("temporal convolutions", TCN, ((6, 2, 5),), 3 + 3 + 3),
    # the stream + the sum of the skips + hidden
    Case("wavenet", WaveNet, ((4, 2, 6),), 2 + 3 + 4),
    # embedding + ungated halves of two layers
    Case("gated convolutions", GatedConvLM, (), 3 + 3 + 3, sample=tokens((4, 4))),
    # embedding
    Case("lstm of packed sentences", LSTMClassifier, (), 3, sample=sentences),
    # hidden of the first layer
    Case("gru", GRURegressor, ((6, 4, 2),), 4),
    # states of two layers
    Case("rnn with relu", ReLURNN, ((4, 3, 2),), 3 + 3),
    # state
    Case("recurrent cell with relu", ReLUCell, ((4, 4, 2),), 4),
    # embedding + projection
    Case("lstm with projection by hand", ProjectedLSTM, (), 3 + 2, sample=tokens((3, 4))),
    # state
    Case("minimal gated recurrence", MinGRU, ((4, 4, 2),), 4),
    # both embeddings
    Case("additive attention", Seq2Seq, (), 2 + 2, sample=tokens((3, 4), (3, 4), vocabulary=4)),
    # norm of the latents + norm of the input + queries + values + norm + value half of the gate + last norm
    Case("perceiver", Perceiver, ((6, 5, 3),), 4 + 3 + 4 + 4 + 4 + 5 + 4),
    # induced points + three blocks (queries and values alike, against keys) + seed
    Case("set transformer", SetTransformer, (), 4 + 3 * 4 + 4, sample=numbers((6, 4, 2))),
    # hidden + sum + hidden
    Case("deep sets", DeepSets, ((6, 4, 2),), 4 + 3 + 5),
    # embedding + hidden
    Case("continuous bag of words", CBOW, (), 3 + 4, sample=tokens((6, 3))),
    Case("n-gram", NGram, (), 3 + 4, sample=tokens((6, 2))),
    Case("embedding bag", TextClassifier, (), 3 + 4, sample=bags),
    # the one embedding against the other
    Case("skip-gram", SkipGram, (), 3, sample=tokens((6,), (6,), (6, 2))),
    # embedding, against what enters and what leaves the network + hidden
    Case("tied embedding", TiedMLP, (), 3 + 4, sample=tokens((6, 2))),
    # embedding, against state
    Case("word language model", WordLanguageModel, (), 3, sample=tokens((4, 4))),
]
