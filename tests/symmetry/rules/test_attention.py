"""Rules for attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import FIXED
from tests.symmetry.rules.ops import Op, check, detached, directly, every

TWO = {"q": (4, 4), "k": (4, 4)}
FORMS, WIDE = TWO | {"v": (4, 4)}, TWO | {"v": (6, 4)}
ops = torch.ops.aten


def heads(x: Tensor, count: int = 2) -> Tensor:
    """[batch, length, channels] to [batch, heads, length, channels]."""
    return x.contiguous().unflatten(-1, (count, -1)).transpose(1, 2)


def attend(m: Any, h: Tensor, count: int = 2, fewer: int = 2, length: int = 4, **options: Any) -> Tensor:
    """Attention of the pixels of ``h`` to the first few of them; keys and values may have fewer heads."""
    x = h.mT
    query, key, value = F.linear(x, m.q), F.linear(x[:, :length], m.k), F.linear(x[:, :length], m.v)
    return F.scaled_dot_product_attention(heads(query, count), heads(key, fewer), heads(value, fewer), **options)


def gradient(m: Any, h: Tensor, of: str, fewer: int = 2) -> Tensor:
    """The gradient of queries, keys or values, where h comes from above."""
    with torch.enable_grad():
        made = {
            "q": heads(F.linear(h.mT, m.q)),
            "k": heads(F.linear(h.mT, m.k), fewer),
            "v": heads(F.linear(h.mT, m.v), fewer),
        }
        made = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
        y = F.scaled_dot_product_attention(*made.values(), enable_gqa=fewer == 1)
        return torch.autograd.grad(y, made[of], heads(h.mT))[0].transpose(1, 2).flatten(2)


CPU = "_scaled_dot_product_flash_attention_for_cpu"
WHOLE = "scaled_dot_product_attention"

PREFIX = {"q": (4, 4), "k": (2, 3, 2), "v": (2, 3, 2)}

OPS = [
    Op(CPU, attend, 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, is_causal=True), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, scale=0.3), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, attn_mask=m.matrix > 0), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, attn_mask=m.matrix), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, attn_mask=detached(h)[:, None]), 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, length=3), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, 4, 4), 4 + 4 + 4, 1, FORMS),
    Op(CPU, lambda m, h: attend(m, h, 4, 2, enable_gqa=True), 4 + 4 + 4, 1, {"q": (8, 4), "k": (4, 4), "v": (4, 4)}),
    Op(CPU, lambda m, h: attend(m, h, 4, 2, enable_gqa=True), 4 + 8 + 8, 1, {"q": (16, 4), "k": (8, 4), "v": (8, 4)}),
    Op(CPU, lambda m, h: attend(m, h, 2, 1, enable_gqa=True), 4 + 2 + 2, 1, {"q": (4, 4), "k": (2, 4), "v": (2, 4)}),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(heads(h.mT), heads(h.mT), heads(h.mT)), 0, 1),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        heads(F.linear(h.mT, m.q)), heads(h.mT), heads(h.mT)), 4, 1, {"q": (4, 4)}),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        heads(h.mT), heads(F.linear(h.mT, m.k)), heads(h.relu().mT)), 4, 1, {"k": (4, 4)}),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        heads(h.mT * m.g[:, None]), heads(F.linear(h.mT, m.k)), heads(h.relu().mT)), 5, 1, {"k": (4, 4), "g": (4,)}),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        heads(F.linear(h.mT, m.q)), heads(F.linear(h.mT, m.k)), heads(h.mT * m.g[:, None])), 9, 1, TWO | {"g": (4,)}),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        torch.zeros_like(heads(h.mT)), heads(h.mT), heads(h.flip(1).mT)), 4, 1),
    Op(CPU, lambda m, h: F.scaled_dot_product_attention(
        heads(F.linear(h.mT, m.q)), m.k.expand(8, 2, 3, 2), m.v.expand(8, 2, 3, 2)), 4 + 4 + 4, 1, PREFIX),
    # Taken apart
    Op("_safe_softmax", lambda m, h: attend(m, h, dropout_p=0.3), 4 + 4 + 4, 1, FORMS),
    Op("_safe_softmax", lambda m, h: attend(m, h, attn_mask=m.mask), 4 + 4 + 4, 1, FORMS | {"mask": (4, 4)}),
    Op("_safe_softmax", lambda m, h: attend(m, h, attn_mask=h[:, None]), 4 + 4, 1, FORMS),
    Op("_safe_softmax", attend, 4 + 4 + 6, 1, WIDE),
    Op("_safe_softmax", lambda m, h: F.scaled_dot_product_attention(
        F.linear(h.mT, m.q), F.linear(h.mT, m.k), F.linear(h.mT, m.v)), 4 + 4 + 4, 1, FORMS),
    # As a whole
    Op(WHOLE, attend, 4 + 4 + 4, 1, FORMS, True),
    Op(WHOLE, lambda m, h: attend(m, h, is_causal=True), 4 + 4 + 4, 1, FORMS, True),
    Op(WHOLE, lambda m, h: attend(m, h, dropout_p=0.3), 4 + 4 + 4, 1, FORMS, True),
    Op(WHOLE, lambda m, h: attend(m, h, attn_mask=m.mask), 4 + 4 + 4, 1, FORMS | {"mask": (4, 4)}, True),
    Op(WHOLE, lambda m, h: attend(m, h, attn_mask=h[:, None]), 4 + 4, 1, FORMS, True),
    Op(WHOLE, attend, 4 + 4 + 6, 1, WIDE, True),
    Op(WHOLE, lambda m, h: attend(
        m, h, 4, 2, 3, enable_gqa=True), 4 + 4 + 4, 1, {"q": (8, 4), "k": (4, 4), "v": (4, 4)}, True),
    Op(WHOLE, lambda m, h: F.scaled_dot_product_attention(
        F.linear(h.mT, m.q), F.linear(h.mT, m.k), F.linear(h.mT, m.v)), 4 + 4 + 4, 1, FORMS, True),
    Op(WHOLE, lambda m, h: F.scaled_dot_product_attention(
        F.linear(h[0].mT, m.q), F.linear(h[1].mT, m.k), F.linear(h[2].mT, m.v)).sum() + 0 * h, 9, 1, FORMS, True),
    Op("_scaled_dot_product_attention_math", lambda m, h: ops._scaled_dot_product_attention_math(
        heads(F.linear(h.mT, m.q)), heads(F.linear(h.mT, m.k)), heads(h.mT))[0], 4 + 4, 1, TWO, True),
    Op("_scaled_dot_product_attention_math", lambda m, h: ops._scaled_dot_product_attention_math(
        heads(h.mT), heads(h.mT), heads(F.linear(h.mT, m.v)), is_causal=True)[0], 4, 1, {"v": (4, 4)}, True),
    Op(f"{CPU}_backward", lambda m, h: gradient(m, h, "q"), 4 + 4 + 2, 1, FORMS, counted=False),
    Op(f"{CPU}_backward", lambda m, h: gradient(m, h, "k"), 4 + 4 + 2, 1, FORMS, counted=False),
    Op(f"{CPU}_backward", lambda m, h: gradient(m, h, "v"), 4 + 4 + 2, 1, FORMS, counted=False),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("_scaled_dot_product_flash_attention", 9),
        ("_scaled_dot_product_efficient_attention", 4),
        ("_scaled_dot_product_cudnn_attention", 9),
        ("_scaled_dot_product_fused_attention_overrideable", 9),
        ("_scaled_dot_product_attention_math_for_mps", 2),
    ],
)
def test_accelerators_attention_makes_the_same_demands(name: str, outputs: int) -> None:
    def demands(name: str, outputs: int) -> tuple[list[np.ndarray], list[Any]]:
        equations = Equations({})
        query, key, value, mask = (torch.zeros(*shape) for shape in ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 7), (5, 6)))
        bias = "attn_mask" if name.endswith(("cpu", "mps")) else "attn_bias"
        given = {
            "query": (query, equations.fresh((1, 4, 1, 3))),
            "key": (key, equations.fresh((1, 2, 1, 3))),
            "value": (value, equations.fresh((1, 2, 1, 7))),
            bias: (mask, equations.fresh((5, 6))),
        }
        rest = [torch.zeros(2, 4, 5), None, None, 5, 6, torch.zeros(2), torch.zeros(()), torch.zeros(0)]
        labels = directly(name, equations, (torch.zeros(2, 4, 5, 7), *rest[: outputs - 1]), given)
        assert len(labels) == outputs
        imposed = [relation.scales for relation in equations.relations] + equations.equalities
        return imposed + [numbers for _, numbers in equations.fixings], labels[:2]

    for actual, expected in zip(demands(name, outputs), demands(CPU, 2), strict=True):
        for first, second in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "outputs", "leading"),
    [
        ("_flash_attention_forward", 5, False),
        ("_efficient_attention_forward", 6, True),
        ("_cudnn_attention_forward", 9, False),
    ],
)
def test_attention_of_jagged_tensors_has_heads_and_length_in_the_other_order(
    name: str, outputs: int, leading: bool
) -> None:
    def demands(name: str, outputs: int, swapped: bool) -> tuple[list[np.ndarray], np.ndarray]:
        equations = Equations({})

        def given(heads: int, length: int, channels: int) -> tuple[Any, Any]:
            tensor, ids = torch.zeros(heads, length, channels), equations.fresh((heads, 1, channels))
            tensor, ids = (tensor.transpose(0, 1), ids.swapaxes(0, 1)) if swapped else (tensor, ids)
            return (tensor[None], ids[None]) if leading else (tensor, ids)

        tensors = {"query": given(4, 5, 3), "key": given(2, 6, 3), "value": given(2, 6, 7)}
        output = given(4, 5, 7)[0]
        labels = directly(name, equations, (output, *[torch.zeros(4, 5)] * (outputs - 1)), tensors)
        assert len(labels) == outputs
        imposed = [relation.scales for relation in equations.relations] + equations.equalities
        imposed += [numbers for _, numbers in equations.fixings]
        return imposed, labels[0].swapaxes(-2, -3) if swapped else labels[0]

    actual, expected = demands(name, outputs, True), demands(CPU, 2, False)
    for first, second in zip([*actual[0], actual[1]], [*expected[0], expected[1]], strict=True):
        np.testing.assert_array_equal(first, second)


def test_keys_in_pages_are_held_fixed() -> None:
    equations = Equations({})
    label = equations.fresh((1, 2, 3))
    tensors = {name: (torch.zeros(5, 2, 3), label) for name in ("query", "key", "value")}
    output = torch.zeros(5, 2, 3)
    (ids,) = directly("_flash_attention_forward", equations, (output,), tensors, block_table=torch.zeros(1))
    assert (ids == FIXED).all()
    assert equations.is_fixed[label].all()
