"""What to watch of a network besides its loss: numbers that tell how far scales are off, or that ignore them.

All are torchmetrics metrics of models rather than of predictions: what is given to ``update`` is a model or its scaling
group. Several updates are averaged, as the values of several steps or epochs are; nothing that is given is changed.

- :class:`PathNorm` depends on the equivalent class alone.
- :class:`UnitImbalance` is one at the balanced member of the class, and grows with the distance from it.
- :class:`EquivalentClassDistance` compares two models and ignores how their units are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torchmetrics import Metric

from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import listing, widest
from lightning_ecopt.metrics.path_pass import path_power
from lightning_ecopt.symmetry import Monomials, ScalingGroup

#: Of the states. Where a device without float64 may be met, they must not have it.
_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class _MeanOverUpdates(Metric):
    """A number per update; what is computed is their mean.

    Args:
        name: of the number. A ``MetricCollection`` takes metrics whose states have the same names for the same metric
            if their first values agree, so that no two that may differ later can have one name.
        **kwargs: those of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    count: Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum = f"sum_of_{name}"
        self.add_state(self._sum, torch.zeros((), dtype=_DTYPE), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        total: Tensor = getattr(self, self._sum)
        setattr(self, self._sum, total.to(_DTYPE) + value.to(total.device, _DTYPE))
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean of the values of all updates since the last reset, a scalar."""
        total: Tensor = getattr(self, self._sum)
        return total / self.count


class PathNorm(_MeanOverUpdates):
    r"""The path norm of a network: the norm of the vector of products of weights along its paths.

    .. math:: \Big(\sum_\text{paths} \prod_{w \text{ on the path}} |w|^p\Big)^{1/p}

    Paths lead from an element of an input, or from a bias, to an element of an output (Neyshabur, Salakhutdinov,
    Srebro, "Path-SGD", arXiv:1506.02617; with biases, pooling and skips: Gonon et al., "A path-norm toolkit for modern
    networks", arXiv:2310.01225). It does not change if hidden units are rescaled, and for ``p=1`` it bounds the sum of
    the absolute outputs for inputs within [-1, 1]. One call of the model computes it exactly: inputs are ones, and each
    operation is replaced by the sum over paths that it stands for.

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
    taken as given: the paths of an embedding begin at the rows that they pick. Outputs are all tensors of real numbers
    in what the model returns that depend on the inputs.

    Nothing else is covered, as it has no paths: softmax, sigmoid, GELU and the like, ReLU6, layer, group and instance
    norm, comparisons and sorting of activations, division by them, random numbers (but those of dropout).

    Args:
        p: exponent, 1 or 2 as a rule; any real number from 1 on.
        log: take the natural logarithm. A norm whose ``p``-th power exceeds 1e308 is infinite.
        **kwargs: those of :class:`torchmetrics.Metric`.

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
            model: any module; its parameters may have any floating point type. The norm is computed in float64.
            inputs: what the model is called with, on its device, as an ``example_input_array``: a tensor, a tuple of
                positional arguments or a dictionary of named ones. Values of real numbers do not matter.
            samples: how many samples the inputs hold; one is enough. The ``p``-th powers of the paths to all outputs
                are added up and divided by it, but for outputs without axes. By default it is the size of the first
                axis of the first tensor, and outputs must have that axis, too.

        Raises:
            ValueError: if the model has an operation that is not covered; the message says which and where. If no
                output depends on the inputs, or one does not have the axis of the samples. If parameters are sharded.
            RuntimeError: if parameters have no values, as on the meta device.
        """
        with _apart():
            power = path_power(model, inputs, samples, float(self.p))
        self._add(power.log() / self.p if self.log else power ** (1 / self.p))


class UnitImbalance(_MeanOverUpdates):
    """How far the units are off balance: the largest ratio of the norms of incoming and of outgoing elements.

    Of each unit the ratio is taken that is at least 1, whichever norm is the larger one. It is 1 if and only if the
    network is balanced, so that :meth:`lightning_ecopt.ScalingGroup.balance_` would leave it as it is; a unit of a
    balanced network that is multiplied by c has c² or 1/c². With SGD, incoming and outgoing weights move at relative
    rates that differ by the square of the ratio.

    - Where scales are products of powers of units, all elements count that grow, against all that shrink with the unit,
      their squares weighted by the exponents: what is equal at the balanced member of the class.
    - Elements that lead from a unit to itself count on neither side.
    - Scale-invariant units (directions of normalised weights) have one side only. Its root mean square norm counts
      against 1, which the balanced member has.
    - Dormant units, through which no path of non-zero elements leads, have no balance and are left out.
    - Without units it is 1. If an element is infinite or undefined, it is undefined (NaN).

    Args:
        **kwargs: those of :class:`torchmetrics.Metric`.

    Example::

        imbalance = UnitImbalance()
        imbalance.update(scaling_group(model, x))  # or the callback's group
        imbalance.compute()
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("unit_imbalance", **kwargs)

    def update(self, group: ScalingGroup) -> None:
        """Measure the imbalance of the parameters as they are now.

        Args:
            group: the units, as from :func:`lightning_ecopt.scaling_group` or ``callback.group``. It can be used again:
                it refers to the parameters.

        Raises:
            RuntimeError: if parameters have no values, as on the meta device.
        """
        with _apart():
            imbalance = group.imbalance()
        self._add(imbalance)


class EquivalentClassDistance(_MeanOverUpdates):
    """The distance of two models of one architecture that ignores how their units are scaled.

    It is the Euclidean distance between the parameters of their balanced representatives, the members of least sum of
    squares of their equivalent classes: zero between models that differ by a rescaling, symmetric and with a triangle
    inequality unless ``relative``. All parameters count, also those that are not trained or that no unit rescales;
    buffers do not. Permutations of units are not ignored.

    Elements that lead to or from a dormant unit are on no path of non-zero elements and count as zero, for the function
    does not depend on them. Only dormant units in products or powers stay as they are. If an element of either model is
    infinite or undefined, so is the distance (NaN).

    Args:
        relative: divide by the norm of all parameters of the reference's representative.
        **kwargs: those of :class:`torchmetrics.Metric`.

    Example::

        start = copy.deepcopy(model)
        group = scaling_group(model, x)
        distance = EquivalentClassDistance()
        ...  # train
        distance.update(model, start, group)
        distance.compute()
    """

    higher_is_better = None

    def __init__(self, relative: bool = True, **kwargs: Any) -> None:
        super().__init__(f"{'relative_' if relative else ''}class_distance", **kwargs)
        self.relative = relative

    def update(self, model: nn.Module, reference: nn.Module, group: ScalingGroup) -> None:
        """Measure how far ``model`` is from ``reference``; neither changes.

        Args:
            model: any module.
            reference: another of the same architecture, perhaps on another device or of another type.
            group: the units of either of them. The scales of what it was told to hold fixed are not ignored.

        Raises:
            ValueError: if names or shapes of parameters differ, or are not those of the group.
            RuntimeError: if parameters have no values, as on the meta device.
        """
        with _apart():
            weights = {name: _whole(p) for name, p in model.named_parameters()}
            others = {name: _whole(p) for name, p in reference.named_parameters()}
            _check_match(weights, others, group)
            sound = all(bool(tensor.isfinite().all()) for tensor in (*weights.values(), *others.values()))
            one, two = _representative(weights, group), _representative(others, group)
            distance = _norm(one[name] - weight.to(one[name].device) for name, weight in two.items())
            if self.relative:
                size = _norm(two.values()).to(distance.device)
                distance = torch.where(distance == 0, distance, distance / size)
        self._add(distance if sound else torch.full_like(distance, math.nan))


@contextmanager
def _apart() -> Iterator[None]:
    """Compute without gradients and unseen by whoever watches, as when a first training step tells the freedoms."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    norms = [tensor.norm() for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros(())


def _whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, gathered from all ranks if it is sharded."""
    whole: Any = parameter
    return (whole.full_tensor() if is_sharded(parameter) else parameter).detach()


def _of(group: ScalingGroup, tensors: Mapping[str, Tensor]) -> ScalingGroup:
    """The same group for other tensors in the places of its parameters."""
    return replace(group, parameters={name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()})


def _check_match(weights: Mapping[str, Tensor], others: Mapping[str, Tensor], group: ScalingGroup) -> None:
    problems = [f"{name!r} is in the model only" for name in weights if name not in others]
    problems += [f"{name!r} is in the reference only" for name in others if name not in weights]
    problems += [
        f"{name!r} has shape {list(weight.shape)} in the model and {list(others[name].shape)} in the reference"
        for name, weight in weights.items()
        if name in others and weight.shape != others[name].shape
    ]
    if problems:
        raise ValueError(f"the parameters of the models do not match: {listing(problems, 4)}")
    problems = [f"{name!r} is in the group only" for name in group.parameters if name not in weights]
    problems += [
        f"{name!r} has shape {list(parameter.shape)} in the group and {list(weights[name].shape)} in the models"
        for name, parameter in group.parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    if problems:
        raise ValueError(
            f"the group is not one of the models: {listing(problems, 4)}; make it with scaling_group(model, ...) from "
            "the module that is compared, not from a part of it or a module around it"
        )
    empty = [name for name in weights if weights[name].is_meta or others[name].is_meta]
    if empty:
        raise RuntimeError(f"{len(empty)} parameters, {empty[0]} first, are on the meta device and have no values")


def _representative(weights: Mapping[str, Tensor], group: ScalingGroup) -> dict[str, Tensor]:
    """The balanced member of the class of these weights, without what dormant units make of no use, in float64."""
    copies = {name: weight.to(widest(weight.device), copy=True) for name, weight in weights.items()}
    group = _of(group, {name: copies[name] for name in group.parameters})
    _remove_dormant_(group)
    group.balance_()
    return copies


def _remove_dormant_(group: ScalingGroup) -> None:
    """Set to zero what leads to or from units without a path of non-zero elements, but for units in products."""
    # With all others held still, a unit that stays dormant is so whatever these do.
    paired = group.monomials.simple & ~group.scale_invariant
    none = torch.zeros(0, dtype=torch.long)
    alone = replace(
        group,
        couplings=[coupling.restricted(paired) for coupling in group.couplings],
        monomials=Monomials(group.num_units, group.num_units, none, none, none.double()),
    )
    dormant = paired & ~alone.alive().cpu()
    if not bool(dormant.any()):
        return
    dormant = torch.cat([dormant, dormant.new_zeros(1)])  # index -1 is the last
    for coupling in alone.couplings:
        region = coupling.view(group.parameters[coupling.parameter])
        region.masked_fill_((dormant[coupling.incoming] | dormant[coupling.outgoing]).to(region.device), 0.0)
