"""What could be done about an operation that costs freedoms: nothing, another module, or a stand-in."""

from __future__ import annotations

import re

from lightning_ecopt.symmetry.rules.registry import RULES

#: Activations that bend at a point of their own, for which others stand that bend at zero.
ACTIVATIONS = {
    *("celu", "clamp", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "log_sigmoid_forward"),
    *("mish", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "tanh"),
}
#: Norms, whose epsilon does not scale.
NORMS = {
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"),
    *("_native_batch_norm_legit_no_training", "miopen_batch_norm", "_fused_rms_norm"),
}
#: Functions out of which no factor comes.
SOFT = {
    *("_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "erf", "sin", "cos"),
    *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10"),
}
#: What is no operation, but an end of the call.
ENDS = {"input", "output", "kept by the module", "call", "another call"}


def advice(name: str) -> str:
    """Say in a few words what could be done about an operation that fixes scales.

    Args:
        name: of the operation, as a report has it.

    Example::

        advice("gelu")  # "another activation: ReLU, LeakyReLU, PReLU"
    """
    if re.split(r"[\[.]", name)[0] in ENDS:
        return "nothing: it must stay"
    if name in ACTIVATIONS:
        return "another activation: ReLU, LeakyReLU, PReLU"
    if name in NORMS:
        return "nothing: its epsilon does not scale"
    if name in SOFT or "loss" in name or "nll" in name:
        return "nothing: no factor leaves it"
    if name in RULES:
        return "nothing: its rule is exact"
    return "perhaps a stand-in: docs/operations.md"
