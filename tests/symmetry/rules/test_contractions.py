"""Rules for linear maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import ParameterView
from tests.symmetry.rules.ops import Op, check, directly, every, out_of

GAIN, SQUARE, WIDE, TWO = {"g": (4,)}, {"w": (4, 4)}, {"w": (5, 4)}, {"w": (5, 4), "v": (3, 4)}
POINT, TALL, GROUPED = {"w": (6, 4, 1)}, {"w": (8, 1, 3, 1)}, {"w": (4, 1, 1), "g": (4, 4)}
KERNEL, GROUPS, LINE = {"w": (6, 4, 2)}, {"w": (4, 3, 2), "b": (6,)}, {"w": (5, 4), "b": (5,)}

OPS = [
    # Matrices
    Op("mm", lambda m, h: h @ m.w, 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: (m.w @ h.t()).t(), 4 + 5, shapes={"w": (5, 4)}),
    Op("mm", lambda m, h: out_of(torch.mm)(h, m.w), 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: h @ m.matrix, 1),
    Op("mm", lambda m, h: m.matrix.repeat(2, 2) @ h),
    Op("mm", lambda m, h: h @ h.t(), 1),
    Op("mm", lambda m, h: h.t() @ h + 0 * h[:4], 1),
    Op("mm", lambda m, h: (h.t() @ h).sum(0) + 0 * h, 1),
    Op("mm", lambda m, h: h @ (h.t() @ h), 1),
    Op("mm", lambda m, h: torch.zeros(8, 4, dtype=h.dtype) @ m.w + h, 4, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.zeros(8, 4, dtype=h.dtype) @ h.t()[:, :4] + h),
    Op("mm", lambda m, h: torch.cat([h @ m.w, h.relu() @ m.w], 1), 8, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :2], h @ m.w[:, 2:]], 1), 8, shapes={"w": (4, 4)}),
    # Parts that overlap
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :3], h @ m.w[:, 2:]], 1), 8, 0, SQUARE),
    Op("mm", lambda m, h: h @ m.w @ m.v, 4 + 3 + 5, 0, {"w": (4, 3), "v": (3, 5)}),
    Op("mm", lambda m, h: h @ (m.w @ m.v), 4 + 3 + 5, 0, {"w": (4, 3), "v": (3, 5)}),
    Op("mm", lambda m, h: h @ (m.w @ m.w), 4 + 1, 0, SQUARE),
    Op("mm", lambda m, h: h @ (m.w @ m.w.t()), 4 + 1, 0, SQUARE),
    Op("mm", lambda m, h: h @ m.w @ m.w.t(), 4 + 1, 0, {"w": (4, 3)}),
    Op("mm", lambda m, h: h @ m.w + h.roll(1, 1) @ m.w, 4 + 1, 0, SQUARE),
    Op("mm", lambda m, h: h @ m.w + h, 4, 0, SQUARE),
    Op("mm", lambda m, h: (h @ m.w).relu() @ m.w, 4 + 1, 0, SQUARE),
    Op("mm", lambda m, h: (h[:, :1] * h[:1]) @ m.w, 4 + 5, 0, {"w": (4, 5)}),
    Op("mm", lambda m, h: (h * m.g[:, None]) @ m.w, 1 + 4 + 5, 0, {"w": (4, 5), "g": (8,)}),
    Op("mm", lambda m, h: (h * m.g[:, None]) @ m.matrix, 1 + 1, 0, {"g": (8,)}),
    Op("mm", lambda m, h: (m.w @ h).sum(0) + 0 * h, 4 + 1, 0, {"w": (3, 8)}),
    Op("addmm", lambda m, h: torch.addmm(m.b, h, m.w), 4 + 5, shapes={"w": (4, 5), "b": (5,)}),
    Op("addmm", lambda m, h: torch.addmm(m.known, h, m.w), 4, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: h.clone().addmm_(h, m.w), 4, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: torch.addmm(m.b, h, m.w, beta=2, alpha=3), 4 + 5, 0, {"w": (4, 5), "b": (8, 5)}),
    Op("addmm", lambda m, h: torch.addmm(h, h, m.matrix), 1),
    Op("addmm", lambda m, h: torch.addmm(m.b, m.w, h.t()).t(), 4 + 5, 0, {"w": (5, 4), "b": (5, 1)}),
    Op("addmm", lambda m, h: torch.addmm(m.b, h, m.w), 4 + 1, 0, {"w": (4, 5), "b": (1,)}),
    Op("bmm", lambda m, h: torch.bmm(h, m.w.expand(8, 4, 5)), 4 + 5, 1, shapes={"w": (4, 5)}),
    Op("bmm", lambda m, h: torch.bmm(m.w.expand(8, 5, 4), h), 4 + 5, 1, shapes={"w": (5, 4)}),
    Op(
        "bmm",
        lambda m, h: torch.bmm(h.reshape(8, 2, 2).transpose(0, 1), m.w).transpose(0, 1),
        4 + 6,
        shapes={"w": (2, 2, 3)},
    ),
    Op("bmm", lambda m, h: torch.bmm(h, h.transpose(1, 2)), 4, 1),
    Op("bmm", lambda m, h: torch.bmm(h, h.transpose(1, 2)) + h, 0, 1),
    Op("bmm", lambda m, h: torch.bmm(h.mT, h).sum((1, 2)), 1, 1),
    Op("bmm", lambda m, h: torch.bmm(h.mT, h.roll(1, 1)), 2, 1),
    Op("bmm", lambda m, h: torch.bmm(h, torch.ones(8, 4, 3, dtype=h.dtype)), 4, 1),
    Op("bmm", lambda m, h: torch.bmm(torch.ones(8, 3, 4, dtype=h.dtype), h), 1, 1),
    Op("bmm", lambda m, h: torch.bmm(h * m.g, h.relu().mT), 4 + 1, 1, GAIN),
    Op("bmm", lambda m, h: torch.bmm(torch.bmm(h, h.mT).relu(), h), 1, 1),
    Op("bmm", lambda m, h: torch.bmm(m.w, h.movedim(0, 1)).movedim(0, 1), 4 + 1, 1, {"w": (4, 3, 8)}),
    Op("baddbmm", lambda m, h: torch.baddbmm(m.b, m.w.expand(8, 5, 4), h), 4 + 5, 1, {"w": (5, 4), "b": (5, 1)}),
    Op("baddbmm", lambda m, h: torch.baddbmm(h, h, m.w.expand(8, 4, 4)), 4, 1, SQUARE),
    Op("baddbmm", lambda m, h: torch.baddbmm(h, m.matrix.expand(8, 4, 4), h), 1, 1),
    Op("baddbmm", lambda m, h: torch.baddbmm(m.known, h, m.w.expand(8, 4, 4)), 1, 1, SQUARE),
    Op("addbmm", lambda m, h: torch.addbmm(
        m.b, h, m.w.expand(8, 4, 5)) + 0 * h[..., :1], 1 + 5, 1, {"w": (4, 5), "b": (5,)}),
    Op("addbmm", lambda m, h: torch.addbmm(m.known, m.w.expand(8, 4, 4), h) + 0 * h, 4, 1, SQUARE),
    Op("addbmm", lambda m, h: torch.addbmm(h[0], h, h.mT) + 0 * h, 0, 1),
    Op("addbmm", lambda m, h: torch.addbmm(torch.zeros_like(h[0]), h, h.roll(1, 1).mT) + 0 * h, 4, 1),
    Op("addbmm", lambda m, h: torch.addbmm(
        torch.zeros_like(m.matrix), (h * m.g[:, None, None]), h.mT) + 0 * h, 5, 1, {"g": (8,)}),
    Op("mv", lambda m, h: torch.mv(h, m.w), 4 + 1, shapes={"w": (4,)}),
    Op("mv", lambda m, h: torch.mv(m.w, h[0]) + 0 * h[:, :1], 4 + 5, shapes={"w": (5, 4)}),
    Op("mv", lambda m, h: torch.mv(h, m.known), 1),
    Op("mv", lambda m, h: torch.mv(m.w, m.v) * h, 4 + 4 + 5, 0, {"w": (4, 5), "v": (5,)}),
    Op("mv", lambda m, h: torch.mv(m.w.t(), m.v) * h, 4 + 4 + 5, 0, {"w": (5, 4), "v": (5,)}),
    Op("addmv", lambda m, h: torch.addmv(m.b, h, m.w), 4 + 1, shapes={"w": (4,), "b": (1,)}),
    Op("addmv", lambda m, h: torch.addmv(m.known[0], h, m.w), 4, 0, {"w": (4,)}),
    Op("addmv", lambda m, h: torch.addmv(h[:, 0], h, m.w), 4, 0, {"w": (4,)}),
    Op("addmv", lambda m, h: torch.addmv(m.b, m.w, h[0]) + 0 * h[:, :1], 4 + 5, 0, {"w": (5, 4), "b": (5,)}),
    Op("linear", lambda m, h: F.linear(h, m.w, m.b), 4 + 5, shapes={"w": (5, 4), "b": (5,)}, inference=True),
    Op("linear", lambda m, h: F.linear(h, m.w), 4 + 5, 1, shapes={"w": (5, 4)}, inference=True),
    Op("linear", lambda m, h: F.linear(h.mT, m.w), 4 + 5, 1, WIDE, True),
    Op("linear", lambda m, h: F.linear(h, m.matrix), 1, inference=True),
    Op("linear", lambda m, h: F.linear(h, m.w, m.known), 4, 0, SQUARE, True),
    Op("linear", lambda m, h: F.linear(h[0], m.w, m.b) + 0 * h[:, :1], 4 + 5, 0, LINE, True),
    Op("linear", lambda m, h: F.linear(h, m.w * m.g, m.b), 4 + 5 + 4, 0, {"w": (5, 4), "b": (5,), "g": (4,)}, True),
    Op("linear", lambda m, h: F.linear(h, m.v @ m.w.t()), 4 + 3 + 5, 0, {"v": (5, 3), "w": (4, 3)}, True),
    # Vectors
    Op("dot", lambda m, h: torch.dot(h[0], h[1]) + 0 * h[:, :1], 1),
    Op("dot", lambda m, h: torch.dot(m.g, m.k) * h, 4 + 4 + 1, 0, {"g": (4,), "k": (4,)}),
    Op("dot", lambda m, h: torch.dot(h[0], m.g) * h, 4 + 1, 0, GAIN),
    Op("dot", lambda m, h: torch.dot(m.known, m.g) * h, 4 + 1, 0, GAIN),
    Op("vdot", lambda m, h: torch.vdot(m.g, m.g) * h, 4 + 1, 0, GAIN, inference=True),
    Op("vdot", lambda m, h: torch.vdot(torch.complex(h[0], h[1]), torch.complex(h[2], h[3])).real * h, 1),
    Op("addr", lambda m, h: torch.addr(h, h[:, 0], m.g), 4, 0, GAIN),
    Op("addr", lambda m, h: torch.addr(m.b, h[:, 0], m.g) + 0 * h, 4 + 4, 0, {"g": (4,), "b": (4,)}),
    Op("addr", lambda m, h: torch.addr(torch.zeros_like(h), h[:, 0], h[0]) + 0 * h, 4),
    Op("addr", lambda m, h: torch.addr(h, m.v, m.g), 4 + 1, 0, {"v": (8,), "g": (4,)}),
    Op("addr", lambda m, h: F.linear(h, torch.addr(m.w, m.v, m.g)), 4 + 5 + 1, 0, {"w": (5, 4), "v": (5,), "g": (4,)}),
    # One label for each vector
    Op("linalg_cross", lambda m, h: torch.linalg.cross(h[:, :3], h[:, 1:]), 1, complete=False),
    Op("linalg_cross", lambda m, h: torch.linalg.cross(h[:, :, :3], h.roll(1, 1)[:, :, 1:]), 4, 1),
    Op("linalg_cross", lambda m, h: torch.linalg.cross(h[:, :, :3], h.roll(1, 1)[:, :, 1:]) + h[..., :3], 0, 1),
    Op("linalg_cross", lambda m, h: torch.cross(
        h[:, :3], m.w.expand(8, 3), dim=1), 1 + 2, 0, {"w": (3,)}, complete=False),
    # Bilinear maps
    Op("_trilinear", lambda m, h: F.bilinear(h, h, m.w), 4 + 3, 0, {"w": (3, 4, 4)}),
    Op("_trilinear", lambda m, h: F.bilinear(h, h.roll(1, 1), m.w, m.b), 4 + 3, 0, {"w": (3, 4, 4), "b": (3,)}),
    Op("_trilinear", lambda m, h: F.bilinear(h, m.known.expand(8, 4), m.w), 4 + 3, 0, {"w": (3, 4, 4)}),
    Op("_trilinear", lambda m, h: F.bilinear(h[:, :1], h, m.matrix[None, :1]), 1),
    Op("_trilinear", lambda m, h: F.bilinear(h, h, m.matrix[None]), 1),
    Op("_trilinear", lambda m, h: F.bilinear(h, m.g.expand(8, 4), m.w), 4 + 4 + 3, 0, {"w": (3, 4, 4), "g": (4,)}),
    Op("_trilinear", lambda m, h: F.bilinear(h, h, m.w * m.g), 4 + 3 + 4, 0, {"w": (3, 4, 4), "g": (4,)}),
    Op("_trilinear", lambda m, h: F.bilinear(
        h, h, torch.einsum("oi,oj->oij", m.w, m.w)), 4 + 2, 0, WIDE, complete=False),  # a factor along other axes
    Op("_trilinear", lambda m, h: F.bilinear(h.mT, h.mT, m.w), 4 + 3, 1, {"w": (3, 4, 4)}),
    # Kernels
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.b), 4 + 6, 1, {"w": (6, 4, 2), "b": (6,)}),
    Op("convolution", lambda m, h: F.conv1d(h[:, :, 1:], m.w), 4 + 6, 1, KERNEL),
    # Powers of one scale along the pixels are not looked for
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w), 1 + 6, 1, KERNEL, complete=False),
    # Kernels of size one leave positions apart
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w), 4 + 6, 1, POINT),
    Op("convolution", lambda m, h: F.conv2d(h.view(1, 8, 1, 4), m.w, padding=(1, 0), groups=8)[0], 4 + 1, 0, TALL),
    Op("convolution", lambda m, h: F.conv3d(
        h.permute(0, 2, 3, 1)[:, None], m.w, padding=(1, 1, 0)), 4 + 2, 2, {"w": (2, 1, 3, 3, 1)}),
    Op("convolution", lambda m, h: F.conv_transpose2d(h.permute(0, 2, 3, 1), m.w), 4 + 2, 2, {"w": (4, 2, 3, 1)}),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w, m.b), 1 + 6, 1, {"w": (6, 4, 1), "b": (6,)}),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w, padding=1), 1 + 6, 1, POINT, complete=False),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w, stride=2), 1 + 6, 1, POINT, complete=False),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.w, groups=2), 4 + 6, 1, {"w": (6, 2, 1)}),
    Op("convolution", lambda m, h: F.conv1d(h[:, :, None] * m.g, m.w, groups=4), 4 + 16 + 4, 0, GROUPED),
    Op("convolution", lambda m, h: F.conv1d(h[:, :, None] * h[:, None], m.w, groups=2), 4 + 6, 0, {"w": (6, 2, 1)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(h.mT, m.w, groups=2), 4 + 6, 1, {"w": (4, 3, 1)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(
        h.mT, m.w, padding=1, output_padding=2, dilation=3), 1 + 3, 1, {"w": (4, 3, 1)}, complete=False),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.matrix[:, :, None]), 4, 1),
    Op("convolution", lambda m, h: F.conv1d(h.mT, m.matrix[:, :1, None], groups=4), 4, 1),
    Op("convolution", lambda m, h: F.conv1d(F.pad(h, (1, 1))[:, None], m.w), 4 + 3, 0, {"w": (3, 1, 1)}),
    Op("convolution", lambda m, h: F.conv1d(F.pad(h, (1, 1))[:, None], m.w, m.b), 4, 0, {"w": (3, 1, 1), "b": (3,)}),
    Op("convolution", lambda m, h: F.conv1d(F.pad(h.mT, (1, 1)), m.w), 1 + 6, 1, POINT, complete=False),
    Op("convolution", lambda m, h: F.conv1d(h.t()[:, None], m.w).permute(2, 0, 1), 4 + 3, 0, {"w": (3, 1, 1)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, None, 2, 1, 2), 4 + 3, 2, {"w": (3, 4, 2, 2)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, groups=2), 4 + 6, 2, {"w": (6, 2, 2, 2)}),
    Op("convolution", lambda m, h: F.conv3d(h, m.w, m.b, groups=4), 4 + 4, 3, {"w": (4, 1, 2, 2, 2), "b": (4,)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(h, m.w, m.b), 4 + 3, 1, {"w": (4, 3, 2), "b": (3,)}),
    Op("convolution", lambda m, h: F.conv_transpose2d(h, m.w, groups=2), 4 + 6, 2, {"w": (4, 3, 2, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :, None]), 1, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :2, None], groups=2), 2, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.known), 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h.roll(1, 1), m.w) + h[:, :, 1:], 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: h + F.conv1d(torch.zeros_like(h), m.w, m.b), 4, 1, {"w": (4, 4, 1), "b": (4,)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.w * m.g[:, None, None]), 4 + 6 + 6, 1, {"w": (6, 4, 2), "g": (6,)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.w * m.g), 4 + 6 + 2, 1, {"w": (6, 4, 2), "g": (2,)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.w / m.w.norm(dim=(1, 2), keepdim=True)), 1 + 6, 1, KERNEL),
    Op("convolution", lambda m, h: F.conv1d(h, m.w - m.w.mean((1, 2), keepdim=True)), 1 + 6, 1, KERNEL),
    Op("convolution", lambda m, h: F.conv1d(h, (m.w @ m.v)[:, :, None]), 4 + 3 + 6, 1, {"w": (6, 3), "v": (3, 4)}),
    Op("convolution", lambda m, h: F.conv1d(
        h, (m.w @ m.v)[:, :, None], m.b, groups=2), 4 + 6 + 2, 1, {"w": (6, 3), "v": (3, 2), "b": (6,)}),
    Op("convolution", lambda m, h: F.conv1d(
        h, (m.w @ m.v)[:, None], groups=4), 4 + 3 + 4, 1, {"w": (4, 3), "v": (3, 2)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(
        h, (m.w @ m.v)[:, :, None]), 4 + 3 + 5, 1, {"w": (4, 3), "v": (3, 5)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(
        h, (m.w @ m.v)[:, :, None], groups=2), 4 + 3 + 3 + 1, 1, {"w": (4, 3), "v": (3, 3)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(
        h, m.w * m.g[:, None], m.b), 4 + 3 + 3, 1, {"w": (4, 3, 2), "g": (3,), "b": (3,)}),
    Op("convolution", lambda m, h: F.conv1d(h[:, :1], h.mean((0, 2)).view(4, 1, 1)), 4, 1),
    Op("convolution", lambda m, h: F.conv1d(
        h.flatten(0, 1)[None], m.w.repeat(8, 1, 1), groups=32).view(8, 4, -1), 4 + 4, 1, {"w": (4, 1, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h.flatten(0, 1)[
        None], (h.mean(2)[..., None] * m.w).flatten(0, 1)[:, None], groups=32).view(8, 4, -1), 4 + 4, 1, {"w": (4, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.w) + F.conv1d(h.roll(1, 1), m.w), 4 + 1, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: F.conv1d(F.conv1d(h, m.w).relu(), m.w), 4 + 1, 1, {"w": (4, 4, 1)}),
    Op("convolution", lambda m, h: F.conv1d(
        h, m.w, padding=1, groups=4)[..., 1:] + F.conv1d(h, m.v)[..., :3], 4 + 4, 1, {"w": (4, 1, 3), "v": (4, 4, 1)}),
    # Matrices with very many elements: where they are tensors among others, scales change along one axis alone
    Op("mm", lambda m, h: h @ m.w @ m.w.t(), 4 + 1, 0, {"w": (4, 3)}, large=True),
    Op("mm", lambda m, h: h @ (m.w @ m.v), 1 + 3 + 5, 0, {"w": (4, 3), "v": (3, 5)}, large=True, complete=False),
    Op("linear", lambda m, h: F.linear(
        h, m.v @ m.w.t()), 4 + 3 + 1, 0, {"v": (5, 3), "w": (4, 3)}, True, large=True, complete=False),
    Op("bmm", lambda m, h: torch.bmm(m.w, h.movedim(0, 1)).movedim(0, 1), 4 + 1, 1, {"w": (4, 3, 8)}, large=True),
    Op("convolution", lambda m, h: F.conv1d(
        h, m.w * m.g[:, None, None]), 4 + 6 + 6, 1, {"w": (6, 4, 2), "g": (6,)}, large=True),
    Op("convolution", lambda m, h: F.conv1d(h, m.w / m.w.norm(dim=(1, 2), keepdim=True)), 1 + 6, 1, KERNEL, large=True),
    Op("_trilinear", lambda m, h: F.bilinear(h, h, m.w), 4 + 3, 0, {"w": (3, 4, 4)}, large=True),
    Op("_convolution", lambda m, h: torch._convolution(
        h, m.w, None, [1], [0], [1], False, [0], 1, False, False, False, False), 4 + 3, 1, {"w": (3, 4, 2)}, True),
    Op("_convolution", lambda m, h: torch._convolution(
        h, m.w, m.b, [1], [0], [1], True, [0], 2, False, False, False, False), 4 + 6, 1, GROUPS, True),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


def test_overrideable_convolution_leads_from_input_to_new_output_channels() -> None:
    equations = Equations({"w": (6, 2, 3)})
    features = equations.fresh((1, 4, 1))
    output = directly(
        "convolution_overrideable",
        equations,
        torch.zeros(2, 6, 3),
        {
            "input": (torch.zeros(2, 4, 5), features),
            "weight": (torch.zeros(6, 2, 3), ParameterView.whole("w", (6, 2, 3))),
        },
        bias=None,
        groups=2,
        transposed=False,
    )
    (use,) = equations.uses["w"]
    np.testing.assert_array_equal(use.incoming.ravel(), output.ravel())
    expected = features.reshape(2, 1, 2).repeat(3, axis=1).reshape(6, 2, 1)
    np.testing.assert_array_equal(np.broadcast_to(use.outgoing, (6, 2, 1)), expected)
