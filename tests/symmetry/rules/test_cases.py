"""Rules for tensors for whose rows data choose among cases: mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ecopt.symmetry import scaling_group
from tests.selection import few
from tests.symmetry.helpers import assert_same, draw_, evaluate
from tests.symmetry.rules.ops import Around, Op, check, every, traced

EXPERTS, GAINS = {"w": (3, 5, 4), "v": (3, 4, 5)}, {"b": (3, 4), "c": (3, 4)}
BY_ROW = {**EXPERTS, "g": (8, 1), "k": (8, 1)}
BIASED, WIDE = {**EXPERTS, "b": (3, 5), "c": (3, 4)}, {"w": (3, 8, 4), "v": (3, 4, 8)}


def _expert(h: Tensor) -> Tensor:
    """For each row how many of two features are positive."""
    return (h.detach()[:, :2] > 0).sum(1)


def _times(w: Tensor, x: Tensor) -> Tensor:
    """Each row by a matrix of its own."""
    return torch.bmm(w, x[..., None])[..., 0]


def _up(m: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of all rows, and their hidden units."""
    e = _expert(h)
    return e, _times(m.w[e], h).relu()


def _written_to(m: Any, h: Tensor) -> Tensor:
    e, y = _up(m, h)
    e = e.copy_(e.flip(0)) if traced() else e.flip(0)
    return _times(m.v[e], y)


def _biased(m: Any, h: Tensor) -> Tensor:
    e = _expert(h)
    y = torch.baddbmm(m.b[e][..., None], m.w[e], h[..., None])[..., 0]
    return _times(m.v[e], F.dropout(y, 0.0).relu_()) + m.c[e]


def _swapped(m: Any, h: Tensor) -> Tensor:
    """Rows along another axis meanwhile, with one more beside it."""
    e, y = _up(m, h)
    y = y.t()[..., None].permute(2, 1, 0).abs().squeeze(0).t()
    return _times(m.v[e], y.transpose(0, 1))


def _grid(m: Any, h: Tensor) -> Tensor:
    """Experts of a grid of rows."""
    e = _expert(h)
    y = (m.w[e.view(2, 4)] @ h.view(2, 4, 4, 1)).relu()
    return _times(m.v[e], y.view(8, 5))


def _by_row(m: Any, h: Tensor, change: Callable[[Tensor], Tensor] = torch.clone, *, flipped: bool = False) -> Tensor:
    """Experts of rows that have factors of their own, before and after."""
    e = _expert(h)
    y = change(_times(m.w[e], h * m.g).relu())
    return _times(m.v[e.flip(0) if flipped else e], y) * m.k


def _grouped_mm(first: Tensor, second: Tensor, ends: Tensor) -> Tensor:
    """What ``grouped_mm`` does; it knows no double precision."""
    if traced():
        return F.grouped_mm(first.float(), second.float(), offs=ends).double()
    groups = [slice(start, end) for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    if second.ndim == 3:
        return torch.cat([first[group] @ matrix for group, matrix in zip(groups, second, strict=True)])
    if first.ndim == 3:
        return torch.cat([matrix @ second[:, group] for group, matrix in zip(groups, first, strict=True)], 1)
    return torch.stack([first[:, group] @ second[group] for group in groups])


def _sorted(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the rows by experts, the rows in this order, and where the rows of each expert end."""
    e = _expert(h)
    order = e.argsort(stable=True)
    return order, h[order], (e[:, None] == torch.arange(3)).sum(0).cumsum(0).to(torch.int32)


def _mixture(m: Any, h: Tensor) -> Tensor:
    order, x, ends = _sorted(h)
    y = _grouped_mm(x, m.w.transpose(1, 2), ends).relu()
    return torch.zeros_like(h).index_copy(0, order, _grouped_mm(y, m.v.transpose(1, 2), ends))


def _gated(m: Any, h: Tensor) -> Tensor:
    order, x, ends = _sorted(h)
    gate, y = _grouped_mm(x, m.w.mT, ends).chunk(2, -1)
    y = _grouped_mm(F.silu(gate) * y, m.v.mT, ends) * torch.linspace(1, 2, 8)[:, None]
    return y[torch.empty_like(order).index_copy(0, order, torch.arange(8))]


def _mixture_by_row(m: Any, h: Tensor) -> Tensor:
    _, x, ends = _sorted(h)
    y = _grouped_mm(x * m.g, m.w.mT, ends).relu()
    return _grouped_mm(y, m.v.mT, ends) * m.k


def _transposed(m: Any, h: Tensor) -> Tensor:
    _, x, ends = _sorted(h)
    y = _grouped_mm(m.w, x.t().contiguous().t().mT, ends).relu()
    return _grouped_mm(y.mT, m.v.mT, ends)


def _summed(m: Any, h: Tensor) -> Tensor:
    """Sums over the rows of each expert."""
    _, x, ends = _sorted(h)
    y = _grouped_mm(x, m.w.mT, ends).relu()
    return (_grouped_mm(y.mT, x, ends).flatten(0, 1) * h[:, None]).flatten(1)


def _cut_otherwise(m: Any, h: Tensor) -> Tensor:
    _, x, ends = _sorted(h)
    return _grouped_mm(_grouped_mm(x, m.w.mT, ends).relu(), m.v.mT, ends.flip(0).sort()[0])


def _batch(m: Any, h: Tensor) -> Tensor:
    x = h.view(4, 2, 4)[:3]
    if not traced():
        return ((x @ m.w.mT).relu() @ m.v.mT).mean(0).repeat(4, 1) + 0 * h
    y = F.grouped_mm(x.float(), m.w.mT.float()).relu()
    return F.grouped_mm(y, m.v.mT.float()).double().mean(0).repeat(4, 1) + 0 * h


OPS = [
    # The same expert for the two layers of a row
    Op("index", lambda m, h: _times(m.v[(y := _up(m, h))[0]], y[1]), 4 + 4 + 15, 0, EXPERTS),
    Op("index", _biased, 4 + 4 + 15, 0, BIASED),
    Op("index", _swapped, 4 + 4 + 15, 0, EXPERTS),
    Op("index", _grid, 4 + 4 + 15, 0, EXPERTS),
    Op("index", lambda m, h: torch.einsum(
        "toi,ti->to", m.v[e := _expert(h)], torch.einsum("toi,ti->to", m.w[e], h).relu()), 4 + 4 + 15, 0, EXPERTS),
    Op("index", lambda m, h: (m.v[e := _expert(h)] * (m.w[e] * h[:, None]).sum(2).relu()[:, None]).sum(2),
        4 + 4 + 15, 0, EXPERTS),
    Op("index", lambda m, h: (h * m.b[e := _expert(h)]).relu() * m.c[e], 4 + 4 + 12, 0, GAINS),
    Op("index", lambda m, h: (h * m.b[_expert(h)]).relu() @ m.matrix, 4 + 1, 0, GAINS),
    Op("index", lambda m, h: torch.zeros_like(y := _up(m, h)[1]) + y, 4 + 5, 0, EXPERTS),
    # Factors of rows, beside those of experts
    Op("index", _by_row, 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y.clone().mul_(2).relu_()), 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y.t()[None].mT[0]), 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: torch.zeros(8, 5).double().copy_(y)), 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y.view(2, 4, 5).view(8, 5)), 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y * y), 4 + 9 + 15 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, flipped=True), 4 + 9 + 5 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y + y.roll(1, 0)), 4 + 2 + 5 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: y.clone().add_(y.flip(0))), 4 + 5 + 5 + 4, 0, BY_ROW),
    Op("index", lambda m, h: _by_row(m, h, lambda y: F.pad(y, (0, 0, 1, 1))[1:-1]), 22, 0, BY_ROW, complete=False),
    Op("index", lambda m, h: _by_row(m, h, torch.sigmoid), 4 + 2 + 4, 0, BY_ROW),
    # Another expert
    Op("index", lambda m, h: _times(m.v[(y := _up(m, h))[0].flip(0)], y[1]), 4 + 4 + 5, 0, EXPERTS),
    Op("index", lambda m, h: _times(m.v[(y := _up(m, h))[0]], y[1].flip(0)), 4 + 4 + 5, 0, EXPERTS),
    Op("index", lambda m, h: _times(m.v[(y := _up(m, h))[0]], y[1] + y[1].roll(1, 0)), 4 + 4 + 5, 0, EXPERTS),
    Op("index", _written_to, 4 + 4 + 5, 0, EXPERTS),
    # Experts that are looked up again are not known to be the same
    Op("index", lambda m, h: _times(m.v[_expert(h)], _up(m, h)[1]), 4 + 4 + 5, 0, EXPERTS, complete=False),
    # Rows that are mixed, or leave
    Op("index", lambda m, h: _up(m, h)[1], 4 + 5, 0, EXPERTS),
    Op("index", lambda m, h: _up(m, h)[1].sum(0) + 0 * h[:, :1], 4 + 5, 0, EXPERTS),
    Op("index", lambda m, h: torch.cat(_up(m, h)[1].split(4)), 4 + 5, 0, EXPERTS),
    Op("index", lambda m, h: F.layer_norm(_up(m, h)[1], (5,)), 4, 0, EXPERTS),
    Op("index", lambda m, h: torch.stack([h, 2 * h, h.flip(1)])[_expert(h), torch.arange(8)], 2),
    Op("index", lambda m, h: torch.einsum("eoi,ti->teo", m.w, h)[torch.arange(8), _expert(h)], 4 + 5, 0, EXPERTS),
    Op("index_select", lambda m, h: (h + m.b.index_select(0, e := _expert(h))) * m.c.index_select(0, e), 8, 0, GAINS),
    Op("index_select", lambda m, h: _times(m.v.index_select(0, (y := _up(m, h))[0]), y[1]), 4 + 4 + 15, 0, EXPERTS),
    # Groups of rows between offsets
    Op("_grouped_mm", _mixture, 4 + 4 + 24, 0, WIDE),
    Op("_grouped_mm", _mixture_by_row, 4 + 9 + 24 + 4, 0, {**BY_ROW, **WIDE}),
    Op("_grouped_mm", _gated, 4 + 4 + 12, 0, {"w": (3, 8, 4), "v": (3, 4, 4)}),
    Op("_grouped_mm", _transposed, 4 + 4 + 24, 0, WIDE),
    Op("_grouped_mm", _summed, 4 + 24, 0, WIDE),
    Op("_grouped_mm", _cut_otherwise, 4 + 4 + 8, 0, WIDE, complete=False),
    Op("_grouped_mm", _batch, 4 + 4 + 24, 0, WIDE),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


MIXING = {
    "sum": lambda y: y.sum(0, keepdim=True) + 0 * y,
    "view": lambda y: y.view(1, -1, 5).sum(1) + 0 * y,
    "flat": lambda y: y.view(-1).view(-1, 5).flip(0) + y,
    "axes": lambda y: y[None].transpose(0, 1).sum(0) + 0 * y,
    "same memory": lambda y: (y[None], y[None].transpose(0, 1).neg(), y[None].sum(1) + 0 * y)[2],
    "outer": lambda y: (y[:, None] * y[None]).sum(1),
    "squeezed": lambda y: y.squeeze().view(-1, 5).cumsum(0),
    "expanded": lambda y: y[:1].expand(len(y), 5) + y,
    "strided": lambda y: y.as_strided((len(y), 5), (5, 1)).sum(0) + 0 * y,
    "unbound": lambda y: y.unbind(0)[0] + y,
    "permuted": lambda y: y[:, :, None].permute(2, 0, 1).mean(1) + 0 * y,
    "in place": lambda y: y.clone().add_(y.flip(0)),
    "matrix": lambda y: torch.softmax(y.detach() @ y.detach().t(), 1) @ y,
}


@pytest.mark.parametrize("rows", few([1, 3], [1]))
@pytest.mark.parametrize("mixed", MIXING.values(), ids=MIXING)
def test_rows_that_are_mixed_have_one_scale_whatever_the_example(mixed: Callable[[Tensor], Tensor], rows: int) -> None:
    """A batch of one row looks as if nothing were mixed."""
    op = Op("index", lambda m, h: _times(m.v[(y := _up(m, h))[0]], mixed(y[1])), 0, 0, EXPERTS)
    module = Around(op)
    draw_(module, torch.Generator().manual_seed(2))
    group = scaling_group(module, module.example()[:rows])
    before = evaluate(module, (module.example(),))
    group.act_(torch.randn(group.num_units, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)
    assert rows == 1 or group.num_units >= 4 + 4


def _behind_the_back(m: Any, h: Tensor) -> Tensor:
    """The index changes through NumPy, where no operation shows it."""
    e = _expert(h)
    array = e.numpy()
    y = _times(m.w[e], h).relu()
    array[:] = array[::-1].copy()
    return _times(m.v[e], y)


def test_an_index_that_has_left_torch_is_never_known_to_be_the_same() -> None:
    module = Around(Op("index", _behind_the_back, 0, 0, EXPERTS))
    draw_(module, torch.Generator().manual_seed(2))
    group = scaling_group(module, module.example())
    assert group.num_units == 4 + 4 + 5
    before = evaluate(module, (module.example(),))
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)


def test_tables_with_very_many_rows_have_one_scale_for_all() -> None:
    module = Around(Op("index", lambda m, h: h * m.b[e := _expert(h)] * m.c[e], 0, 0, {"b": (2000, 4), "c": (2000, 4)}))
    assert scaling_group(module, module.example()).num_units == 4 + 4 + 4
