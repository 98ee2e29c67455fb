"""State spaces, shifts, convolutions and recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import RMSNorm, sentences, tokens

# State spaces, shifts and convolutions --------------------------------------------------------------------------------


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


# Recurrence -----------------------------------------------------------------------------------------------------------


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


RECURRENT: list[Case] = [
    # norm + channels between the layer and the depthwise convolution + inner channel of the step size + states (in
    # against out) + what all states and the skip have in common, against the output layer
    Case("mamba", Mamba, ((3, 5, 3),), 3 + 4 + 1 + 2 + 1, good_for=Use.FAST),
    # norm + values + norm + hidden
    Case("rwkv", RWKV, ((3, 4, 3),), 3 + 3 + 3 + 4),
    # hidden of the first block + the stream + hidden of the second block
    Case("temporal convolutions", TCN, ((6, 2, 5),), 3 + 3 + 3, good_for=Use.PATHS),
    # the stream + the sum of the skips + hidden
    Case("wavenet", WaveNet, ((4, 2, 6),), 2 + 3 + 4),
    # embedding + ungated halves of two layers
    Case("gated convolutions", GatedConvLM, (), 3 + 3 + 3, sample=tokens((4, 4))),
    # embedding
    Case("lstm of packed sentences", LSTMClassifier, (), 3, sample=sentences),
    # hidden of the first layer
    Case("gru", GRURegressor, ((6, 4, 2),), 4),
    # states of two layers
    Case("rnn with relu", ReLURNN, ((4, 3, 2),), 3 + 3, good_for=Use.PATHS | Use.SHARDS | Use.FAST),
    # state
    Case("recurrent cell with relu", ReLUCell, ((4, 4, 2),), 4, good_for=Use.PATHS),
    # embedding + projection
    Case("lstm with projection by hand", ProjectedLSTM, (), 3 + 2, sample=tokens((3, 4))),
    # state
    Case("minimal gated recurrence", MinGRU, ((4, 4, 2),), 4),
    # both embeddings
    Case("additive attention", Seq2Seq, (), 2 + 2, sample=tokens((3, 4), (3, 4), vocabulary=4)),
]
