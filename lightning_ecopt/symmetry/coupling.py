"""See the functions below."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ecopt.common.sharding import Part


@dataclass(frozen=True, eq=False)
class Coupling:
    """How a box-shaped region of one parameter scales.

    Rescaling unit ``u`` by ``c`` multiplies the elements where ``incoming == u`` by ``c`` and those where
    ``outgoing == u`` by ``1 / c``. Numbers from H on stand for products of powers of units, see :class:`Monomials`.

    Args:
        parameter: name of the parameter in the module.
        region: slices of the parameter.
        incoming: scale of what each element leads into, ``-1`` for none; integers that broadcast to the region.
        outgoing: scale of what each element comes from, ``-1`` for none; likewise.
        additive: whether the elements are added (a bias) rather than multiplied with data.
    """

    parameter: str
    region: tuple[slice, ...]
    incoming: Tensor
    outgoing: Tensor
    additive: bool

    def view(self, tensor: Tensor) -> Tensor:
        """The region of ``tensor``, which has the parameter's shape, as a view."""
        return tensor.view(1)[self.region] if tensor.ndim == 0 else tensor[self.region]

    def of_shard(self, parameter: Tensor) -> Coupling | None:
        """The same coupling for what this rank holds of the parameter, ``None`` if nothing of the region is here.

        Its :meth:`view` is one of the :func:`~lightning_ecopt.common.sharding.local` tensor.
        """
        part = Part.of(self.region, parameter)
        if part is None:
            return None
        return replace(self, region=part.region, incoming=part.cut(self.incoming), outgoing=part.cut(self.outgoing))

    def to(self, device: torch.device) -> Coupling:
        """The same coupling with its unit numbers on ``device``."""
        incoming, outgoing = self.incoming.to(device), self.outgoing.to(device)
        return Coupling(self.parameter, self.region, incoming, outgoing, self.additive)

    def restricted(self, active: Tensor) -> Coupling:
        """The same coupling with the units that are not ``active`` (``bool[H]``), and all products, held still."""
        padded = torch.cat([active, active.new_zeros(1)])  # index -1 is the last
        incoming = self.incoming.where(padded[self.incoming.clamp(max=len(active))], NO_UNIT)
        outgoing = self.outgoing.where(padded[self.outgoing.clamp(max=len(active))], NO_UNIT)
        return Coupling(self.parameter, self.region, incoming, outgoing, self.additive)


NO_UNIT = -1
