"""The scales by which weights are multiplied, as products of powers of the units."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.tensors import widest


@dataclass(frozen=True, eq=False)
class Monomials:
    """Monomials 0 to ``num_units - 1`` are the units themselves, all further ones products of powers of units.

    In logarithms a scale is a linear combination of units. Where activations are multiplied by each other it is a sum,
    where attention makes keys shrink as queries grow its coefficient is -1, behind a square it is 2.

    Args:
        num_units: number of units H.
        num_scales: number of scales S.
        products: ``int[T]``, for each term of a product the scale that it belongs to.
        units: ``int[T]``, its unit.
        exponents: ``float64[T]``, the exponent of the unit.
    """

    num_units: int
    num_scales: int
    products: Tensor
    units: Tensor
    exponents: Tensor
    _copies: dict[torch.device, Monomials] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device) -> Monomials:
        """The same on ``device``."""
        if self.products.device == device:
            return self
        if device not in self._copies:
            terms = (self.products.to(device), self.units.to(device), self.exponents.to(device, widest(device)))
            self._copies[device] = Monomials(self.num_units, self.num_scales, *terms)
        return self._copies[device]

    @cached_property
    def _to_products(self) -> SegmentSum:
        return SegmentSum(self.products - self.num_units, self.num_scales - self.num_units)

    @cached_property
    def _to_units(self) -> SegmentSum:
        return SegmentSum(self.units, self.num_units)

    def of(self, values: Tensor) -> Tensor:
        """Logarithms of the scales ``[S]`` from those of the units ``[H]``."""
        if self.num_scales == self.num_units:
            return values
        return torch.cat([values, self._to_products(self.exponents.to(values) * values[self.units])])

    def collect(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`of`: from values of the scales ``[S]`` to sums for the units ``[H]``."""
        return self._sum(values, self.exponents)

    def collect_parts(self, rising: Tensor, falling: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the scales, ``[S]``, where these count as positive and where as negative, for the units ``[H]``."""
        positive, negative = self.exponents.clamp(min=0), (-self.exponents).clamp(min=0)
        both = self._sum(rising, positive), self._sum(falling, positive)
        if self.num_scales == self.num_units:
            return both
        turned = torch.zeros(self.num_units).to(rising)
        other = [torch.cat([turned, values[self.num_units :]]) for values in (falling, rising)]
        return both[0] + self._sum(other[0], negative), both[1] + self._sum(other[1], negative)

    def _sum(self, values: Tensor, exponents: Tensor) -> Tensor:
        own = values[: self.num_units]
        if self.num_scales == self.num_units:
            return own
        return own + self._to_units(exponents.to(values) * values[self.products])

    @property
    def reach(self) -> float:
        """The largest sum of absolute exponents of one scale."""
        if self.num_scales == self.num_units:
            return 1.0
        return max(1.0, float(self._to_products(self.exponents.abs()).max()))

    def bounded(self, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Which scales (``[S]``) are bounded above and below, from those units (``[H]``) that are."""
        if self.num_scales == self.num_units:
            return above, below
        first, second = self._open_terms(above, below)
        return torch.cat([above, self._to_products(first) == 0]), torch.cat([below, self._to_products(second) == 0])

    def _open_terms(self, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Terms that are not known to be bounded above, and below; one or zero, ``[T]``."""
        rises = self.exponents > 0
        above, below = above[self.units], below[self.units]
        first, second = torch.where(rises, above, below), torch.where(rises, below, above)
        return (~first).to(self.exponents), (~second).to(self.exponents)

    def bound_units(self, above: Tensor, below: Tensor, scales_above: Tensor, scales_below: Tensor) -> None:
        """Draw conclusions for the units, in place: a bounded product bounds a factor if the others are bounded."""
        above |= scales_above[: self.num_units]
        below |= scales_below[: self.num_units]
        if self.num_scales == self.num_units:
            return
        rises, numbers = self.exponents > 0, self.products - self.num_units
        open_above, open_below = self._open_terms(above, below)
        # A product bounded above bounds a term above if all others are bounded below.
        caps = scales_above[self.products] & (self._to_products(open_below)[numbers] == open_below)
        floors = scales_below[self.products] & (self._to_products(open_above)[numbers] == open_above)
        above[self.units[(caps & rises) | (floors & ~rises)]] = True
        below[self.units[(floors & rises) | (caps & ~rises)]] = True

    def in_(self, scales: Tensor) -> Tensor:
        """Which units are in one of the ``scales`` (``bool[S]``), ``bool[H]``."""
        found = scales[: self.num_units].clone()
        found[self.units[scales[self.products]]] = True
        return found

    @property
    def simple(self) -> Tensor:
        """Units that are in no product, ``bool[H]``: what they scale is multiplied or divided by them alone."""
        simple = torch.ones(self.num_units, dtype=torch.bool, device=self.units.device)
        simple[self.units] = False
        return simple
