"""Weights whose input is exactly zero, as that of a recurrent cell in its first step, and batches without any rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry import scaling_group
from tests.networks import mlp
from tests.selection import few
from tests.symmetry.helpers import assert_complete, assert_same, draw_, evaluate, normal
from tests.symmetry.rules import test_contractions, test_indexing
from tests.symmetry.rules.ops import Around, Op
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import TINY


class Zeros(nn.Module):
    """A network with parts that are given zeros, of which there may be others later."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.call = call
        self.first, self.last, self.attention = nn.Linear(4, 6), nn.Linear(6, 2), None
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.zeros(part)) if isinstance(part, tuple) else part)
        self.number = 0.0
        self.double()

    def state(self, *shape: int) -> Tensor:
        """Zeros as long as :attr:`number` is zero, and other constants if it is not."""
        zeros = torch.zeros(shape, dtype=torch.float64)
        return zeros if self.number == 0 else zeros + self.number * torch.linspace(-1, 2, zeros.numel()).view(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, x))


def recur(m: Any, x: Tensor, steps: int) -> Tensor:
    h = m.state(len(x), 6)
    for _ in range(steps):
        h = (m.first(x) + F.linear(h, m.w)).relu()
    return h


def attend(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)[None].relu()
    return m.attention(m.state(*h.shape), h, h)[0][0] + h[0]


# name, network, its units
NETWORKS = [
    ("linear", lambda: Zeros(lambda m, x: (m.first(x) + m.v(m.state(len(x), 6))).relu(), v=nn.Linear(6, 6)), 6),
    ("bias only", lambda: Zeros(lambda m, x: m.v(m.state(len(x), 6)) + m.first(x), v=nn.Linear(6, 6)), 6),
    ("one step", lambda: Zeros(lambda m, x: recur(m, x, 1), w=(6, 6)), 6),
    ("two steps", lambda: Zeros(lambda m, x: recur(m, x, 2), w=(6, 6)), 6),
    (
        "used, then zeros",
        lambda: Zeros(
            lambda m, x: F.linear(F.linear(m.first(x).relu(), m.w).relu(), m.v) + F.linear(m.state(1, 6), m.w),
            w=(6, 6),
            v=(6, 6),
        ),
        18,
    ),
    (
        "zeros, then used",
        lambda: Zeros(
            lambda m, x: F.linear(m.state(1, 6), m.w) + F.linear(F.linear(m.first(x).relu(), m.w).relu(), m.v),
            w=(6, 6),
            v=(6, 6),
        ),
        18,
    ),
    ("matrix", lambda: Zeros(lambda m, x: m.first(x) + m.state(len(x), 3) @ m.w, w=(3, 6)), 6),
    ("bmm", lambda: Zeros(lambda m, x: m.first(x) + torch.bmm(m.state(2, len(x), 3), m.w).sum(0), w=(2, 3, 6)), 6),
    (
        "einsum",
        lambda: Zeros(lambda m, x: m.first(x) + torch.einsum("bi,oi->bo", m.state(len(x), 3), m.w), w=(6, 3)),
        6,
    ),
    ("vector", lambda: Zeros(lambda m, x: m.first(x) + m.w @ m.state(3), w=(6, 3)), 6),
    ("dot", lambda: Zeros(lambda m, x: m.first(x) * (2 + torch.dot(m.state(3), m.w)), w=(3,)), 6),
    ("gain", lambda: Zeros(lambda m, x: m.first(x).relu() + m.state(6) * m.w, w=(6,)), 6),
    (
        "convolution",
        lambda: Zeros(lambda m, x: m.first(x) + m.c(m.state(len(x), 4, 1))[..., 0], c=nn.Conv1d(4, 6, 1, groups=2)),
        6,
    ),
    (
        "transposed convolution",
        lambda: Zeros(lambda m, x: m.first(x) + m.c(m.state(1, 4, 1))[..., 0], c=nn.ConvTranspose1d(4, 6, 1)),
        6,
    ),
    ("bilinear", lambda: Zeros(lambda m, x: m.first(x) + m.b(m.state(len(x), 3), x), b=nn.Bilinear(3, 4, 6)), 6),
    ("a layer on zeros", lambda: Zeros(lambda m, x: m.first(x) + m.net(m.state(len(x), 3)), net=mlp(3, 5, 6)), 11),
    ("part of a packed weight", lambda: Zeros(lambda m, x: _packed(m, x), w=(12, 6)), 12),
    ("queries", lambda: Zeros(attend, attention=nn.MultiheadAttention(6, 2, batch_first=True)), 18),
    ("lstm cell", lambda: Zeros(lambda m, x: m.cell(m.first(x))[0], cell=nn.LSTMCell(6, 6)), 6),
    ("gru", lambda: Zeros(lambda m, x: m.cell(m.first(x)[None])[0][0], cell=nn.GRU(6, 6)), 6),
]


def _packed(m: Any, x: Tensor) -> Tensor:
    up, down = m.w.chunk(2)
    return F.linear(m.first(x).relu(), up).relu() + F.linear(m.state(len(x), 6), down)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Using padding='same'")
        yield


NAMED = [pytest.param(*case[1:], id=case[0]) for case in NETWORKS]


@pytest.mark.parametrize(
    ("make", "units"), few(NAMED, ["linear", "one step", "two steps", "zeros, then used", "dot", "gain", "convolution"])
)
def test_a_weight_that_meets_zeros_is_used_and_scales_as_if_it_met_a_constant(
    make: Callable[[], Zeros], units: int
) -> None:
    module, (x,) = make(), normal((8, 4))(torch.Generator().manual_seed(0), 1.0)
    draw_(module, torch.Generator().manual_seed(1))
    group = scaling_group(module, x)
    assert group.unseen == ()
    assert group.num_units == units
    before = outputs(module, x)
    group.act_(torch.linspace(-1, 2, group.num_units, dtype=torch.float64))
    after = outputs(module, x)
    assert_same(after[0], before[0])
    if make not in RECURRENT:
        assert_same(after[1], before[1])
    if module.attention is None:  # of which the count needs many draws
        assert_complete(module, normal((8, 4)))


def outputs(module: Zeros, x: Tensor) -> list[Tensor]:
    """With zeros and with other constants."""
    found = []
    for module.number in (0.7, 0.0):
        found.insert(0, evaluate(module, (x,)))
    return found


# What these weights scale by is told by another use, which reads what follows on the zeros.
RECURRENT = [make for name, make, _ in NETWORKS if name in ("two steps", "used, then zeros", "zeros, then used")]


def test_a_step_that_reads_zeros_adds_no_constraint() -> None:
    torch.manual_seed(0)
    module = Zeros(lambda m, x: m.other(F.linear(m.state(1, 6), m.w) + m.first(x)) + recur(m, x, 2), w=(6, 6))
    module.other = nn.Linear(6, 6).double()
    alone = Zeros(lambda m, x: m.other(m.first(x)) + recur(m, x, 2), w=(6, 6))
    alone.other = nn.Linear(6, 6).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    assert scaling_group(module, x).num_units == scaling_group(alone, x).num_units


BATCHES = few(TINY, ["gelu", "conv2d", "concatenation", "resnet"])


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.name)
def test_a_batch_without_rows_holds_fixed_what_it_cannot_tell(case: Case) -> None:
    module, inputs = case.build().eval(), case.inputs(torch.Generator().manual_seed(0))
    empty = tree_map_only(Tensor, lambda tensor: tensor[:0] if tensor.ndim else tensor, inputs)
    try:
        module(*empty)
    except (RuntimeError, IndexError, ValueError):
        pytest.skip("the module takes no such batch")
    group, whole = scaling_group(module, *empty), scaling_group(module, *inputs)
    assert set(group.unseen) <= set(whole.unseen)
    before = evaluate(module, inputs)
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, inputs), before)


NAMES = ("addr", "_trilinear", "convolution", "mm", "index")
OPS = [
    op for family in (test_contractions, test_indexing) for op in family.OPS if op.name in NAMES and not op.inference
]
FIRST = [next(op for op in OPS if op.name == name) for name in ("addr", "_trilinear", "index")]


@pytest.mark.parametrize("op", few(OPS, FIRST), ids=lambda op: op.name)
def test_an_operation_on_no_rows_frees_nothing(op: Op) -> None:
    module = Around(op)
    draw_(module, torch.Generator().manual_seed(2))
    x = module.example()
    try:
        module(x[:0])
    except (RuntimeError, IndexError, ValueError):
        pytest.skip("the operation takes no such batch")
    group = scaling_group(module, x[:0])
    before = evaluate(module, (x,))
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, (x,)), before)
    assert group.unseen == ()
