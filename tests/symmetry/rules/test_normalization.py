"""Rules for normalisations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.symmetry.rules.ops import Op, check, every, out_of

ops = torch.ops.aten
GAIN = {"w": (4,), "b": (4,)}

OPS = [
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b), 4, 0, GAIN),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b, True), 4, 2, GAIN),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known), 0, 1),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.known, m.b), 0, 1, {"b": (4,)}),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.known), 0, 1, {"w": (4,)}),
    Op("native_batch_norm", lambda m, h: F.instance_norm(h, weight=m.w, bias=m.b), 4, 2, GAIN),
    Op("batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b), 4, 0, GAIN, True),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, m.known * 0, m.known * 1, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit_no_training", lambda m, h: ops._native_batch_norm_legit_no_training(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit_functional", lambda m, h: ops._native_batch_norm_legit_functional(
        h, m.w, m.b, m.known * 0, m.known, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update", lambda m, h: ops._batch_norm_with_update(
        h, m.w, m.b, m.known * 0, m.known * 1, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update_functional", lambda m, h: ops._batch_norm_with_update_functional(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_no_update", lambda m, h: ops._batch_norm_no_update(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), m.w, m.b), 4, 0, GAIN),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4)), 0, 1),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4), m.w), 0, 1, {"w": (4, 4)}),
    Op("native_group_norm", lambda m, h: F.group_norm(h, 2, m.w, m.b), 4, 2, GAIN),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)
