"""What could be done about an operation that costs freedoms: nothing, another module, or a stand-in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from lightning_ecopt.symmetry.aten import EXITS
from lightning_ecopt.symmetry.rules.registry import RULES
from lightning_ecopt.symmetry.scales import Operation

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
#: What is no operation, but an end of the call, or what was seen of training.
ENDS = {
    **dict.fromkeys(("input", "output", "loss", "call", "another call"), "nothing: it must stay"),
    "kept by the module": "do not keep it in an attribute",
    "gradient": "a penalty, a loss on features, or changed gradients: see the warning",
    "somebody else writes to the weights": "a parametrization, or freeze it: see the warning",
    "left out by the user": "nothing: you have left them out",
    "an unfrozen copy": "freeze it: see the warning",
    "_local_scalar_dense": "compute what is only logged outside of training_step, as in on_train_batch_end",
}
#: Parts of what a call returns.
PARTS = {
    "output": "say what counts: outputs=",
    "loss": "leave it out of what training_step returns",
}


def advice(name: str, places: Sequence[str] = ()) -> str:
    """Say in a few words what could be done about an operation that fixes scales.

    Args:
        name: of the operation, as a report has it.
        places: the modules or lines that it was in, likewise.

    Example::

        advice("gelu")  # "another activation: ReLU, LeakyReLU, PReLU"
    """
    root = re.split(r"[\[.]", name)[0]
    if root in PARTS and name not in (root, f"{root}['loss']"):
        return PARTS[root]
    in_step = bool(places) and all(place.startswith("training_step, line ") for place in places)
    if in_step and (name in ("gradient", "clamp", "softplus") or name in SOFT or _is_loss(name)):
        return "nothing: part of the loss"
    if name in ENDS or root in PARTS:
        return ENDS[root if root in PARTS else name]
    if name in ACTIVATIONS:
        return "another activation: ReLU, LeakyReLU, PReLU"
    if name in NORMS:
        return "nothing: its epsilon does not scale"
    if name in SOFT or _is_loss(name):
        return "nothing: no factor leaves it"
    if name in RULES:
        return "nothing: its inputs must scale alike"
    if name in EXITS:  # no operations, of which there could be stand-ins
        return "wrap it by torch.library.custom_op, with a stand-in"
    return "perhaps a stand-in: help(lightning_ecopt.symmetry.stand_in)"


def is_possible(todo: str) -> bool:
    """Whether an :func:`advice` tells something to do."""
    return not todo.startswith("nothing: ")


def _is_loss(name: str) -> bool:
    return any(word in name for word in ("loss", "nll", "cross_entropy"))


#: Why scales are fixed, in a few words.
Reason = Literal[
    "an end: input, output, loss",
    "a norm: its epsilon does not scale",
    "an activation that does not bend at zero",
    "softmax, exp, log or a loss",
    "what must scale alike, as in sums",
    "an operation without a rule",
    "on request, or by a check",
]
#: What is held because somebody asked for it, or because training has shown something.
LATER = {"gradient", "somebody else writes to the weights", "left out by the user", "an unfrozen copy"}


def reason(operation: Operation) -> Reason:
    """Say what kind of operation it is that fixes scales.

    Example::

        reason(Operation("gelu", "blocks.0.act"))  # "an activation that does not bend at zero"
    """
    name = operation.name
    if name in LATER:
        return "on request, or by a check"
    if name in {*ENDS, "step", "copies of weights"} or re.split(r"[\[.]", name)[0] in PARTS:
        return "an end: input, output, loss"
    if name in NORMS:
        return "a norm: its epsilon does not scale"
    if name in ACTIVATIONS:
        return "an activation that does not bend at zero"
    if name in SOFT or _is_loss(name):
        return "softmax, exp, log or a loss"
    return "what must scale alike, as in sums" if name in RULES else "an operation without a rule"
