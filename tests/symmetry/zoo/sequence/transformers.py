"""Transformers of torch.nn, the annotated one, BERT and GPT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import bert_inputs, tokens

# Transformers of torch.nn ---------------------------------------------------------------------------------------------


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


# The annotated transformer --------------------------------------------------------------------------------------------


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


# BERT -----------------------------------------------------------------------------------------------------------------


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


# GPT ------------------------------------------------------------------------------------------------------------------


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


# In attention, "queries" are the channels of a head in which queries and keys meet; "values" pass to the output.
TRANSFORMERS: list[Case] = [
    # two layers of norm + queries + values + norm + hidden, and the last norm
    Case("transformer encoder, pre-norm", lambda: TorchEncoder(True), ((6, 3, 4),), 2 * (4 + 4 + 4 + 4 + 5) + 4),
    # two layers of queries + values + hidden, and the last norm: the stream passes through each of the others
    Case("transformer encoder, post-norm", lambda: TorchEncoder(False), ((6, 3, 4),), 2 * (4 + 4 + 5) + 4),
    # norm + queries + values of either attention, norm + hidden
    Case(
        "transformer decoder layer",
        TorchDecoder,
        ((4, 2, 4), (3, 2, 4)),
        2 * (4 + 4 + 4) + 4 + 4,
        good_for=Use.PRODUCTS | Use.FAST,
    ),
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
    Case(
        "gpt with squared relu",
        lambda: GPT(1, 16, SquaredReLU(), True),
        (),
        4 * 4 + 16,
        sample=tokens((3, 4)),
        good_for=Use.PRODUCTS | Use.SHARDS | Use.FAST,
    ),
    # norm + queries (one pair that rotates, two that do not, in either head) + values + last norm
    Case("gpt-j", GPTJ, (), 4 + 2 * (1 + 2) + 8 + 4, sample=tokens((3, 4))),
]
