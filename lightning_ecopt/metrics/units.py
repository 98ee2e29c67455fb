"""How units are scaled: how far they are off balance, and the distance of two models that ignores it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.common.flat import is_piece
from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import listing, padded, widest
from lightning_ecopt.metrics.base import MeanOverUpdates, unobserved
from lightning_ecopt.symmetry import Monomials, ScalingGroup


class UnitImbalance(MeanOverUpdates):
    """Measures how far the units are off balance: by the largest ratio of incoming to outgoing norm.

    When a unit is rescaled by c, its incoming elements are multiplied by c and its outgoing elements are divided by c.
    The ratio of a unit is the norm of all its incoming elements over the norm of all its outgoing elements, or the
    inverse if that is larger, so that it is at least 1. The imbalance is 1 if and only if the network is balanced, that
    is, if :meth:`lightning_ecopt.ScalingGroup.balance_` would leave it as it is. If one unit of a balanced network is
    rescaled by c, the imbalance is c² or 1/c². With SGD, incoming and outgoing weights move at relative rates that
    differ by the square of the ratio.

    - An element that is multiplied by a product of powers of units counts for each of them, its square weighted by the
      exponent. These sums of squares are equal at the balanced member of the class.
    - An element that leads from a unit to itself does not count.
    - A scale-invariant unit (the direction of a normalised weight) has incoming elements only. Their root mean square,
      which is 1 at the balanced member, is compared with 1.
    - A dormant unit, through which no path of non-zero elements leads, has no balance and is left out.
    - A network without units has the imbalance 1. If an element is infinite or undefined, the imbalance is undefined
      (NaN).

    Args:
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example::

        imbalance = UnitImbalance()
        imbalance.update(scaling_group(model, x))  # or the callback's group
        imbalance.compute()
    """

    higher_is_better = False
    plot_lower_bound = 1.0
    plots_logarithms = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("unit_imbalance", **kwargs)

    def update(self, group: ScalingGroup) -> None:
        """Measure the imbalance of the parameters as they are now.

        Args:
            group: The units, from :func:`lightning_ecopt.scaling_group` or ``callback.group``. The same group can be
                given again later, as it refers to the parameters themselves.

        Raises:
            RuntimeError: If parameters have no values, as on the meta device.
        """
        with unobserved():
            imbalance = group.imbalance()
        self._add(imbalance)


class EquivalentClassDistance(MeanOverUpdates):
    """Measures the distance of two models of one architecture, whatever their units are scaled by.

    It is the Euclidean distance between the parameters of the balanced representatives of the two models: the members
    of least sum of squares of their equivalent classes. It is zero between models that differ by a rescaling. Unless
    ``relative``, it is symmetric and obeys the triangle inequality. All parameters count, also those that are not
    trained or that no unit rescales; buffers do not. Models that differ by a permutation of units have a distance.

    The function does not depend on elements that lead to or from a dormant unit, as no path of non-zero elements leads
    through it. They count as zero, except where a dormant unit is part of a product of powers of units. If an element
    of either model is infinite or undefined, the distance is undefined (NaN).

    Args:
        relative: Whether to divide by the norm of all parameters of the reference's representative.
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example::

        start = copy.deepcopy(model)
        group = scaling_group(model, x)
        distance = EquivalentClassDistance()
        ...  # train
        distance.update(model, start, group)
        distance.compute()
    """

    higher_is_better = None
    plot_lower_bound = 0.0

    def __init__(self, relative: bool = True, **kwargs: Any) -> None:
        super().__init__(f"{'relative_' if relative else ''}class_distance", **kwargs)
        self.relative = relative

    def update(self, model: nn.Module, reference: nn.Module, group: ScalingGroup) -> None:
        """Measure how far ``model`` is from ``reference``; neither changes.

        Args:
            model: Any module.
            reference: A module of the same architecture, possibly on another device or of another floating point type.
            group: The units of one of the two. Scales that the group holds fixed are not ignored by the distance.

        Raises:
            ValueError: If names or shapes of parameters differ, or are not those of the group.
            RuntimeError: If parameters have no values, as on the meta device.
        """
        with unobserved():
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


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of all elements of some tensors, which may be on several devices."""
    norms = [tensor.norm() for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros((), device="cpu")


def _whole(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, gathered from all ranks if it is sharded.

    Raises:
        ValueError: if FSDP1 has flattened it.
    """
    if is_piece(parameter):
        raise ValueError(
            "FullyShardedDataParallel leaves pieces of parameters, of which no distance is taken: compare the modules "
            "that full state dicts are loaded into."
        )
    whole: Any = parameter
    return (whole.full_tensor() if is_sharded(parameter) else parameter).detach()


def _of(group: ScalingGroup, tensors: Mapping[str, Tensor]) -> ScalingGroup:
    """Return the same group with other tensors in the places of its parameters."""
    return replace(group, parameters={name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()})


def _check_match(weights: Mapping[str, Tensor], others: Mapping[str, Tensor], group: ScalingGroup) -> None:
    """Raise an error unless the model, the reference and the group have parameters of the same names and shapes."""
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
    """Return the balanced member of the class of some weights, zero where dormant units are, in float64."""
    copies = {name: weight.to(widest(weight.device), copy=True) for name, weight in weights.items()}
    group = _of(group, {name: copies[name] for name in group.parameters})
    _remove_dormant_(group)
    group.balance_()
    return copies


def _remove_dormant_(group: ScalingGroup) -> None:
    """Set to zero all elements that lead to or from dormant units, except units in products of powers."""
    # A unit that is dormant with all units in products held fixed is dormant whatever their scales are.
    paired = group.monomials.simple & ~group.scale_invariant
    none = torch.zeros(0, dtype=torch.long, device="cpu")
    alone = replace(
        group,
        couplings=[coupling.restricted(paired) for coupling in group.couplings],
        monomials=Monomials(group.num_units, group.num_units, none, none, none.double()),
    )
    dormant = paired & ~alone.alive().cpu()
    if not bool(dormant.any()):
        return
    dormant = padded(dormant, False)
    for coupling in alone.couplings:
        region = coupling.view(group.parameters[coupling.parameter])
        region.masked_fill_((dormant[coupling.incoming] | dormant[coupling.outgoing]).to(region.device), 0.0)
