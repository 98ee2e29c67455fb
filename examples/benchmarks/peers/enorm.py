"""Equi-normalisation: SGD, and after each step a move towards the balanced member of the class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ecopt import ScalingGroup


@dataclass(frozen=True, eq=False)
class _Rescaled:
    """A region of a parameter and its units; unit numbers are in 0 ... H, where H is what is held fixed."""

    parameter: str
    view: Callable[[Tensor], Tensor]
    incoming: Tensor | None
    outgoing: Tensor | None
    shape: torch.Size
    loops: Tensor | None
    additive: bool

    def mass(self, tensor: Tensor) -> Tensor:
        """Squares, added up to one for each pair of units; those that a rescaling does not change are left out."""
        squares = self.view(tensor).square().sum_to_size(self.shape)
        return squares if self.loops is None else squares.masked_fill(self.loops, 0.0)

    def rescale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply a tensor that broadcasts to the region by the units' factors ``[H + 1]``."""
        if self.incoming is not None:
            tensor.mul_(factor[self.incoming])
        if self.outgoing is not None:
            tensor.div_(factor[self.outgoing])


@dataclass(frozen=True, eq=False)
class _Layer:
    """Units that are moved together, ``bool[H + 1]``, by the numbers of the regions that lead into and out of them.

    ``exp(power * log-scale)`` is the ratio of the sums of squares.
    """

    members: Tensor
    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    power: int


class ENorm:
    """One cycle of equi-normalisation after each step of the optimizer, with p = 2.

    Hidden layer by hidden layer from the input on, each unit u with incoming weights I and outgoing weights O is
    rescaled by exp(s_u), which makes their l2 norms equal:

        exp(2 s_u) = |O| / (asymmetry |I|),         w in I: times exp(s_u),         w in O: times exp(-s_u)

    where the norms of later layers are those after the earlier layers' moves (a Gauss-Seidel sweep). With asymmetry 1
    the sum of squares of the weights never grows, and repeated cycles lead to its least value in the class. (Stock,
    Graham, Gribonval, Jegou, "Equi-normalization of Neural Networks", arXiv:1902.10416.)

    Biases and the like do not count in the norms, as the authors advise, but are rescaled with their unit, which keeps
    the function; momentum is rescaled as a gradient is, by the inverse factors, as in the authors' published code.
    Unlike in that code, the norms are fresh at each layer, as in the paper, and the last hidden layer is moved too. Of
    a normalisation layer, which keeps the scale of what it normalises, the affine weight counts as the incoming
    weights. A unit with a zero or undefined norm is left alone; where weights lead from a layer to itself, its step is
    halved, with which the sum still never grows.

    Args:
        group: from :func:`lightning_ecopt.scaling_group`; the parameters must all be on one device.
        optimizer: a ``torch.optim.SGD`` of these parameters.
        asymmetry: the paper's c; above 1 it makes later layers have larger weights than earlier ones.

    Raises:
        ValueError: if the optimizer is another, or ``asymmetry`` is not positive.

    Example::

        enorm = ENorm(scaling_group(model, x), optimizer)
        ...
        optimizer.step()
        enorm.step()
    """

    def __init__(self, group: ScalingGroup, optimizer: torch.optim.Optimizer, asymmetry: float = 1.0) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"ENorm says how to rescale the momentum of SGD, not the state of {type(optimizer).__name__}: "
                "use torch.optim.SGD."
            )
        if not asymmetry > 0:
            raise ValueError(f"asymmetry must be positive, got {asymmetry}: 1 treats all layers alike.")
        self._parameters = group.parameters
        self._optimizer = optimizer
        self._log_asymmetry = 2 * math.log(asymmetry)
        fixed = group.num_units
        first = next(iter(group.parameters.values()), torch.empty(0))
        self._zeros = torch.zeros(fixed + 1, dtype=first.dtype, device=first.device)
        self._regions: list[_Rescaled] = []
        for coupling in group.couplings:
            local = coupling.to(first.device)
            incoming, outgoing = local.incoming % (fixed + 1), local.outgoing % (fixed + 1)
            loops = (incoming == outgoing) & (incoming < fixed)
            region = _Rescaled(
                parameter=coupling.parameter,
                view=coupling.view,
                incoming=incoming if bool((incoming < fixed).any()) else None,
                outgoing=outgoing if bool((outgoing < fixed).any()) else None,
                shape=torch.broadcast_shapes(incoming.shape, outgoing.shape),
                loops=loops if bool(loops.any()) else None,
                additive=coupling.additive,
            )
            if region.incoming is not None or region.outgoing is not None:
                self._regions.append(region)
        self._layers = [self._layer(unit_set.units.to(first.device)) for unit_set in group.unit_sets()]

    def _layer(self, units: Tensor) -> _Layer:
        members = torch.zeros_like(self._zeros, dtype=torch.bool)
        members[units] = True
        incoming, outgoing = (
            [
                number
                for number, region in enumerate(self._regions)
                if not region.additive and (ends := getattr(region, side)) is not None and bool(members[ends].any())
            ]
            for side in ("incoming", "outgoing")
        )
        inner = any(
            bool((members[into] & members[out] & (into != out)).any())
            for into, out in ((self._regions[number].incoming, self._regions[number].outgoing) for number in incoming)
            if into is not None and out is not None
        )
        # exp(2 (a - b)) <= (exp(4 a) + exp(-4 b)) / 2 separates two units of one layer; the bound is least where
        # exp(8 a) = out / in.
        return _Layer(members, tuple(incoming), tuple(outgoing), 8 if inner else 4)

    @torch.no_grad()
    def step(self) -> None:
        """Run one cycle: one pass over the parameters for the norms, one to move them, one for the momentum."""
        masses = {
            number: region.mass(self._parameters[region.parameter])
            for number, region in enumerate(self._regions)
            if not region.additive
        }
        total = self._zeros.clone()
        for layer in self._layers:
            squares = []
            for side, numbers in (("incoming", layer.incoming), ("outgoing", layer.outgoing)):
                sums = self._zeros.clone()
                for number in numbers:
                    ends = getattr(self._regions[number], side)
                    sums.index_add_(0, ends.reshape(-1), masses[number].sum_to_size(ends.shape).reshape(-1))
                squares.append(sums)
            log_ratio = squares[1].log() - squares[0].log() - self._log_asymmetry
            log_scale = torch.where(layer.members & log_ratio.isfinite(), log_ratio / layer.power, 0.0)
            total += log_scale
            factor = (2 * log_scale).exp()
            for number in {*layer.incoming, *layer.outgoing}:
                self._regions[number].rescale_(masses[number], factor)
        factor, inverse = total.exp(), (-total).exp()
        for region in self._regions:
            parameter = self._parameters[region.parameter]
            region.rescale_(region.view(parameter), factor)
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                region.rescale_(region.view(momentum), inverse)
