"""Llama and T5."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import RMSNorm, causal_mask, tokens

# Llama ----------------------------------------------------------------------------------------------------------------


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


# T5 -------------------------------------------------------------------------------------------------------------------


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


# Embeddings without a norm --------------------------------------------------------------------------------------------


def _llama(act_fn: Callable[[Tensor], Tensor] = F.silu, **options: int | bool) -> Callable[[], nn.Module]:
    return lambda: Llama(act_fn, **options)


# In attention, "queries" are the channels of a head in which queries and keys meet; "values" pass to the output.
LLAMA: list[Case] = [
    # norm + rotating pairs of queries + values (for the one head of keys and values) + norm + up + last norm
    Case("llama", _llama(), (), 4 + 2 + 4 + 4 + 5 + 4, sample=tokens((3, 4))),
    # norm + rotating pairs of queries + values (for two heads of keys and values) + norm + gate + up + last norm
    Case(
        "llama with relu",
        _llama(F.relu, kv_heads=2),
        (),
        4 + 4 + 8 + 4 + (5 + 5) + 4,
        sample=tokens((3, 4)),
        good_for=Use.PRODUCTS | Use.SHARDS | Use.FAST,
    ),
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
]
