"""Gates, mixtures of experts and adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetry.zoo.case import Case, Use
from tests.symmetry.zoo.sequence.bricks import Residual, RMSNorm
from tests.symmetry.zoo.sequence.llama import LlamaMLP
from tests.symmetry.zoo.sequence.transformers import PositionwiseFeedForward

# Feed-forward layers --------------------------------------------------------------------------------------------------


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


# Embeddings without a norm --------------------------------------------------------------------------------------------


def _glu(gate: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Residual(4, GLU(4, 5, gate))


LORA_FROZEN = tuple(f"{layer}.{kind}" for layer in ("q.base", "k", "v.base", "o") for kind in ("weight", "bias"))


FEED_FORWARD: list[Case] = [
    # norm + both factors
    Case("bilinear gate", _glu(nn.Identity()), ((4, 2, 4),), 4 + 5 + 5),
    Case("relu gate", _glu(F.relu), ((4, 2, 4),), 4 + 5 + 5, good_for=Use.PRODUCTS | Use.FAST),
    # norm + the factor that does not pass through gelu
    Case("gelu gate", _glu(F.gelu), ((4, 2, 4),), 4 + 5),
    # norm + hidden of three experts
    Case("mixture of all experts", lambda: Residual(4, DenseMoE()), ((4, 3, 4),), 4 + 3 * 3),
    Case(
        "mixture with one expert a token",
        lambda: Residual(4, SwitchFeedForward(), RMSNorm),
        ((4, 5, 4),),
        4 + 3 * 3,
        good_for=Use.FAST,
    ),
    # norm + up of three experts
    Case("mixture with two experts a token", lambda: Residual(4, SparseMoE(), RMSNorm), ((4, 5, 4),), 4 + 3 * 3),
    # inner channels of either adapter; all else is tied to what is frozen
    Case("low-rank adapters", LoRAAttention, ((4, 3, 4),), 2 + 2, LORA_FROZEN),
]
