"""Networks of sets, and embeddings without a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import Residual, bags, numbers, tokens
from tests.symmetry.zoo.sequence.feed_forward import GLU

# Sets -----------------------------------------------------------------------------------------------------------------


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


# Embeddings without a norm --------------------------------------------------------------------------------------------


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


SETS: list[Case] = [
    # norm of the latents + norm of the input + queries + values + norm + value half of the gate + last norm
    Case("perceiver", Perceiver, ((6, 5, 3),), 4 + 3 + 4 + 4 + 4 + 5 + 4),
    # induced points + three blocks (queries and values alike, against keys) + seed
    Case("set transformer", SetTransformer, (), 4 + 3 * 4 + 4, sample=numbers((6, 4, 2))),
    # hidden + sum + hidden
    Case("deep sets", DeepSets, ((6, 4, 2),), 4 + 3 + 5, good_for=Use.PATHS | Use.FAST),
    # embedding + hidden
    Case("continuous bag of words", CBOW, (), 3 + 4, sample=tokens((6, 3))),
    Case("n-gram", NGram, (), 3 + 4, sample=tokens((6, 2)), good_for=Use.PATHS),
    Case("embedding bag", TextClassifier, (), 3 + 4, sample=bags),
    # the one embedding against the other
    Case("skip-gram", SkipGram, (), 3, sample=tokens((6,), (6,), (6, 2))),
    # embedding, against what enters and what leaves the network + hidden
    Case(
        "tied embedding",
        TiedMLP,
        (),
        3 + 4,
        sample=tokens((6, 2)),
        good_for=Use.PATHS | Use.PRODUCTS | Use.SHARDS | Use.FOUR_SHARDS | Use.FAST,
    ),
    # embedding, against state
    Case("word language model", WordLanguageModel, (), 3, sample=tokens((4, 4)), good_for=Use.PATHS),
]
