"""Rules for normalisations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import FIXED, ZERO, ParameterView
from tests.symmetry.rules.ops import Op, check, directly, every

GAIN, ROWS = {"w": (4,), "b": (4,)}, {"v": (5, 4), "g": (5, 1)}
EPS = 1.0  # so large that a freedom which only it breaks cannot be missed
ops = torch.ops.aten


def _batch_norm(m: Any, h: Tensor, w: Tensor | None = None, b: Tensor | None = None, training: bool = True) -> Tensor:
    return F.batch_norm(h, m.known * 0, m.known * 1, w, b, training, eps=EPS)


OPS = [
    # As in training
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.w, m.b, False), 4, 0, GAIN, complete=False),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.w, m.b), 4, 2, GAIN),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h), 0, 1),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.known, m.b), 0, 1, {"b": (4,)}),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.w, m.known), 0, 1, {"w": (4,)}),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.w), 4, 1, {"w": (4,)}),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, None, m.b), 0, 1, {"b": (4,)}),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, m.w * m.g, m.b), 8, 1, {"w": (4,), "b": (4,), "g": (4,)}),
    Op("native_batch_norm", lambda m, h: _batch_norm(m, h, h.mean((0, 2)), m.b), 0, 1, {"b": (4,)}),
    Op("native_batch_norm", lambda m, h: F.batch_norm(
        m.known.expand(8, 4), h.mean(0).detach(), m.known * 0 + 1, m.w, m.b, eps=EPS), 4, 0, GAIN, counted=False),
    Op("native_batch_norm", lambda m, h: F.batch_norm(
        m.known.expand(8, 4), m.known, h.square().mean(0).detach(), m.w, m.b, eps=EPS), 4, 0, GAIN, counted=False),
    Op("native_batch_norm", lambda m, h: F.instance_norm(h, weight=m.w, bias=m.b, eps=EPS), 4, 2, GAIN),
    # As in training
    Op("batch_norm", lambda m, h: _batch_norm(m, h, m.w, m.b, False), 4, 0, GAIN, True, complete=False),
    Op("batch_norm", lambda m, h: _batch_norm(m, h, m.w, m.b), 4, 0, GAIN, True),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, m.known * 0, m.known * 1, True, 0.1, EPS)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, True, 0.1, EPS)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit_no_training", lambda m, h: ops._native_batch_norm_legit_no_training(
        h, m.w, m.b, m.known * 0, m.known, 0.1, EPS)[0], 4, 1, GAIN, complete=False),  # as in training
    Op("_native_batch_norm_legit_functional", lambda m, h: ops._native_batch_norm_legit_functional(
        h, m.w, m.b, m.known * 0, m.known, True, 0.1, EPS)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update", lambda m, h: ops._batch_norm_with_update(
        h, m.w, m.b, m.known * 0, m.known * 1, 0.1, EPS)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update_functional", lambda m, h: ops._batch_norm_with_update_functional(
        h, m.w, m.b, m.known * 0, m.known, 0.1, EPS)[0], 4, 1, GAIN),
    Op("_batch_norm_no_update", lambda m, h: ops._batch_norm_no_update(
        h, m.w, m.b, m.known * 0, m.known, 0.1, EPS)[0], 4, 1, GAIN, complete=False),  # as in training
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), m.w, m.b, EPS), 4, 0, GAIN),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4), eps=EPS), 0, 1),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4), m.w, eps=EPS), 16, 1, {"w": (4, 4)}),
    Op("native_layer_norm", lambda m, h: F.layer_norm(
        h, (4, 4), m.w, m.b, EPS).mean(2), 4, 1, {"w": (4, 4), "b": (4, 4)}),
    Op("native_layer_norm", lambda m, h: F.layer_norm(
        h, (4, 4), m.w, eps=EPS), 4, 1, {"w": (4, 4)}, large=True, complete=False),  # along one axis
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), None, m.b, EPS), 0, 0, {"b": (4,)}),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), m.w, m.known, EPS), 0, 0, {"w": (4,)}),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), m.w, m.w, EPS), 4, 0, {"w": (4,)}),
    Op("native_layer_norm", lambda m, h: F.layer_norm(
        h, (4,), m.w * m.g, m.b, EPS), 8, 0, {"w": (4,), "b": (4,), "g": (4,)}),
    Op("_fused_rms_norm", lambda m, h: F.rms_norm(h, (4,), m.w, EPS), 4, 0, {"w": (4,)}, True),
    Op("_fused_rms_norm", lambda m, h: F.rms_norm(h, (4,), eps=EPS), 0, 0, inference=True),
    Op("_fused_rms_norm", lambda m, h: F.rms_norm(h, (4,), m.w, EPS) + h.relu(), 0, 0, {"w": (4,)}, True),
    Op("_fused_rms_norm", lambda m, h: F.rms_norm(h, (4, 4), m.w, EPS), 16, 1, {"w": (4, 4)}, True),
    Op("_fused_rms_norm", lambda m, h: F.rms_norm(h.mT, (4,), m.w, EPS).mean(1), 4, 1, {"w": (4,)}, True),
    Op("rms_norm", lambda m, h: F.rms_norm(h, (4,), m.w, EPS), 4, 0, {"w": (4,)}),
    Op("native_group_norm", lambda m, h: F.group_norm(h, 2, m.w, m.b, EPS), 4, 2, GAIN),
    Op("native_group_norm", lambda m, h: F.group_norm(h, 4, eps=EPS), 0, 1),
    Op("native_group_norm", lambda m, h: F.group_norm(h, 1, m.w, m.known, EPS), 0, 1, {"w": (4,)}),
    # Has no gradient
    Op("native_group_norm", lambda m, h: F.group_norm(h, 2, None, m.b, EPS), 0, 1, {"b": (4,)}, counted=False),
    # Weights times gains over their norms
    Op("_weight_norm_interface", lambda m, h: F.linear(h, torch._weight_norm(m.v, m.g, 0)), 1 + 5 + 5, 0, ROWS),
    Op("_weight_norm_interface", lambda m, h: F.linear(
        h, torch._weight_norm(m.v, m.g, 1)), 4 + 4 + 1, 0, {"v": (5, 4), "g": (1, 4)}),
    Op("_weight_norm_interface", lambda m, h: F.linear(
        h, torch._weight_norm(m.v, m.known[:, None], 0)), 4 + 1, 0, {"v": (4, 4)}),
    Op("_weight_norm_interface", lambda m, h: F.conv1d(
        h, torch._weight_norm(m.v, m.g, 0), m.b), 1 + 5 + 5, 1, {"v": (5, 4, 2), "g": (5, 1, 1), "b": (5,)}),
    Op("_weight_norm_interface", lambda m, h: F.conv1d(
        h, torch._weight_norm(m.v, m.g, 0), groups=2), 2 + 6 + 6, 1, {"v": (6, 2, 2), "g": (6, 1, 1)}),
    Op("_weight_norm_interface", lambda m, h: F.linear(
        h, torch._weight_norm(m.v, m.g, 0)), 1 + 5 + 5, 0, ROWS, large=True),
    Op("_weight_norm_interface", lambda m, h: torch._weight_norm(h, m.g, 0) + 0 * h, 1 + 1, 0, {"g": (8, 1)}),
    Op("_weight_norm_interface", lambda m, h: torch._weight_norm(h, m.known[None], 1), 4),
    Op("_weight_norm_interface", lambda m, h: F.linear(
        h, torch._weight_norm(m.v, m.v.sum(1, keepdim=True), 0)), 1 + 5, 0, {"v": (5, 4)}),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


@pytest.mark.parametrize("name", ["cudnn_batch_norm", "miopen_batch_norm", "batch_norm_elemt"])
def test_accelerators_batch_norm_grounds_its_input_and_starts_anew(name: str) -> None:
    equations = Equations({"w": (4,), "b": (4,)})
    features = equations.fresh((1, 4, 1))
    image, vector = torch.zeros(2, 4, 3), torch.zeros(4)
    outputs = directly(
        name,
        equations,
        (image, vector, vector.clone()),
        {
            "input": (image, features),
            "weight": (vector, ParameterView.whole("w", (4,))),
            "bias": (torch.ones(4), ParameterView.whole("b", (4,))),
        },
    )
    assert outputs[0].shape == (1, 4, 1)
    assert set(outputs[0].ravel()).isdisjoint({FIXED, ZERO, *features.ravel()})
    assert all((ids == FIXED).all() for ids in outputs[1:])
    is_fixed = np.concatenate([ids for _, ids in equations.fixings])
    np.testing.assert_array_equal(np.sort(is_fixed), features.ravel())
    (weight,), (bias,) = equations.uses["w"], equations.uses["b"]
    np.testing.assert_array_equal(weight.incoming, outputs[0].ravel())
    np.testing.assert_array_equal(bias.incoming, outputs[0].ravel())
    assert bias.additive
    assert not weight.additive
