"""Rules for what is done element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

GAIN, TWO, HEADS = {"g": (4,)}, {"g": (4,), "k": (4,)}, {"g": (2, 2)}
SQUARE, WIDE = {"w": (4, 4)}, {"w": (5, 4)}


def _zeros(h: Tensor, *shape: int) -> Tensor:
    return torch.zeros(8, *shape, dtype=h.dtype)


def _interleaved(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 9)
    y[:, ::2][:, :4] = h
    y[:, 1::2] = h.flip(1)
    return y


def _turned(y: Tensor) -> Tensor:
    """The quarter turn of a rotary embedding: the second half, negated, before the first."""
    a, b = y.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _rotary(m: Any, h: Tensor) -> Tensor:
    """Positions in groups of features, after a gain per head."""
    y = h.view(8, 2, 2) * m.g
    angle = torch.arange(8.0, dtype=h.dtype)[:, None, None]
    return y * angle.cos() + _turned(y) * angle.sin()


def _pairs(y: Tensor) -> Tensor:
    return y[..., ::2] * y[..., 1::2] + y.sum(-1, keepdim=True) ** 2


def _column_by_column(m: Any, h: Tensor) -> Tensor:
    y = torch.empty_like(h)
    for k in range(4):
        y[:, k] = h[:, 3 - k]
    return y + h


def _nested(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 2, 6)
    y[:, 1][:, 1:5][:, ::2] = h[:, :2]
    y[:, 0, 2:] = h
    return torch.cat([y, y.roll(3, -1)], 1).sum(1)


def _transposed(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros(4, 8, dtype=h.dtype)
    y.t()[:, 2:] = h[:, :2]
    return y.t() + h


def _permuted(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros(2, 8, 2, dtype=h.dtype)
    y.permute(1, 2, 0)[:, :, 1:].copy_(h.view(8, 2, 2)[:, :, :1])
    y.transpose(0, 1)[:, 0] = h[:, 1::2]
    return y.sum(2).t()


def _read_in_another_shape(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 8)
    y[:, :4] = h
    y[:, 4:] = h.relu()
    return y.view(8, 2, 4).sum(1)


def _read_across(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 8)
    y[:, 1:5] = h
    return y.view(8, 4, 2).sum(2)


def _read_before_and_after(m: Any, h: Tensor) -> Tensor:
    y = h.clone()
    part, before = y[:, 1:3], y[:, 1:3].clone()
    part.copy_(h[:, 2:])
    return torch.cat([before + y[:, 2:], part], 1)


def _written_in_another_shape(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 8)
    y.view(8, 2, 4)[:, 1] = h
    y.view(8, 4, 2)[..., 0] = h
    return y


def _into_every_third(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 10)
    y[:, 0::3] = h
    y[:, 1::3] += h[:, 1:]
    y[:, 2::3] -= h[:, :3]
    return y[:, 3:] + y[:, :-3]


def _rows(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[::2] = h[::2]
    y[1::2] = h[1::2].relu() * 3
    return y


def _shifted(m: Any, h: Tensor) -> Tensor:
    y = h.clone()
    y[:, 1:] += h[:, :-1]
    return y


def _halves_added(m: Any, h: Tensor) -> Tensor:
    y = h.clone()
    y[:, :2] += y[:, 2:]
    return y


def _parameter_written(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 8)
    y[:, :4] = h
    y[:, 4:] = m.g
    return y


def _parameter_everywhere(m: Any, h: Tensor) -> Tensor:
    y = torch.empty_like(h)
    y[:] = m.g
    return y * h


def _weight_assembled(m: Any, h: Tensor) -> Tensor:
    weight = h.new_empty(5, 4)
    weight[:2], weight[2:] = m.w[:2], m.w[2:]
    return F.linear(h, weight)


def _into_a_diagonal(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 4, 4)
    y.diagonal(dim1=1, dim2=2).copy_(h)
    return y


def _out_into_a_part(m: Any, h: Tensor) -> Tensor:
    y = _zeros(h, 6)
    torch.abs(h.detach(), out=y[:, 1:5])
    return y


def _changed_while_seen(m: Any, h: Tensor) -> Tensor:
    y = h * 1
    seen = y.view(8, 2, 2)
    y[:, 0] *= 2
    y.relu_()
    return seen + h.flip(1).view(8, 2, 2)


OPS = [
    # Homogeneous functions
    Op("relu", lambda m, h: h.relu()),
    Op("relu", lambda m, h: h.relu_()),
    Op("relu", lambda m, h: F.linear(h, m.w.relu()), 4 + 5, 0, WIDE),
    Op("relu", lambda m, h: h * m.g.relu(), 4 + 4, 0, GAIN),
    Op("leaky_relu", lambda m, h: F.leaky_relu(h, 0.3)),
    Op("leaky_relu", lambda m, h: F.leaky_relu_(h, 0.3)),
    Op("leaky_relu", lambda m, h: out_of(torch._C._nn.leaky_relu)(h) + h),
    Op("abs", lambda m, h: h.abs()),
    Op("abs", lambda m, h: h.abs_()),
    Op("abs", lambda m, h: torch.complex(h, h.roll(1, 1)).abs(), 1),
    Op("abs", lambda m, h: F.linear(h, m.w.abs()), 4 + 5, 0, WIDE),
    Op("absolute", lambda m, h: h.absolute(), inference=True),
    Op("neg", lambda m, h: -h),
    Op("neg", lambda m, h: h.neg_()),
    Op("neg", lambda m, h: h + -m.b, 4, 0, {"b": (4,)}),
    Op("negative", lambda m, h: h.negative(), inference=True),
    Op("rrelu_with_noise", lambda m, h: F.rrelu(h, training=True)),
    Op("rrelu_with_noise", lambda m, h: F.rrelu(h, training=False)),
    Op("nan_to_num", lambda m, h: h.nan_to_num()),
    Op("nan_to_num", lambda m, h: h.nan_to_num_(0.0, 9.0, -9.0)),
    Op("_prelu_kernel", lambda m, h: F.prelu(h, m.w), shapes={"w": (4,)}),
    Op("_prelu_kernel", lambda m, h: F.prelu(h, m.w), spatial=1, shapes={"w": (1,)}),
    Op("_prelu_kernel", lambda m, h: F.prelu(h + m.w, m.w), 0, shapes={"w": (4,)}),
    Op("prelu", lambda m, h: F.prelu(h, m.w), shapes={"w": (4,)}, inference=True),
    Op("prelu", lambda m, h: F.prelu(h + m.w, m.w), 0, 0, {"w": (4,)}, True),
    Op("native_dropout", lambda m, h: torch.native_dropout(h, 0.3, True)[0]),
    Op("native_dropout", lambda m, h: F.linear(h, torch.native_dropout(m.w, 0.3, True)[0]), 4 + 5, 0, WIDE),
    Op("native_dropout", lambda m, h: h * torch.native_dropout(h, 0.3, True)[1]),
    Op("native_dropout", lambda m, h: h + torch.native_dropout(h, 0.3, True)[1], 0),
    # What is compared with or cut at something
    Op("clamp", lambda m, h: h.clamp(0, None)),
    Op("clamp", lambda m, h: h.clamp_(0, 0.5), 0),
    Op("clamp", lambda m, h: h.clamp(max=h.roll(1, 1)), 1),
    Op("clamp", lambda m, h: h.clamp(-h.abs() / 2, h.relu())),
    Op("clamp", lambda m, h: h.clamp(m.b), 4, 0, {"b": (4,)}),
    Op("clamp", lambda m, h: h.clamp(m.b[:, None], m.c), 1, 1, {"b": (4,), "c": (4,)}),
    Op("clamp", lambda m, h: F.linear(h, m.w.clamp(min=0)), 4 + 5, 0, WIDE),
    Op("clamp", lambda m, h: F.linear(h, m.w.clamp(-0.5, 0.5)), 1, 0, WIDE),
    Op("clamp_min", lambda m, h: h.clamp_min(0)),
    Op("clamp_min", lambda m, h: h.clamp_min_(0.25), 0),
    Op("clamp_min", lambda m, h: h.clamp_min(h.roll(1, 1)), 1),
    Op("clamp_max", lambda m, h: h.clamp_max(0)),
    Op("clamp_max", lambda m, h: h.clamp_max(0.5), 0),
    Op("clip", lambda m, h: h.clip(0), inference=True),
    Op("clip", lambda m, h: h.clip(-0.5, 0.5), 0, inference=True),
    Op("hardtanh", lambda m, h: F.hardtanh(h, 0, 0.5), 0),
    Op("hardtanh", lambda m, h: F.hardtanh(h, -0.5, 0), 0),
    Op("threshold", lambda m, h: F.threshold(h, 0, 0)),
    Op("threshold", lambda m, h: F.threshold_(h, 0.2, 0), 0, counted=False),  # a jump has no gradient
    Op("threshold", lambda m, h: F.threshold(h, 0, 0.2), 0),
    Op("where", lambda m, h: torch.where(h > 0, h, 0.1 * h)),
    Op("where", lambda m, h: torch.where(h > 0, h, 0.0)),
    Op("where", lambda m, h: torch.where(h > 0, 0.0, h)),
    Op("where", lambda m, h: torch.where(h > 0, h, 1.0), 0),
    Op("where", lambda m, h: torch.where(h > 0, h, h.roll(1, 1)), 1),
    Op("where", lambda m, h: torch.where(h > 0, h, m.b), 4, 0, {"b": (4,)}),
    Op("where", lambda m, h: F.linear(h, torch.where(m.matrix > 0, m.w, 0.0)), 4 + 4, 0, SQUARE),
    Op("where", lambda m, h: out_of(torch.where)(h > 0, h, h.square()), 0),
    Op("where", lambda m, h: h * torch.where(h > 0, m.g, 0.0).sum(1, keepdim=True), 4 + 1, 0, GAIN),
    Op("masked_fill", lambda m, h: h.masked_fill(h < 0, 0.0)),
    Op("masked_fill", lambda m, h: h.masked_fill_(h < 0, 0.5), 0),
    Op("masked_fill", lambda m, h: h.masked_fill(h < 0, h[0, 0]), 1),
    Op("masked_fill", lambda m, h: F.linear(h, m.w.masked_fill(m.matrix > 0, 0)), 4 + 4, 0, SQUARE),
    # Comparisons: jumps have no gradient, so most of these cannot be counted
    Op("gt", lambda m, h: h * (h > 0)),
    Op("gt", lambda m, h: h * (h > 0.1), 0, counted=False),
    Op("gt", lambda m, h: h * (h > m.b), 4, 0, {"b": (4,)}),
    Op("gt", lambda m, h: F.linear(h, m.w * (m.w > m.v)), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("ge", lambda m, h: h * (h >= h.roll(1, 1)), 1, counted=False),
    Op("ge", lambda m, h: h.clone().ge_(h.relu()) * h),
    Op("lt", lambda m, h: h * (h < 0)),
    Op("lt", lambda m, h: h * (h < 0.1), 0, counted=False),
    Op("le", lambda m, h: h * (h <= h.roll(1, 1)), 1, counted=False),
    Op("le", lambda m, h: h * (h <= h.square()), 0, counted=False),
    Op("eq", lambda m, h: h.relu() * (h.relu() == 0).logical_not()),
    Op("eq", lambda m, h: h * (h == h.amax(1, keepdim=True)), 1, counted=False),
    Op("eq", lambda m, h: h * (h == h.roll(1, 1)).logical_not(), 1, counted=False),
    Op("ne", lambda m, h: h * (h.relu() != 0)),
    Op("ne", lambda m, h: h * (h != h.roll(1, 1)), 1, counted=False),
    Op("ne", lambda m, h: h * (h != h.amax(1, keepdim=True)), 1, counted=False),
    Op("greater", lambda m, h: h * h.greater(0), inference=True),
    Op("greater", lambda m, h: h * h.greater(0.1), 0, inference=True, counted=False),
    Op("greater_equal", lambda m, h: h * h.greater_equal(0), inference=True),
    Op("greater_equal", lambda m, h: h * h.greater_equal(m.known), 0, inference=True, counted=False),
    Op("less", lambda m, h: h * h.less(h.roll(1, 1)), 1, inference=True, counted=False),
    Op("less_equal", lambda m, h: h * h.less_equal(0.1), 0, inference=True, counted=False),
    Op("less_equal", lambda m, h: h * h.less_equal(h.relu()), inference=True),
    Op("not_equal", lambda m, h: h * h.relu().not_equal(0), inference=True),
    Op("not_equal", lambda m, h: h * h.not_equal(h.amax(1, keepdim=True)), 1, inference=True, counted=False),
    Op("not_equal", lambda m, h: h * h.not_equal(h.roll(1, 1)), 1, inference=True, counted=False),
    Op("sign", lambda m, h: h * h.sign()),
    Op("sign", lambda m, h: torch.cat([h, h.clone().sign_()], 1)),
    Op("sgn", lambda m, h: h * h.sgn()),
    Op("sgn", lambda m, h: torch.complex(h, h.relu()).sgn().real * h),
    Op("signbit", lambda m, h: h * h.signbit()),
    Op("logical_not", lambda m, h: h * h.relu().logical_not()),
    Op("isnan", lambda m, h: h * h.isnan().logical_not()),
    Op("isinf", lambda m, h: h * h.isinf().logical_not()),
    Op("isfinite", lambda m, h: h * h.isfinite(), inference=True),
    Op("nonzero", lambda m, h: h * h.relu().nonzero().sum()),
    Op("nonzero", lambda m, h: h * len(h.relu().nonzero())),
    Op("count_nonzero", lambda m, h: h * h.relu().count_nonzero(1)[:, None]),
    Op("count_nonzero", lambda m, h: h * h.relu().count_nonzero()),
    Op("any", lambda m, h: h * h.relu().any(1, keepdim=True)),
    Op("any", lambda m, h: h * h.relu().any()),
    Op("all", lambda m, h: h * h.relu().all(-1, keepdim=True).logical_not()),
    Op("all", lambda m, h: h * h.relu().all((0, 1)).logical_not()),
    Op("heaviside", lambda m, h: h * h.detach().heaviside(m.known[0])),
    Op("heaviside", lambda m, h: h + h.detach().heaviside(m.known), 0),
    Op("heaviside", lambda m, h: h * h.detach().relu().heaviside(h.detach().roll(1, 1)), 0, counted=False),  # jumps
    # Sums
    Op("add", lambda m, h: h + h.relu()),
    Op("add", lambda m, h: h.clone().add_(h.roll(1, 1)), 1),
    Op("add", lambda m, h: out_of(torch.add)(h, h, alpha=2)),
    Op("add", lambda m, h: h + 1, 0),
    Op("add", lambda m, h: h + 0),
    Op("add", lambda m, h: h + m.b, shapes={"b": (4,)}),
    Op("add", lambda m, h: m.b + h, shapes={"b": (4,)}),
    Op("add", lambda m, h: h + m.b, 1, shapes={"b": (1,)}),
    Op("add", lambda m, h: h + m.b, 1, shapes={"b": ()}),
    Op("add", lambda m, h: h + m.b.unsqueeze(1), spatial=1, shapes={"b": (4,)}),
    Op("add", lambda m, h: h + m.b, 1, spatial=1, shapes={"b": (4,)}),
    Op("add", lambda m, h: h + m.b, 4, 1, {"b": (4, 4)}),
    Op("add", lambda m, h: h + m.b, 4, 0, {"b": (8, 4)}),
    Op("add", lambda m, h: h + m.b + m.b, 4, 0, {"b": (4,)}),
    Op("add", lambda m, h: h.roll(1, 1) + m.b + (h + m.b), 1, 0, {"b": (4,)}),
    Op("add", lambda m, h: h + (m.w * m.g)[0], 4 + 4, 0, {"w": (2, 4), "g": (4,)}),
    Op("add", lambda m, h: h * (m.g + m.k), 8, 0, TWO),
    Op("add", lambda m, h: h * (m.g + 1), 4, 0, GAIN),
    Op("add", lambda m, h: F.linear(h, m.w + m.v), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("add", lambda m, h: (h @ (m.w + m.v)).transpose(0, 1), 4 + 5, 0, {"w": (4, 5), "v": (2, 4, 5)}),
    Op("add", lambda m, h: F.linear(h, m.w + m.w), 4 + 5, 0, WIDE),
    Op("add", lambda m, h: F.linear(h, m.w + m.v + m.w), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("add", lambda m, h: F.linear(h, m.w + m.b[:, None]), 1 + 5, 0, {"w": (5, 4), "b": (5,)}),
    Op("add", lambda m, h: F.linear(h, m.w + m.a @ m.c), 4 + 5 + 2, 0, {"w": (5, 4), "a": (5, 2), "c": (2, 4)}),
    Op("add", lambda m, h: F.linear(h, m.a @ m.c + m.w), 4 + 5 + 2, 0, {"w": (5, 4), "a": (5, 2), "c": (2, 4)}),
    Op("add", lambda m, h: F.linear(h, m.w + 1), 1, 0, WIDE),
    Op("add", lambda m, h: F.linear(h, m.w + 0), 4 + 5, 0, WIDE),
    Op("add", lambda m, h: torch.cat(
        [F.linear(h, m.w + m.v), F.linear(h, m.v)], 1), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("add", lambda m, h: F.linear(h, torch.zeros_like(m.w).add_(m.w)), 4 + 5, 0, WIDE),
    Op("sub", lambda m, h: h - h.relu()),
    Op("sub", lambda m, h: h.clone().sub_(h[:, :1]), 1),
    Op("sub", lambda m, h: h - m.known, 0),
    Op("sub", lambda m, h: h - m.b, 4, 0, {"b": (4,)}),
    Op("sub", lambda m, h: h - (m.w * m.g)[0], 4 + 4, 0, {"w": (2, 4), "g": (4,)}),
    Op("sub", lambda m, h: F.linear(h, m.w - m.w.mean(1, keepdim=True)), 1 + 5, 0, WIDE),
    Op("subtract", lambda m, h: h.subtract(h.relu()), inference=True),
    Op("subtract", lambda m, h: h.subtract(h.roll(1, 1)), 1, inference=True),
    Op("rsub", lambda m, h: torch.rsub(h, h.relu())),
    Op("rsub", lambda m, h: 1 - h, 0),
    Op("maximum", lambda m, h: torch.maximum(h, 0.2 * h)),
    Op("maximum", lambda m, h: torch.maximum(h, m.known), 0),
    Op("maximum", lambda m, h: torch.maximum(h, m.b), 4, 0, {"b": (4,)}),
    Op("maximum", lambda m, h: F.linear(h, torch.maximum(m.w, m.v)), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("minimum", lambda m, h: torch.minimum(h, h.roll(1, 1)), 1),
    Op("minimum", lambda m, h: torch.minimum(h, 0.2 * h)),
    Op("fmax", lambda m, h: torch.fmax(h, 0.2 * h)),
    Op("fmax", lambda m, h: torch.fmax(h, h.flip(1)), 2),
    Op("fmin", lambda m, h: torch.fmin(h, m.known), 0),
    Op("fmin", lambda m, h: torch.fmin(h, 0.2 * h)),
    # Products
    Op("mul", lambda m, h: h * m.known),
    Op("mul", lambda m, h: h.mul_(3)),
    Op("mul", lambda m, h: h * 0 + h),
    Op("mul", lambda m, h: h * h.roll(1, 1)),
    Op("mul", lambda m, h: h * h.roll(1, 1) + h, 0),
    Op("mul", lambda m, h: h * h.relu() + h.flip(1) * h, 2),
    Op("mul", lambda m, h: out_of(torch.mul)(h, h[:, :1])),
    Op("mul", lambda m, h: h[:, :, None] * h[:, None]),
    Op("mul", lambda m, h: (h[:, :, None] * h[:, None]).sum(1), 1),
    Op("mul", lambda m, h: h * m.g, 8, shapes={"g": (4,)}),
    Op("mul", lambda m, h: (m.g * h).abs(), 8, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h * m.g[:, None], 8, spatial=1, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h * m.g, 8, 1, GAIN),
    Op("mul", lambda m, h: h * m.g, 4 + 16, 1, {"g": (4, 4)}),
    Op("mul", lambda m, h: (h * m.g).sum(2), 4 + 4, 1, {"g": (4, 4)}),
    Op("mul", lambda m, h: h * m.g, 5, 0, {"g": ()}),
    Op("mul", lambda m, h: h * m.g, 5, 0, {"g": (1, 1)}),
    Op("mul", lambda m, h: h.sum() * m.g + 0 * h, 1 + 4, 0, GAIN),
    Op("mul", lambda m, h: h * m.g + h, 4, 0, GAIN),
    Op("mul", lambda m, h: h * m.g * m.g, 8, 0, GAIN),
    Op("mul", lambda m, h: h * m.g + h.roll(1, 1) * m.g, 5, 0, GAIN),
    Op("mul", lambda m, h: h * m.g + h.roll(1, 1) * m.k, 4 + 4, 0, TWO),
    Op("mul", lambda m, h: h @ (m.w * (m.matrix > 0)), 8, shapes={"w": (4, 4)}),
    # A gain of two axes, used whole and in parts
    Op("mul", _rotary, 6, 0, HEADS),
    Op("mul", lambda m, h: _pairs(h.view(8, 2, 2) * m.g), 6, 0, HEADS),
    Op("mul", lambda m, h: (y := F.layer_norm(h.view(8, 2, 2), (2,)) * m.g) + _turned(y), 2, 0, HEADS),
    Op("mul", lambda m, h: torch.cat([(y := h.view(8, 2, 2) * m.g)[:, 0], y[:, :, 1]], 1), 7, 0, HEADS),
    Op("mul", lambda m, h: h.mean(1, keepdim=True) * m.g, 5, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h * (m.g * m.k), 12, shapes={"g": (4,), "k": (4,)}),
    # A gain that meets zeros follows what its product is added to, though any factor would do.
    Op("mul", lambda m, h: torch.zeros_like(h) * m.g + h, 4, 0, GAIN),
    Op("mul", lambda m, h: F.linear(h, m.w * m.g[:, None]), 4 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}),
    Op("mul", lambda m, h: F.linear(h, m.g * m.w), 4 + 5 + 4, 0, {"w": (5, 4), "g": (4,)}),
    Op("mul", lambda m, h: F.linear(
        h, m.w * m.g * m.k[:, None] * 2), 4 + 5 + 4 + 5, 0, {"w": (5, 4), "g": (4,), "k": (5,)}),
    Op("mul", lambda m, h: F.linear(h, m.w * m.v), 4 + 5 + 20, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("mul", lambda m, h: F.linear(h, m.w * m.w), 4 + 5, 0, WIDE),
    Op("mul", lambda m, h: F.linear(h, m.w * h.mean()), 1 + 5, 0, WIDE),
    Op("mul", lambda m, h: (m.w * h[:, None]).sum(2), 4 + 5, 0, WIDE),
    Op("mul", lambda m, h: F.linear(h, m.w * m.g) + F.linear(h, m.w), 4 + 5, 0, {"w": (5, 4), "g": ()}),
    Op("multiply", lambda m, h: h.multiply(m.known), inference=True),
    Op("multiply", lambda m, h: h.multiply(h.roll(1, 1)) + h, 0, inference=True),
    Op("div", lambda m, h: h / m.known),
    Op("div", lambda m, h: h.div_(3)),
    Op("div", lambda m, h: m.known / (h.abs() + 1), 0),
    Op("div", lambda m, h: m.known / h),
    Op("div", lambda m, h: h / h.roll(1, 1) + 1, 1),
    Op("div", lambda m, h: h / h.abs().sum(1, keepdim=True), 1),
    Op("div", lambda m, h: h / m.g, 8, 0, GAIN),
    Op("div", lambda m, h: m.g / h, 8, 0, GAIN),
    Op("div", lambda m, h: h / m.g, 4 + 16, 1, {"g": (4, 4)}),
    Op("div", lambda m, h: (m.w / h[:, None]).sum(2), 4 + 5, 0, WIDE),
    Op("div", lambda m, h: 8 * h.div(0.1, rounding_mode="floor"), 0),
    Op("div", lambda m, h: h + m.known.div(0.1, rounding_mode="floor"), 0),
    # Jumps
    Op("div", lambda m, h: h * (4 * h).div(h.abs().sum(1, keepdim=True), rounding_mode="floor"), 0, counted=False),
    Op("div", lambda m, h: h @ (m.w / 3), 8, shapes={"w": (4, 4)}),
    Op("div", lambda m, h: F.linear(h, m.w / m.g[:, None]), 4 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}),
    Op("div", lambda m, h: F.linear(h, m.w / m.w.norm(dim=1, keepdim=True)), 1 + 5, 0, WIDE),
    Op("div", lambda m, h: F.linear(
        h, m.g[:, None] * m.w / m.w.norm(dim=1, keepdim=True)), 1 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}),
    Op("div", lambda m, h: F.linear(h, m.w / m.w.norm()), 1 + 1, 0, WIDE),
    Op("div", lambda m, h: F.linear(h, m.w / m.w.sum(0)), 4 + 1, 0, WIDE),
    Op("divide", lambda m, h: h.divide(m.known), inference=True),
    Op("divide", lambda m, h: h.divide(h.roll(1, 1)) + 1, 1, inference=True),
    Op("true_divide", lambda m, h: h.true_divide(m.known), inference=True),
    Op("true_divide", lambda m, h: h.true_divide(h.roll(1, 1)) + 1, 1, inference=True),
    Op("addcmul", lambda m, h: torch.addcmul(h, h, h), 0),
    Op("addcmul", lambda m, h: torch.addcmul(h.square(), h, h.relu(), value=2)),
    Op("addcmul", lambda m, h: h.square().addcmul_(h, h.roll(1, 1)), 1),
    Op("addcmul", lambda m, h: torch.addcmul(m.b, h, m.g), 8, 0, {"g": (4,), "b": (4,)}),
    Op("addcmul", lambda m, h: torch.addcmul(h, m.known, h)),
    Op("addcmul", lambda m, h: F.linear(h, torch.addcmul(m.w, m.v, m.known)), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    Op("addcdiv", lambda m, h: torch.addcdiv(h, h.square(), h)),
    Op("addcdiv", lambda m, h: torch.addcdiv(h, h, h), 0),
    Op("addcdiv", lambda m, h: torch.addcdiv(h, h, m.g), 4, 0, GAIN),
    Op("addcdiv", lambda m, h: torch.addcdiv(m.b, m.g, h, value=-1), 8, 0, {"g": (4,), "b": (4,)}),
    Op("lerp", lambda m, h: torch.lerp(h, h.relu(), 0.3)),
    Op("lerp", lambda m, h: torch.lerp(h, h.roll(1, 1), m.known), 1),
    Op("lerp", lambda m, h: torch.lerp(h, h.relu(), m.w), 4, 0, {"w": (4,)}),
    Op("lerp", lambda m, h: torch.lerp(h, h.relu(), h), 0),
    Op("lerp", lambda m, h: torch.lerp(m.b, h, m.known), 4, 0, {"b": (4,)}),
    Op("lerp", lambda m, h: F.linear(h, torch.lerp(m.w, m.v, 0.3)), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}),
    # Matrices with very many elements: where they are tensors among others, scales change along one axis alone
    Op("mul", lambda m, h: F.linear(h, m.w * m.g[:, None]), 4 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}, large=True),
    Op("mul", lambda m, h: F.linear(h, m.g * m.w), 4 + 5 + 4, 0, {"w": (5, 4), "g": (4,)}, large=True),
    Op("mul", lambda m, h: F.linear(
        h, m.w * m.v), 4 + 5 + 4, 0, {"w": (5, 4), "v": (5, 4)}, large=True, complete=False),
    Op("mul", lambda m, h: (m.w * h[:, None]).sum(2), 4 + 5, 0, WIDE, large=True),
    Op("mul", lambda m, h: F.linear(h, m.w * (m.matrix > 0)), 4 + 4, 0, SQUARE, large=True),
    Op("div", lambda m, h: F.linear(h, m.w / m.g[:, None]), 4 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}, large=True),
    Op("div", lambda m, h: F.linear(h, m.w / m.w.norm(dim=1, keepdim=True)), 1 + 5, 0, WIDE, large=True),
    Op("div", lambda m, h: F.linear(
        h, m.g[:, None] * m.w / m.w.norm(dim=1, keepdim=True)), 1 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}, large=True),
    Op("div", lambda m, h: F.linear(
        h, m.g[:, None] * (m.w / m.w.norm(dim=1, keepdim=True))), 1 + 5 + 5, 0, {"w": (5, 4), "g": (5,)}, large=True),
    Op("add", lambda m, h: F.linear(h, m.w + m.v), 4 + 5, 0, {"w": (5, 4), "v": (5, 4)}, large=True),
    Op("add", lambda m, h: F.linear(
        h, m.w + m.a @ m.c), 4 + 1 + 2, 0, {"w": (5, 4), "a": (5, 2), "c": (2, 4)}, large=True, complete=False),
    Op("add", lambda m, h: h[:, :, None] + m.w, 4, 0, {"w": (4, 4)}, large=True),
    Op("sub", lambda m, h: F.linear(h, m.w - m.w.mean(1, keepdim=True)), 1 + 5, 0, WIDE, large=True),
    Op("abs", lambda m, h: F.linear(h, m.w.abs()), 4 + 5, 0, WIDE, large=True),
    Op("pow", lambda m, h: F.linear(h, m.w.square()), 4 + 1, 0, WIDE, large=True, complete=False),
    # Powers
    Op("pow", lambda m, h: h.pow(2)),
    Op("pow", lambda m, h: h.pow(2) + h, 0),
    Op("pow", lambda m, h: h.pow(2) + h * h.abs()),
    Op("pow", lambda m, h: h.pow(3) + h.square() * h.roll(1, 1), 1),
    Op("pow", lambda m, h: h.abs().pow(0.5)),
    Op("pow", lambda m, h: h.abs().pow(0.5) * h.abs().pow(0.5) + h),
    Op("pow", lambda m, h: h.abs().pow(1 / 3).pow(3) + h),
    Op("pow", lambda m, h: h.pow_(-1)),
    Op("pow", lambda m, h: h.pow(-1) * h.roll(1, 1) + 1, 1),
    Op("pow", lambda m, h: h.pow(0) + h.relu(), 0),
    Op("pow", lambda m, h: h.pow(0)),
    Op("pow", lambda m, h: h.pow(1) + h),
    Op("pow", lambda m, h: h.abs().pow(0.1) * h.abs().pow(0.9) + h),
    Op("pow", lambda m, h: 2**h, 0),
    Op("pow", lambda m, h: h.abs().pow(m.matrix[1]), 0, complete=False),  # exponents in a tensor are data
    Op("pow", lambda m, h: h.abs().pow(m.w), 0, 0, {"w": (4,)}),
    Op("pow", lambda m, h: h + m.known.pow(m.known), 0),
    Op("pow", lambda m, h: h.abs().pow(1e-9), 0, complete=False),  # so are exponents that are no simple fractions
    Op("pow", lambda m, h: h.abs().pow(2**0.5), 0, complete=False),  # no simple fraction
    Op("pow", lambda m, h: torch.zeros_like(h).pow(2) + h),
    Op("pow", lambda m, h: torch.zeros_like(h).pow(0) + h, 0),
    Op("pow", lambda m, h: F.linear(h, m.w.pow(2)), 4 + 5, 0, WIDE),
    Op("pow", lambda m, h: h * m.g.pow(3), 8, 0, GAIN),
    Op("float_power", lambda m, h: h.float_power(2) + h * h.abs(), inference=True),
    Op("float_power", lambda m, h: h.float_power(2) + h, 0, inference=True),
    Op("float_power", lambda m, h: h.abs().float_power(m.known), 0, inference=True, complete=False),  # data
    Op("pow", lambda m, h: h.square().sum(1), 1),
    Op("pow", lambda m, h: h.square_() + h),
    Op("square", lambda m, h: h.square() + h, 0, inference=True),
    Op("square", lambda m, h: h.square() + h.abs() * h, inference=True),
    Op("square", lambda m, h: h * m.g.square(), 8, 0, GAIN, inference=True),
    Op("sqrt", lambda m, h: h.abs().sqrt()),
    Op("sqrt", lambda m, h: h.square().sqrt() + h),
    Op("sqrt", lambda m, h: h.abs().sqrt() + h, 0),
    Op("sqrt", lambda m, h: (h.square() + h.roll(1, 1).square()).sqrt_() + h, 1),
    Op("sqrt", lambda m, h: (h.abs() * h.roll(1, 1).abs()).sqrt() + h.abs(), 1),
    Op("rsqrt", lambda m, h: h.abs().rsqrt()),
    Op("rsqrt", lambda m, h: h * h.square().mean(1, keepdim=True).rsqrt(), 1),
    Op("rsqrt", lambda m, h: h * (h.square().mean(1, keepdim=True) + 1).rsqrt(), 0),
    Op("rsqrt", lambda m, h: h.abs().rsqrt() + h, 0),
    Op("reciprocal", lambda m, h: h.reciprocal()),
    Op("reciprocal", lambda m, h: h.reciprocal() * h.roll(1, 1) + 1, 1),
    Op("reciprocal", lambda m, h: h.reciprocal_() + m.b, 4, 0, {"b": (4,)}),
    Op("reciprocal", lambda m, h: out_of(torch.reciprocal)(h) + h, 0),
    # Gates
    Op("glu", lambda m, h: F.glu(h, 1), 2),
    Op("glu", lambda m, h: F.glu(h), 0, 1),
    Op("glu", lambda m, h: F.glu(h, -2), 2, 1),
    Op("glu", lambda m, h: F.glu(torch.cat([h, h.detach() * 0], 1)), 4),
    Op("glu", lambda m, h: F.glu(m.w.expand(8, 8), 1) + 0 * h, 8, 0, {"w": (8,)}),
    # Written in place
    Op("copy", lambda m, h: torch.zeros_like(h).copy_(h.roll(1, 1)) + h, 1),
    Op("copy", lambda m, h: torch.zeros(8, 4, dtype=h.dtype).copy_(h[:, 0, None]) + h, 1),
    Op("copy", lambda m, h: (h[:, :1].copy_(h[:, 1:2]), h)[1]),
    Op("copy", lambda m, h: h @ torch.empty_like(m.w).copy_(m.w), 8, shapes={"w": (4, 4)}),
    Op("copy", lambda m, h: torch.zeros_like(h).long().copy_(8 * h).double(), 0),
    Op("copy", lambda m, h: torch.zeros(8, 4, dtype=torch.complex128).copy_(h).abs()),
    Op("copy", lambda m, h: torch.empty(8, 4, dtype=h.dtype).copy_(m.b) + h, 4, 0, {"b": (4,)}),
    Op("copy", lambda m, h: torch.zeros_like(h).copy_(h[0]).sum(1, keepdim=True) + 0 * h, 1),
    Op("copy", _interleaved),
    Op("copy", _column_by_column, 2),
    Op("copy", _nested, 2),
    Op("copy", _transposed, 2),
    Op("copy", _permuted, 2),
    Op("copy", _read_in_another_shape),
    Op("copy", _read_across, 3),
    Op("copy", _read_before_and_after, 2),
    Op("copy", _written_in_another_shape),
    Op("copy", _into_every_third, 1),
    Op("copy", _rows),
    Op("copy", _shifted, 1),
    Op("copy", _halves_added, 2),
    Op("copy", _parameter_written, 0, 0, GAIN, complete=False),  # parameters in a part of the memory
    Op("copy", _parameter_everywhere, 8, 0, GAIN),
    Op("copy", _weight_assembled, 1, 0, WIDE, complete=False),  # parameters in a part of the memory
    Op("copy", _changed_while_seen, 2),
    Op("copy", _into_a_diagonal, 0, complete=False),  # no box of the memory
    Op("copy", lambda m, h: F.pad(h, (1, 2), "circular"), spatial=1),
    Op("copy", lambda m, h: F.pad(h[:, None], (1, 1), "circular")),
    Op("copy", lambda m, h: F.pad(h, (1, 0, 0, 2), "circular"), spatial=2),
    Op("abs", _out_into_a_part, counted=False),  # has no gradient
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
