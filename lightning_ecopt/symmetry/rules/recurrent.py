"""Recurrent layers that a library runs as one operation, ``h' = tanh(W x + U h + b)``: h, U and b are fixed, x is not.

The element ``W[gate, channel]`` scales by 1 / label(x[channel]).
"""

from __future__ import annotations

from lightning_ecopt.symmetry.labels import FIXED, IntArray, ParameterView, constant
from lightning_ecopt.symmetry.rules.registry import Call, rule


@rule("mkldnn_rnn_layer")
def recurrent_layer(call: Call) -> list[IntArray]:
    """One direction of one layer of an LSTM on the CPU: ``weight0`` is W, the others are U and the biases."""
    _lead_in(call, "input", [call["weight0"]])
    call.hold_fixed("weight1", "weight2", "weight3", "hx_", "cx_")
    return [constant(FIXED, getattr(output, "ndim", 0)) for output in call.output]


@rule("_cudnn_rnn")
def recurrent_network(call: Call) -> list[IntArray]:
    """All layers at once: ``weight`` lists W, U and biases, ``weight_stride0`` of them per layer and direction."""
    size, directions = call["weight_stride0"], 2 if call["bidirectional"] else 1
    first = [call["weight"][number * size] for number in range(directions)]
    _lead_in(call, "input", first)
    for weight in call["weight"]:
        if not any(weight is other for other in first):
            call.equations.hold_fixed(call.value(weight))
    call.hold_fixed("hx", "cx", "dropout_state")
    return [constant(FIXED, getattr(output, "ndim", 0)) for output in call.output]


def _lead_in(call: Call, name: str, weights: list[object]) -> None:
    """Lead from an input [..., channels] through ``weights`` [gates, channels] to gates that are fixed."""
    ids = call.uniform(name, range(len(call.shape(name)) - 1)).reshape(1, -1)
    for weight in weights:
        value = call.value(weight)
        if isinstance(value, ParameterView):
            call.equations.assign(value, constant(FIXED, 2), ids, additive=False)
        else:
            call.equations.hold_fixed(call.equations.combine((1, ids), (1, value)))
