"""What a step does to each layer, measured on request, as it takes a copy of the weights and waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.tensors import Tensors
from lightning_ecopt.optim.stages import Running
from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.coupling import NO_UNIT
from lightning_ecopt.symmetry.layers import layer_of


@dataclass(frozen=True)
class LayerStatistics:
    """What one step has done to the weights of one layer.

    Args:
        relative_step: the length of the step over that of the weights behind it, ``|w' - w| / |w'|``, without what a
            refresh has moved; 0 for a layer of zeros that stays one.
        clipped: share of the gradients of the layer's rows that were clipped; ``None`` if the rule clips none.
        imbalance: the largest ratio of incoming to outgoing norm, or its inverse, of the units that the layer leads
            into, behind the step; ``None`` if it leads into none.
    """

    relative_step: float
    clipped: float | None
    imbalance: float | None


class Layers:
    """Measures single steps of an optimizer, layer by layer.

    Attributes:
        is_wanted: whether the next step is to be measured.

    Example::

        optimizer.layers.measure_next()
        optimizer.step()
        optimizer.layers.statistics()["0"].relative_step  # of the weights and biases of the first module
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self._last: dict[str, LayerStatistics] = {}

    def measure_next(self) -> None:
        """Measure the next step, and forget the last one that was measured."""
        self.is_wanted, self._last = True, {}

    def statistics(self) -> Mapping[str, LayerStatistics]:
        """Return what the measured step has done, by layer; empty if it was a step of the base optimizer's own."""
        return self._last

    @contextmanager
    def measured(self, stage: Running, weights: Tensors) -> Iterator[None]:
        """While entered, a step moves the weights; it is measured if somebody asked for it."""
        if not self.is_wanted:
            yield
            return
        self.is_wanted = False
        moved = {name: weights[name].clone() for name in stage.rule.rows.names}
        stage.rule.is_measured = True
        try:
            yield
        finally:
            stage.rule.is_measured = False
        for name, before in moved.items():
            before.sub_(weights[name])
        self._last = _statistics(stage, {name: weights[name] for name in moved}, moved)


def _statistics(stage: Running, weights: Tensors, moved: Tensors) -> dict[str, LayerStatistics]:
    """Put the sums over rows together for each layer.

    Args:
        stage: the network and the rule.
        weights: behind the step, by parameter name.
        moved: what the step has taken from them.
    """
    rule, rows = stage.rule, stage.rule.rows
    layers = list(dict.fromkeys(map(layer_of, rows.names)))
    to_layers = SegmentSum(
        torch.tensor([layers.index(layer_of(name)) for name in rows.names], device=rows.device), len(layers)
    )

    def total(of_rows: Tensor) -> Tensor:
        return to_layers(rows.by_parameter(of_rows))

    length, step = (total(rows.reduced(rule.kernels, "sums_and_squares", of)[1]) for of in (weights, moved))
    relative = (step / length).nan_to_num(0, torch.inf).sqrt()  # 0 / 0 where a layer of zeros stays one
    is_clipped = rule.clipped_rows()
    shares: list[float | None] = [None] * len(layers)
    if is_clipped is not None:
        shares = (total(is_clipped.to(rows.dtype)) / total(torch.ones_like(is_clipped, dtype=rows.dtype))).tolist()
    imbalances = largest_imbalances(stage.network.group)
    return {
        layer: LayerStatistics(size, share, imbalances.get(layer))
        for layer, size, share in zip(layers, relative.tolist(), shares, strict=True)
    }


def largest_imbalances(group: ScalingGroup) -> dict[str, float]:
    """The largest imbalance of the units that each layer leads into, by layer; those that lead into none are missing.

    If parameters are sharded, call it on all ranks.
    """
    each = group.imbalances().cpu()
    into: dict[str, Tensor] = {}
    for coupling in group.couplings:
        none = torch.zeros(group.monomials.num_scales, dtype=torch.bool, device="cpu")
        incoming = coupling.incoming.cpu()
        into.setdefault(layer_of(coupling.parameter), none)[incoming[incoming != NO_UNIT]] = True
    units = {layer: group.monomials.in_(scales) for layer, scales in into.items()}
    return {layer: float(each[chosen].max()) for layer, chosen in units.items() if bool(chosen.any())}
