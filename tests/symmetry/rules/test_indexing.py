"""Rules for elements that data picks out or puts in place."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import nested_from_padded
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.symmetry.rules.ops import Op, check, detached, every, out_of, traced

GAIN, TABLE, WIDE = {"g": (4,)}, {"w": (5, 4)}, {"w": (5, 4)}
OFFSETS = torch.tensor([0, 3, 8])
LENGTHS = torch.tensor([4, 4, 3, 3, 2, 2, 1, 1])
ops = torch.ops.aten


def rows(*shape: int) -> Tensor:
    """Indices that are others on every call, as those of data are."""
    return torch.randint(5, shape or (8,))


def four(*shape: int) -> Tensor:
    return torch.randint(4, shape or (8, 4))


def distinct(*shape: int) -> Tensor:
    """Different ones along the last axis, so that there is one way to put something there."""
    return torch.rand(*shape[:-1], 4).argsort(-1)[..., : shape[-1]]


def larger(source: Tensor, *shape: int) -> Tensor:
    """A source is allowed to be larger than its index, but then has no gradient."""
    return source if traced() else source[tuple(map(slice, shape))]


def _padded(h: Tensor, value: float) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(h, OFFSETS).to_padded_tensor(value)


def _put_channels(base: Tensor, new: Tensor, places: list[int], accumulate: bool = False) -> Tensor:
    """At these channels."""
    return base.mT.index_put((torch.tensor(places),), new.mT, accumulate).mT


def _not_padded(h: Tensor) -> Tensor:
    return nested_from_padded(h.view(2, 4, 4), torch.tensor([0, 4, 8])).values()


def order(count: int = 4) -> Tensor:
    return torch.randperm(count)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.4


def _put(h: Tensor, indices: Any, values: Any, accumulate: bool = False) -> Tensor:
    return h.clone().index_put_(indices, values, accumulate)


def _assigned(h: Tensor, where: Any, values: Any) -> Tensor:
    y = h.clone()
    y[where] = values
    return y


def _from_numpy(m: Any, h: Tensor) -> Tensor:
    index = torch.zeros(4, dtype=torch.long)
    index.numpy()[:] = [3, 1, 0, 2]
    return h[:, index]


OPS = [
    # Rows of tables
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w), 4, 0, TABLE),
    Op("embedding", lambda m, h: h * F.embedding(rows(), m.w), 8, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w, padding_idx=1 if traced() else None), 4, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w, scale_grad_by_freq=traced()), 4, 0, TABLE),
    # With sparse gradients rows must do, so a table is held fixed
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w, sparse=traced()), 0, 0, TABLE, complete=False),
    Op("embedding", lambda m, h: F.linear(
        h * F.embedding(rows(), m.w, sparse=traced()), m.w), 1, 0, TABLE, complete=False),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w.clone(), max_norm=1.0), 0, 0, TABLE),
    Op("embedding", lambda m, h: h[:, None] + F.embedding(rows(8, 3), m.w), 4, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(1)[0], m.w), 4, 0, TABLE),
    Op("embedding", lambda m, h: F.linear(F.embedding(rows(), m.w) + h, m.v), 4 + 3, 0, {"w": (5, 4), "v": (3, 4)}),
    Op("embedding", lambda m, h: F.linear(F.embedding(rows(), m.w) + h, m.w), 1, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(
        rows(), m.w) + F.embedding(four(8), m.v), 4, 0, {"w": (5, 4), "v": (4, 4)}),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w) * F.embedding(rows(), m.w), 4, 0, TABLE),
    Op("embedding", lambda m, h: F.embedding(rows(), m.w + m.v) + h, 4, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w * 2), 4, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w * m.g), 8, 0, {"w": (5, 4), "g": (4,)}),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w * m.g[:, None]), 4 + 5, 0, {"w": (5, 4), "g": (5,)}),
    Op("embedding", lambda m, h: h + F.embedding(
        rows(), m.w / m.w.norm(dim=1, keepdim=True)), 5, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w * m.g), 8, 0, {"w": (5, 4), "g": (4,)}, large=True),
    Op("embedding", lambda m, h: F.linear(F.embedding(rows(), m.w) + h, m.w), 1, 0, TABLE, large=True),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w / m.w.norm(dim=0)), 4, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w.t()), 4, 0, {"w": (4, 5)}),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w.view(5, 4)), 4, 0, {"w": (20,)}),
    Op("embedding", lambda m, h: h.view(8, 2, 2) + F.embedding(rows(8, 2), m.w.view(10, 2)), 2, 0, TABLE),
    Op("embedding", lambda m, h: h + F.embedding(rows(), m.w @ m.v), 4 + 3, 0, {"w": (5, 3), "v": (3, 4)}),
    # Rows
    Op("embedding", lambda m, h: h * F.embedding(torch.arange(4), m.w)[:, 0], 4 + 1, 0, {"w": (4, 1)}, complete=False),
    Op("embedding", lambda m, h: h[F.embedding(rows(), torch.arange(5)[:, None])[:, 0]]),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(rows(8, 3), m.w), 4, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h * F.embedding_bag(rows(8, 3), m.w, mode="sum"), 8, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(rows(8, 3), m.w, mode="max"), 4, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(rows(16), m.w, torch.arange(0, 16, 2)), 4, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        rows(16), m.w, torch.arange(0, 17, 2), include_last_offset=True), 4, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(rows(8, 3), m.w, padding_idx=0), 4, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        rows(8, 3), m.w, sparse=traced()), 0, 0, TABLE, complete=False),  # sparse gradients
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        rows(8, 3), m.w.clone(), max_norm=1.0), 0, 0, TABLE),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        rows(8, 3), m.w, per_sample_weights=m.v, mode="sum"), 4 + 1, 0, {"w": (5, 4), "v": (8, 3)}),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        four(8, 4), m.w, per_sample_weights=h, mode="sum"), 1, 0, {"w": (4, 4)}),
    Op("_embedding_bag", lambda m, h: h + F.embedding_bag(
        rows(8, 3), m.w @ m.v, mode="sum"), 4 + 3, 0, {"w": (5, 3), "v": (3, 4)}),
    Op("_embedding_bag_forward_only", lambda m, h: h + F.embedding_bag(
        rows(8, 3), detached(m.w)), 4, 0, TABLE),
    Op("_embedding_bag_forward_only", lambda m, h: h * F.embedding_bag(
        rows(8, 3), detached(m.w)), 8, 0, TABLE),
    Op("_embedding_bag_forward_only", lambda m, h: h + F.embedding_bag(
        rows(8, 3), detached(m.w * m.g[:, None]), mode="sum"), 4 + 5, 0, {"w": (5, 4), "g": (5,)}),
    # Picked out
    Op("index_select", lambda m, h: h.index_select(2, torch.tensor([2, 0])), spatial=1),
    Op("index_select", lambda m, h: h.index_select(1, torch.tensor([2, 0]))),
    Op("index_select", lambda m, h: h.index_select(1, torch.tensor([2, 0, 2, 1])) + h, 1),
    Op("index_select", lambda m, h: h.index_select(2, four(3)), spatial=1),
    Op("index_select", lambda m, h: h.index_select(1, four(3)), 1),
    Op("index_select", lambda m, h: h.index_select(-1, order()) + h, 1),
    Op("index_select", lambda m, h: F.linear(h, m.w.index_select(0, rows(3))), 4 + 1, 0, WIDE),
    Op("index_select", lambda m, h: F.linear(h, m.w.index_select(0, torch.tensor([4, 0, 2]))), 4 + 3, 0, WIDE),
    Op("index_select", lambda m, h: F.linear(
        h, m.w.index_select(0, torch.tensor([4, 0, 1]))), 4 + 1, 0, WIDE, complete=False),  # no box of the parameter
    Op("index_select", lambda m, h: F.linear(h, m.w.index_select(1, order())), 1 + 5, 0, WIDE),
    Op("index_select", lambda m, h: h * m.g.index_select(0, order()), 4 + 1, 0, GAIN),
    Op("index_select", lambda m, h: out_of(torch.index_select)(h, 1, order()), 1),
    Op("index_select", lambda m, h: h.sum().index_select(0, order(1)) + 0 * h, 1),
    Op("index", lambda m, h: h[:, :, torch.tensor([2, 0])], spatial=1),
    Op("index", lambda m, h: h[:, torch.tensor([2, 0])]),
    Op("index", lambda m, h: h[:, torch.tensor([[2, 0], [0, -1]])].sum(1), 2),
    Op("index", lambda m, h: h.view(8, 2, 2)[:, torch.tensor([1, 0])] + h.view(8, 2, 2), 2),
    Op("index", lambda m, h: h[torch.arange(7, -1, -1)]),
    Op("index", lambda m, h: h[:, :, torch.tensor([[0], [1]]), torch.tensor([1, 2, 3])], spatial=2),
    Op("index", lambda m, h: h[torch.arange(8)[:, None], :, torch.tensor([1, 2, 3])].transpose(1, 2), spatial=1),
    Op("index", lambda m, h: h[:, order()], 1),
    Op("index", lambda m, h: h[order(8)] + h),
    Op("index", lambda m, h: h[:, :, four(3)], spatial=1),
    Op("index", lambda m, h: h[:, four(2, 2)] + h.view(8, 2, 2), 1),
    Op("index", lambda m, h: h[:, :, four(2, 1), four(3)], spatial=2),
    Op("index", lambda m, h: h[order(8), :, four(8)], spatial=1),
    Op("index", lambda m, h: h[order(8)[:, None], :, four(3)].transpose(1, 2), spatial=1),
    Op("index", lambda m, h: h[order(8)[:, None], four(8, 3)], 1, spatial=1),
    Op("index", lambda m, h: h[:, torch.arange(4), order()], 1, 1, complete=False),  # not all indices are known
    Op("index", lambda m, h: h[torch.arange(8)[:, None], order()], 1),
    Op("index", lambda m, h: h[four(1)[0], four()], 1),
    Op("index", lambda m, h: F.linear(h, m.w[rows(3)]), 4 + 1, 0, WIDE),
    Op("index", lambda m, h: F.linear(h, m.w[:, order()]), 1 + 5, 0, WIDE),
    Op("index", lambda m, h: F.linear(h, m.w[torch.tensor([3, 2, 4])]), 4 + 3, 0, WIDE),
    Op("index", lambda m, h: F.linear(h, m.w[rows(3)] * m.g), 4 + 1 + 4, 0, {"w": (5, 4), "g": (4,)}),
    Op("index", lambda m, h: F.linear(h, (m.w * m.g[:, None])[rows(3)]), 4 + 1 + 5, 0, {"w": (5, 4), "g": (5,)}),
    Op("index", lambda m, h: F.linear(h, m.w[rows(3)[:, None], order()]), 1 + 1, 0, WIDE),
    Op("index", lambda m, h: torch.cat([F.linear(h, m.w), F.linear(h, m.w[rows(3)])], 1), 4 + 1, 0, WIDE),
    Op("index", lambda m, h: h * m.g[order()], 4 + 1, 0, GAIN),
    Op("index", _from_numpy, 1, complete=False),  # written from outside
    Op("index", lambda m, h: h[mask(8, 4)].sum().expand(8, 4) + 0 * h, 1),
    Op("index", lambda m, h: h[:, mask(4)].sum(1), 1),
    Op("index", lambda m, h: h[mask(8)].sum(0) + 0 * h, 1, complete=False),  # a mask takes all axes
    Op("_unsafe_index", lambda m, h: ops._unsafe_index(h, [None, torch.tensor([2, 0])])),
    Op("_unsafe_index", lambda m, h: ops._unsafe_index(h, [None, order()]), 1),
    Op("_unsafe_index", lambda m, h: ops._unsafe_index(h, [None, None, four(3)]), spatial=1),
    Op("gather", lambda m, h: h.gather(1, four()), 1),
    Op("gather", lambda m, h: h.gather(-1, four(8, 4, 2)), spatial=1),
    Op("gather", lambda m, h: h.gather(2, four(8, 3, 2)) + h[:, 1:, :2], 1, 1),
    Op("gather", lambda m, h: h.gather(0, four(8, 3)) + h[:, :3]),
    Op("gather", lambda m, h: h.gather(1, four(), sparse_grad=traced()), 0, complete=False),  # a sparse gradient
    Op("gather", lambda m, h: h * m.w.gather(0, rows(8, 4)), 8, 0, TABLE),
    Op("gather", lambda m, h: h * m.w.gather(1, rows(8, 4)), 4 + 1, 0, {"w": (8, 5)}),
    Op("gather", lambda m, h: h * m.g.gather(0, order()), 4 + 1, 0, GAIN),
    # A sparse gradient
    Op("gather", lambda m, h: h * m.g.gather(0, order(), sparse_grad=traced()), 4, 0, GAIN, complete=False),
    Op("gather", lambda m, h: out_of(torch.gather)(h, 1, four()), 1),
    Op("take_along_dim", lambda m, h: h.take_along_dim(four(), 1), 1, inference=True),
    Op("take_along_dim", lambda m, h: h.take_along_dim(four(8, 1, 2), 2), spatial=1, inference=True),
    Op("take_along_dim", lambda m, h: h.take_along_dim(four(8, 4).view(-1)).view(8, 4), 1, inference=True),
    Op("take", lambda m, h: h.take(torch.randint(32, (8, 4))) + h, 1),
    Op("take", lambda m, h: h.take(torch.randint(32, (8, 4))), 1),
    Op("take", lambda m, h: h.sum(0, keepdim=True).expand(8, 4) + m.g.take(order()), 1, 0, GAIN),
    Op("masked_select", lambda m, h: h.masked_select(mask(8, 4)).sum() + 0 * h, 1),
    Op("masked_select", lambda m, h: h.masked_select(h > 0).max() + 0 * h, 1),
    Op("masked_select", lambda m, h: h[:, None].masked_select(mask(3, 1)).sum() + h, 1),
    # Put in place
    Op("index_put", lambda m, h: _put(h, (order(8),), h.relu())),
    Op("index_put", lambda m, h: _put(h, (order(8)[:3],), h[1].relu(), accumulate=True)),
    Op("index_put", lambda m, h: _put(h, (order(8)[:3], order()[:3]), h[:3, 0]), 1),
    Op("index_put", lambda m, h: _put(
        h, (order(8)[:3], order()[:3]), torch.tensor(0.0, dtype=h.dtype)), 0, complete=False),  # a zero fits all labels
    # Not all places are known
    Op("index_put", lambda m, h: _put(h, (torch.tensor([1, 0]), torch.tensor([3, 2])), m.known[:2]), 0, complete=False),
    Op("index_put", lambda m, h: _assigned(h, (slice(None), order()[:2]), h[:, :1]), 1),
    Op("index_put", lambda m, h: _assigned(h, (slice(None), slice(None), order()[:2]), h[:, :, 1:3]), spatial=1),
    Op("index_put", lambda m, h: _assigned(h, (slice(None), slice(None), order()[:2]), m.g[:, None]), 4, 1, GAIN),
    Op("index_put", lambda m, h: _assigned(
        h, (slice(None), slice(None), order()[:3], order()[:3]), h[..., 0, 1:]), spatial=2),
    Op("index_put", lambda m, h: _assigned(
        h, (slice(None), slice(None), order()[:3, None], order()[:3]), h[..., 1:, 1:]), spatial=2),
    Op("index_put", lambda m, h: _assigned(h, (order(8), slice(None), distinct(8, 1)[:, 0]), h[..., 0]), 4, 1),
    Op("index_put", lambda m, h: _assigned(
        h, (order(8), slice(None), distinct(8, 1)[:, 0]), h.roll(1, 1)[..., 0]), 1, 1),
    Op("index_put", lambda m, h: _assigned(h, (order(8)[:, None], slice(None), distinct(8, 2)), h[..., :2].mT), 4, 1),
    Op("index_put", lambda m, h: _assigned(torch.zeros_like(h), (slice(None), slice(None), order()), h), 4, 1),
    Op("index_put", lambda m, h: _assigned(torch.zeros_like(h), (order(8)), h)),
    Op("index_put", lambda m, h: _assigned(h, mask(8, 4), 0.0), 0, complete=False),  # a zero fits all labels
    Op("index_put", lambda m, h: _assigned(h, mask(8, 4), 1.0), 0),
    Op("index_put", lambda m, h: _assigned(h, mask(8, 4), m.b), 1, 0, {"b": (1,)}),
    Op("index_put", lambda m, h: _assigned(h, mask(8), h.roll(1, 1)[:1]), 1),
    Op("index_put", lambda m, h: _assigned(h, (slice(None), mask(4)), h[:, :1]), 1),
    Op("_index_put_impl", lambda m, h: ops._index_put_impl_(h.clone(), [order(8)], h.relu())),
    Op("_index_put_impl", lambda m, h: ops._index_put_impl_(h.clone(), [None, order()], h.relu(), True), 1),
    Op("_unsafe_index_put", lambda m, h: ops._unsafe_index_put(h, [order(8)], h.relu())),
    Op("_unsafe_index_put", lambda m, h: ops._unsafe_index_put(h, [None, order()], h.relu(), True), 1),
    Op("masked_scatter", lambda m, h: h.masked_scatter(mask(8, 4), h.roll(1, 1)), 1),
    Op("masked_scatter", lambda m, h: h.masked_scatter(mask(8, 4), m.w), 1, 0, {"w": (8, 4)}),
    Op("masked_scatter", lambda m, h: h.masked_scatter_(mask(4), torch.ones(32, dtype=h.dtype)), 0),
    Op("scatter", lambda m, h: h.scatter(1, distinct(8, 2), h[:, :2].relu()), 1),
    Op("scatter", lambda m, h: h.scatter(2, distinct(8, 4, 2), h[:, :, :2].relu()), spatial=1),
    Op("scatter", lambda m, h: h.scatter(-1, distinct(8, 4, 2), h.roll(1, 1)[:, :, :2]), 1, 1),
    Op("scatter", lambda m, h: h.scatter(2, distinct(8, 3, 2), larger(h.roll(1, 1), 8, 3, 2)), 1, 1),
    Op("scatter", lambda m, h: h.scatter(2, distinct(8, 2, 2), larger(h.roll(2, 1), 8, 2, 2)), 2, 1),
    Op("scatter", lambda m, h: torch.zeros_like(
        h).scatter_(2, distinct(8, 2, 2), larger(h, 8, 2, 2)) + h.roll(1, 1), 2, 1),
    Op("scatter", lambda m, h: h.scatter(0, order(8)[:3, None].expand(3, 2), h[:3, 2:]), 2),
    Op("scatter", lambda m, h: h.scatter(1, four(8, 2), 0.0), 1, complete=False),  # a zero fits all labels
    Op("scatter", lambda m, h: h.scatter(1, four(8, 2), 0.5), 0),
    Op("scatter", lambda m, h: h.scatter(2, four(8, 4, 2), 0.0), 4, 1),
    Op("scatter", lambda m, h: h.scatter(1, four(8, 2), h[:, :2], reduce="add"), 1, counted=False),  # no gradient
    Op("scatter", lambda m, h: h.scatter(1, four(8, 2), h[:, :2], reduce="multiply"), 0, counted=False),  # no gradient
    Op("scatter", lambda m, h: h.scatter(1, four(8, 2), 2.0, reduce="multiply"), 0, counted=False),  # no gradient
    Op("scatter", lambda m, h: out_of(torch.scatter)(h, 1, distinct(8, 2), larger(h.relu(), 8, 2)), 1),
    Op("scatter_add", lambda m, h: h.scatter_add(1, four(), h), 1),
    Op("scatter_add", lambda m, h: h.new_zeros(8, 3, 4).scatter_add(1, torch.randint(3, (8, 4, 4)), h).sum(1), 1, 1),
    Op("scatter_add", lambda m, h: h.new_zeros(8, 4, 2).scatter_add(2, torch.randint(2, (8, 4, 4)), h), spatial=1),
    Op("scatter_add", lambda m, h: h.clone().scatter_add_(0, order(8)[:, None].expand(8, 4), h)),
    Op("scatter_add", lambda m, h: h.scatter_add(0, order(8)[:, None].expand(8, 4), m.w), 4, 0, {"w": (8, 4)}),
    Op("scatter_add", lambda m, h: (h[:, :, None] * m.g).scatter_add(
        0, order(8).view(8, 1, 1).expand(8, 3, 4), h[:, 1:, None].expand(8, 3, 4)), 2, 0, GAIN),
    Op("scatter_add", lambda m, h: (h[:, :, None] * m.g).scatter_add(
        0, order(8).view(8, 1, 1).expand(8, 4, 3), h[:, :, None].expand(8, 4, 3)), 4 + 1, 0, GAIN),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(1, four(), h, "sum"), 1),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(2, four(8, 4, 4), h, "sum"), spatial=1),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(2, four(8, 4, 4), h, "mean", include_self=False), spatial=1),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(2, four(8, 4, 4), h.roll(1, 1), "amax"), 1, 1),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(
        2, four(8, 4, 4), h.roll(2, 1), "amin", include_self=False), 2, 1),
    Op("scatter_reduce", lambda m, h: h.scatter_reduce(
        0, order(8)[:, None].expand(8, 4), h, "prod"), 0, complete=False),  # products
    Op("index_add", lambda m, h: h.index_add(1, order(), h, alpha=2), 1),
    Op("index_add", lambda m, h: h.index_add(0, order(8), h.relu())),
    Op("index_add", lambda m, h: torch.zeros_like(h).index_add_(-1, four(4), h), spatial=1),
    Op("index_add", lambda m, h: h.index_add(0, order(8)[:2], h.roll(1, 1)[:2]), 1),
    Op("index_add", lambda m, h: h.index_add(2, four(3), m.w.expand(8, 4, 3)), 4, 1, {"w": (4, 1)}),
    Op("index_copy", lambda m, h: h.index_copy(1, order(), h), 1),
    Op("index_copy", lambda m, h: h.index_copy(0, order(8), h.relu())),
    Op("index_copy", lambda m, h: h.index_copy(2, order()[:3], h.roll(1, 1)[..., :3]), 1, 1),
    Op("index_copy", lambda m, h: torch.zeros_like(h).index_copy_(2, order()[:2], h[..., :2]) + h, 4, 1),
    Op("index_reduce", lambda m, h: h.index_reduce(1, order(), h, "mean"), 1),
    Op("index_reduce", lambda m, h: h.index_reduce(2, order(), h, "amax"), 4, 1),
    Op("index_reduce", lambda m, h: h.index_reduce(
        2, order()[:3], h.roll(2, 1)[..., 1:], "amin", include_self=False), 2, 1),
    Op("index_reduce", lambda m, h: h.index_reduce(2, order(), h, "prod"), 0, 1, complete=False),  # products
    Op("index_fill", lambda m, h: h.index_fill(2, four(2), 0.0), spatial=1),
    Op("index_fill", lambda m, h: h.index_fill(2, four(2), 0.5), 0, 1),
    Op("index_fill", lambda m, h: h.index_fill_(0, order(8)[:3], 0) + h),
    Op("index_fill", lambda m, h: h.index_fill(2, four(2), h.sum()), 1, 1),
    Op("index_fill", lambda m, h: h.index_fill(1, four(2), 0.0), 1, complete=False),  # a zero fits all labels
    Op("slice_scatter", lambda m, h: h.slice_scatter(h[:, :2].relu(), 1, 2), 2 + 2),
    Op("slice_scatter", lambda m, h: h.slice_scatter(h[:, :2], 1, 0, 4, 2) + h, 3),
    Op("slice_scatter", lambda m, h: h.slice_scatter(h[:, :1], 1, -1) + h, 3),
    Op("slice_scatter", lambda m, h: h.slice_scatter(h[:, :, :2].roll(1, 1), 2, 1, 3) + h, 1, 1),
    Op("slice_scatter", lambda m, h: h.slice_scatter(h[:4].roll(2, 1), 0, None, 4) + h, 2),
    Op("slice_scatter", lambda m, h: torch.zeros_like(h).slice_scatter(m.w.expand(8, 2), 1, 2) + h, 4, 0, {"w": (2,)}),
    Op("select_scatter", lambda m, h: h.select_scatter(h[:, 0], 1, 2) + h, 3),
    Op("select_scatter", lambda m, h: h.select_scatter(h[:, 0], 1, -1) + h, 3),
    Op("select_scatter", lambda m, h: h.select_scatter(h[:, 1], 1, -2) + h, 3),
    Op("select_scatter", lambda m, h: h.select_scatter(h[:, :, 0].relu(), -1, -2), spatial=1),
    Op("select_scatter", lambda m, h: h.select_scatter(h[:, :, 0].roll(1, 1), 2, 3) + h, 1, 1),
    Op("select_scatter", lambda m, h: h.select_scatter(m.g, 0, 3), 4, 0, GAIN),
    # Sequences of different lengths
    Op("_pack_padded_sequence", lambda m, h: pack_padded_sequence(h, LENGTHS, True).data.sum(0) + 0 * h[:, 0], 1, 1),
    Op("_pack_padded_sequence", lambda m, h: pack_padded_sequence(
        h.mT, LENGTHS, True).data.sum(0) + 0 * h[..., 0], 4, 1),
    Op("_pack_padded_sequence", lambda m, h: pack_padded_sequence(h, LENGTHS, True).data.view(8, 10), 1, 1),
    Op("_pad_packed_sequence", lambda m, h: pad_packed_sequence(
        pack_padded_sequence(h.mT, LENGTHS, True), True)[0], 4, 1, inference=True),
    Op("_pad_packed_sequence", lambda m, h: pad_packed_sequence(
        pack_padded_sequence(h.mT, LENGTHS, True), padding_value=1.0)[0].transpose(0, 1), 0, 1, inference=True),
    # Places that are the same in every call
    Op("index_put", lambda m, h: _put_channels(torch.zeros_like(h), h, [2, 0, 3, 1])),
    Op("index_put", lambda m, h: _put_channels(torch.zeros_like(h), h[:, :2], [1, 3]) + h, 2),
    Op("index_put", lambda m, h: _put_channels(h.clone(), h[:, :2].relu(), [-1, 2])),
    Op("index_put", lambda m, h: _put_channels(h.clone(), h[:, :2].relu(), [3, 2], accumulate=True), 2),
    Op("index_put", lambda m, h: _put_channels(torch.zeros_like(h), h, [1, 1, 0, 1], accumulate=True), 2),
    Op("index_put", lambda m, h: _put_channels(torch.zeros_like(h), m.w.expand(8, 2), [1, 2]) + h, 4, 0, {"w": (2,)}),
    Op("index_add", lambda m, h: torch.zeros_like(h).index_add(1, torch.tensor([1, 2, 3, 0]), h)),
    Op("index_add", lambda m, h: h.index_add(1, torch.tensor([1, 2]), h[:, 2:], alpha=2), 2),
    Op("index_add", lambda m, h: torch.zeros_like(h).index_add(0, torch.arange(8) // 2, h) + h),
    Op("index_copy", lambda m, h: h.index_copy(1, torch.tensor([1, 2, 3, 0]), h)),
    Op("index_copy", lambda m, h: torch.zeros_like(h).index_copy(1, torch.tensor([3, 0]), h[:, 1:3]) + h, 2),
    Op("_jagged_to_padded_dense_forward", lambda m, h: _padded(h, 0.0).sum(1)[four(8) % 2], counted=False),
    Op("_jagged_to_padded_dense_forward", lambda m, h: _padded(h, -inf).amax(1)[four(8) % 2], counted=False),
    Op("_jagged_to_padded_dense_forward", lambda m, h: _padded(h, 0.5).sum(1)[four(8) % 2], 0, counted=False),
    Op("_padded_dense_to_jagged_forward", lambda m, h: _not_padded(h), counted=False),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
