"""Control flow and values that leave torch stop no trace."""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.symmetry.soundness.checks import Beside, block, check, every, odd, survive

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|quantize).*deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning"),
]

# Control flow ---------------------------------------------------------------------------------------------------------


def _halved_until_small(m: Any, h: Tensor) -> Tensor:
    while h.norm() > 1:
        h = h / 2
    return h


def _masked_assignment(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0.5] = 0.5
    return h


def _asserted(m: Any, h: Tensor) -> Tensor:
    assert bool((h.sum() < 1e9).all())
    return h


def _routed(m: Any, h: Tensor) -> Tensor:
    """Every row goes to the expert that a gate chooses, and is added to what the others return."""
    choice = m.gate(h).argmax(1)
    y = torch.zeros_like(h)
    for number, expert in enumerate(m.experts):
        rows = torch.where(choice == number)[0]
        if rows.numel():
            y.index_add_(0, rows, expert(h[rows]))
    return y


CONTROL_FLOW = {
    "branch": odd(lambda m, h: h if h.sum() > 1 else 2 * h),
    "conditional expression": odd(lambda m, h: h * (1 if h[0, 0] > h[1, 1] else 3)),
    "loop over an item": odd(lambda m, h: h + sum(h for _ in range(int(h.sum().item()) % 3))),
    "while": odd(_halved_until_small),
    "list": odd(lambda m, h: h * (1 + sum(value > 0.5 for value in h[0].tolist()))),
    "nonzero": odd(lambda m, h: torch.cat([h, h[(h.sum(1) > 1).nonzero()[:, 0]]])),
    "boolean mask": odd(lambda m, h: torch.cat([h, h[h[:, 0] > 0.5]])),
    "masked select": odd(lambda m, h: h + h.masked_select(h > 0.5).numel()),
    "masked assignment": odd(_masked_assignment),
    "unique": odd(lambda m, h: h + torch.unique(h.round()).numel()),
    "index in Python": odd(lambda m, h: h * (1, 2, 3, 4, 5)[int(h[0].argmax())]),
    "rows one by one": odd(lambda m, h: torch.stack([row if row[0] > 0.5 else -row for row in h])),
    "sorted in Python": odd(lambda m, h: torch.stack(sorted(h, key=lambda row: float(row[0])))),
    "repeated as often as the data say": odd(lambda m, h: h.repeat_interleave((h[:, 0] > 0.5).long() + 1, 0)),
    "assertion": odd(_asserted),
    "routed to experts": odd(
        _routed, gate=lambda: nn.Linear(5, 2), experts=lambda: nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
    ),
}


@every(CONTROL_FLOW)
def test_control_flow_that_depends_on_data(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    check(make(), x)


# Values that leave torch ----------------------------------------------------------------------------------------------


def _saved_and_loaded(m: Any, h: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(h.detach(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _copied_bytes(m: Any, h: Tensor) -> Tensor:
    y = torch.empty_like(h, requires_grad=False)
    y.untyped_storage().copy_(h.untyped_storage())
    return y


def _written_to_numpy_memory(m: Any, h: Tensor) -> Tensor:
    array = np.zeros(tuple(h.shape))
    torch.from_numpy(array).copy_(h.detach())
    return torch.from_numpy(array)


LEAVING = {
    "numpy": odd(lambda m, h: h * float(h.detach().numpy().max())),
    "numpy and back": odd(lambda m, h: torch.from_numpy(np.sinh(h.detach().numpy()))),
    "asarray": odd(lambda m, h: h * float(np.asarray(h.detach())[0].sum())),
    "memory of an array": odd(_written_to_numpy_memory),
    "dlpack": odd(lambda m, h: torch.from_dlpack(h.detach()).exp()),
    "numpy by dlpack": odd(lambda m, h: torch.tensor(np.from_dlpack(h.detach()))),
    "tensor from a list": odd(lambda m, h: torch.tensor(h.tolist(), dtype=torch.float64)),
    "tensor from numbers": odd(lambda m, h: torch.tensor([[float(v) for v in row] for row in h], dtype=h.dtype)),
    "text": odd(lambda m, h: h * float(f"{h.sum():.6f}")),
    "text of a tensor": odd(lambda m, h: h * len(str(h.detach()))),
    "equal": odd(lambda m, h: h if torch.equal(h, h.round()) else h.exp()),
    "close": odd(lambda m, h: 3 * h if torch.allclose(h, h.round(), atol=0.4) else 2 * h),
    "saved and loaded": odd(_saved_and_loaded),
    "deep copy": odd(lambda m, h: copy.deepcopy(h.detach())),
    "copied bytes": odd(_copied_bytes),
    "bytes": odd(lambda m, h: h * (1 + sum(h.detach().clone().untyped_storage().tolist()) % 7)),
    "same memory": odd(lambda m, h: torch.empty(0, dtype=h.dtype).set_(h.detach())),
    "same storage": odd(lambda m, h: torch.empty(0, dtype=h.dtype).set_(h.detach().untyped_storage()).view(8, 5)),
    "weight by numpy": odd(lambda m, h: h * float(m.body[0].weight.detach().numpy().sum())),
    "weight by list": odd(lambda m, h: h * sum(m.body[0].bias.tolist())),
    "weight by item": odd(lambda m, h: h * m.head.weight[0, 0].item()),
    "weight by state dict": odd(lambda m, h: h + m.state_dict()["head.weight"][0]),
    "copied layer": odd(lambda m, h: copy.deepcopy(m.block)(h), block=block),
}


@every(LEAVING)
def test_values_that_leave_torch(make: Callable[[], nn.Module], units: int | None, x: Tensor) -> None:
    check(make(), x)


def test_a_pointer_leads_to_the_data(x: Tensor) -> None:
    survive(Beside(lambda m, h: h * ctypes.c_double.from_address(h.detach().data_ptr()).value), x)
