"""Normalisations: the input is ground, gamma and beta give the output scales of its own.

Epsilon breaks the freedom of what is normalised, so that exact means exact, in training and in evaluation mode alike;
and so the running statistics never change with a rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ecopt.symmetry.labels import GROUND, IntArray, ParameterView, Value, constant
from lightning_ecopt.symmetry.rules.pointwise import add, gain
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_no_update",
)
def batch_norm(call: Call) -> list[Value]:
    return _normalized(call, lambda ids, ndim: ids.reshape((1, -1) + (1,) * (ndim - 2)))


@rule("native_layer_norm")
def layer_norm(call: Call) -> list[Value]:
    return _normalized(call, lambda ids, ndim: ids.reshape((1,) * (ndim - ids.ndim) + ids.shape))


@rule("native_group_norm")
def group_norm(call: Call) -> list[Value]:
    return _normalized(call, lambda ids, ndim: ids.reshape((1, -1) + (1,) * (ndim - 2)))


def _normalized(call: Call, place: Any) -> list[Value]:
    call.tracer.ground(call.ids("input"))
    outputs: Sequence[Any] = call.output if isinstance(call.output, tuple | list) else [call.output]
    ndim = outputs[0].ndim
    ids: Value = constant(GROUND, ndim)
    if call["weight"] is not None:
        weight = call.value("weight")
        if isinstance(weight, ParameterView):
            ids = gain(call, constant(GROUND, ndim), weight.map(lambda axis: place(axis, ndim)))
            ids = call.tracer.materialise(ids) if isinstance(ids, ParameterView) else ids
        else:
            ids = place(weight, ndim)
    if call["bias"] is not None:
        bias = call.value("bias")
        placed = bias.map(lambda axis: place(axis, ndim)) if isinstance(bias, ParameterView) else place(bias, ndim)
        ids = add(call, ids, placed, ndim)
    assert not isinstance(ids, ParameterView)
    return [ids, *(constant(GROUND, output.ndim) for output in outputs[1:])]


__all__: list[str] = ["IntArray", "batch_norm", "group_norm", "layer_norm"]
