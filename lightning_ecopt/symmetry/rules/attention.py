"""Attention, ``softmax(q @ k.T) @ v``: label(q) * label(k) is fixed in every channel, label(v) is the output's."""

from __future__ import annotations

import numpy as np

from lightning_ecopt.symmetry.labels import FIXED, IntArray, align, constant
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
def scaled_dot_product(call: Call) -> list[IntArray]:
    """Inputs are [..., heads, length, channels]; heads of keys and values may be fewer, and shared by the queries'."""
    return _attended(call, -3)


@rule("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")
def attention_of_jagged(call: Call) -> list[IntArray]:
    """Inputs are [..., length, heads, channels], as those of jagged tensors on a GPU; keys in pages are held fixed."""
    if call.arguments.get("block_table") is not None:
        call.hold_fixed("query", "key", "value")
        return [constant(FIXED, getattr(part, "ndim", 0)) for part in call.output]
    ids, *others = _attended(call, -2)
    return [ids.swapaxes(-2, -3), *others]


@rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def gradients_of_attention(call: Call) -> list[IntArray]:
    """Of v a sum of g; of scores s = p (g v.T - a sum over keys), where p is fixed; of q and k then s k and s.T q."""
    call.hold_fixed("attn_mask")
    names = ("grad_out", "query", "key", "value")
    above, query, key, value = (call.uniform(name, [len(call.shape(name)) - 2]) for name in names)
    if call.shape("key")[-3] != call.shape("query")[-3]:  # heads that are shared, whose gradients are summed
        call.hold_fixed(*names)
        return [constant(FIXED, above.ndim)] * 3
    scores = call.equations.uniform(call.equations.combine((1, above), (1, value)), [above.ndim - 1])
    return [call.equations.combine((1, scores), (1, ids)) for ids in (key, query)] + [above]


def _attended(call: Call, heads_at: int) -> list[IntArray]:
    """The labels of outputs [..., heads, length, channels], for inputs that have their heads at this axis."""
    call.hold_fixed("attn_mask", "attn_bias", "bias", "alibi_slopes")
    length = -5 - heads_at
    query, key, value = (
        call.uniform(name, [len(call.shape(name)) + length]).swapaxes(-2, length) for name in ("query", "key", "value")
    )
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    if query.ndim > 2:
        heads = call.shape("query")[heads_at]
        key, value = (_shared(ids, heads) for ids in (key, value))
    scores = call.equations.combine((1, query), (1, key))
    call.equations.hold_fixed(call.equations.uniform(scores, [scores.ndim - 1]))
    return [align(value, outputs[0].ndim), *(constant(FIXED, getattr(part, "ndim", 0)) for part in outputs[1:])]


def _shared(ids: IntArray, heads: int) -> IntArray:
    """Repeat the heads of keys or values until there are as many as heads of queries."""
    return ids if ids.shape[-3] in (1, heads) else np.repeat(ids, heads // ids.shape[-3], axis=-3)
