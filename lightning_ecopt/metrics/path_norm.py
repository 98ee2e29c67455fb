"""The path norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.metrics.base import MeanOverUpdates, unobserved
from lightning_ecopt.metrics.path_pass import PathPass
from lightning_ecopt.metrics.path_rules import RULES
from lightning_ecopt.symmetry.isolation import UNCOMPILED, attributes_kept


class PathNorm(MeanOverUpdates):
    r"""The path norm of a network: the norm of the vector of products of weights along its paths.

    .. math:: \Big(\sum_\text{paths} \prod_{w \text{ on the path}} |w|^p\Big)^{1/p}

    Paths lead from an element of an input, or from a bias, to an element of an output (Neyshabur, Salakhutdinov,
    Srebro, "Path-SGD", arXiv:1506.02617; with biases, pooling and skips: Gonon et al., "A path-norm toolkit for modern
    networks", arXiv:2310.01225). It does not change if hidden units are rescaled, and for ``p=1`` it bounds the sum of
    the absolute outputs for inputs within [-1, 1].

    One call of the model computes it exactly: inputs are ones, and each operation is replaced by a sum over paths. For
    two layers, ``V relu(W x + b) + c``, the ``p``-th power of the norm is the sum of the elements of
    ``|V|^p (|W|^p 1 + |b|^p) + |c|^p``.

    ========================================================  ======================================================
    the network as in evaluation mode                         what a path is multiplied by
    ========================================================  ======================================================
    linear maps and convolutions of any kind, biases          ``|w|``: one path for each place at which w is used
    sums, differences, skips, concatenation, moving elements  1
    ReLU, absolute values, dropout                            1
    leaky ReLU, PReLU                                         the larger of 1 and the absolute slope
    max pooling, maxima                                       1: paths lead through all elements that compete
    mean, average pooling, interpolation                      the weights of the average
    batch norm                                                ``|gamma / sqrt(running_var + eps)|``; its shift is a bias
    gates, products and powers of activations                 a path is one through each factor, together
    ========================================================  ======================================================

    What depends on parameters, buffers and constants only (normalised, pruned or merged weights, positions) is computed
    as it is and counts as a weight or a bias. Integers and truth values among the inputs (tokens, edges, masks) are
    taken as given: the paths of an embedding begin at the rows that they pick. All tensors of real numbers that the
    model returns and that depend on the inputs are outputs.

    Operations that have no paths are not covered: softmax, sigmoid, GELU and the like, ReLU6, layer, group and instance
    norm, comparison and sorting of activations, division by activations, and random numbers other than dropout.

    Args:
        p: The exponent, usually 1 or 2, is a real number from 1 on.
        log: Whether to take the natural logarithm. A norm whose ``p``-th power exceeds 1e308 is infinite either way.
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``p`` is less than 1 or not finite.

    Example::

        norm = PathNorm(p=1)
        norm.update(model, torch.zeros(1, 784))  # the values do not matter, shapes do
        norm.compute()
    """

    higher_is_better = None

    def __init__(self, p: float = 2, log: bool = False, **kwargs: Any) -> None:
        if not 1 <= p < math.inf:
            raise ValueError(f"p must be a real number from 1 on, got {p}")
        super().__init__(f"{'log_' if log else ''}path_norm_{float(p)}".replace(".", "_"), **kwargs)
        self.p = p
        self.log = log

    def update(self, model: nn.Module, inputs: Any, samples: int | None = None) -> None:
        """Evaluate the path norm of ``model``; nothing in it changes, not even meanwhile.

        Args:
            model: Any module, with parameters of any floating point type. The norm is computed in float64.
            inputs: What the model is called with, on its device, in the form of an ``example_input_array``: a tensor, a
                tuple of positional arguments or a dictionary of named ones. Values of real numbers do not matter.
            samples: Number of samples in the inputs; one is enough. The sum over all paths to an output is divided by
                it, unless the output has no axes. By default it is the size of the first axis of the first tensor, and
                outputs must have that axis, too.

        Raises:
            ValueError: If the model has an operation that is not covered; the message says which and where. If no
                output depends on the inputs, or an output does not have the axis of the samples. If parameters are
                sharded.
            RuntimeError: If parameters have no values, as on the meta device.
        """
        with unobserved():
            power = path_power(model, inputs, samples, float(self.p))
        self._add(power.log() / self.p if self.log else power ** (1 / self.p))


def path_power(model: nn.Module, inputs: Any, samples: int | None, p: float) -> Tensor:
    """Sum the ``p``-th powers of the absolute products of weights over all paths, per sample.

    Args:
        model: is called once.
        inputs: what it is called with.
        samples: number of samples in the inputs; ``None`` for the size of the first axis of the first tensor.
        p: exponent.

    Returns:
        A scalar in float64, or float32 on devices without it.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be a positive number, got {samples}")
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with _isolated(model, given):
        paths = PathPass(model, p, RULES)
        args, kwargs = tree_map_only(Tensor, paths.enter, (args, kwargs))
        with paths:
            output = model(*args, **kwargs)
        outputs = [tensor for tensor in tensors_in(output, objects=True) if paths.is_path(tensor)]
        if not outputs:
            raise ValueError(f"no output of {type(model).__name__} is a real number that depends on the inputs")
        if samples is None:
            samples = _first_axis(given[0], outputs)
        totals = [paths.value(tensor).sum() / (samples if tensor.ndim else 1) for tensor in outputs]
        result = torch.stack([total.to(totals[0].device) for total in totals]).sum()
    return result.clone()  # one that may be used outside inference mode


@contextmanager
def _isolated(model: nn.Module, given: Sequence[Tensor]) -> Iterator[None]:
    """Let a model be called so that a path pass sees each operation, and nothing that the call writes stays."""
    state = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in state):
        raise RuntimeError("the model has parameters or buffers on the meta device, which have no values")
    if any(map(is_sharded, state)):
        raise ValueError("PathNorm does not cover sharded parameters")
    if not given:
        raise ValueError("the inputs hold no tensor")
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in [*state, *given]}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(attributes_kept(model, {}))
        stack.enter_context(UNCOMPILED())
        stack.enter_context(torch.inference_mode())  # in which a dropout is one operation, not a random mask
        yield


def _first_axis(first: Tensor, outputs: Sequence[Tensor]) -> int:
    """The number of samples: the size of the first axis of the inputs, if outputs have it, or all of it merged."""
    samples = len(first) if first.ndim else 1
    for output in outputs:
        if output.ndim and (samples == 0 or len(output) % samples):
            raise ValueError(
                f"an output has shape {list(output.shape)}, but the first tensor of the inputs {list(first.shape)}: if "
                "its first axis is not that of the samples, say how many there are, with samples=1 for one without axis"
            )
    return samples
