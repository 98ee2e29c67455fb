"""Monomials in the scales of the units: the factors by which weights are multiplied."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.tensors import widest


@dataclass(frozen=True, eq=False)
class Monomials:
    """The factors by which weights are multiplied, as products of powers of the units' scales.

    Monomials 0 to H - 1 are the scales of the units themselves, ``c_0 .. c_(H-1)``; monomials H to S - 1 are proper
    products. Each has one or more *terms*: term t says that monomial ``products[t]`` has the factor
    ``c_units[t] ** exponents[t]``. In logarithms all this is linear.

    Products arise where activations are multiplied by each other. An exponent of 2 arises behind a square, one of -1
    where keys must shrink as queries grow.

    Args:
        num_units: number of units H.
        num_scales: number of monomials S, the units included.
        products: ``int[T]``, the monomial that each term belongs to, at least H.
        units: ``int[T]``, the unit of each term.
        exponents: ``float64[T]``, the exponent of each term.

    Example: a network computes ``head(relu(a(x)) * relu(b(x)))`` with one channel. Unit 0 scales ``a`` by ``c_0``, unit
    1 scales ``b`` by ``c_1``, and ``head.weight`` must be divided by ``c_0 * c_1``, which is monomial 2::

        monomials = Monomials(2, 3, torch.tensor([2, 2]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
        monomials.of(torch.tensor([0.1, 0.2]))  # tensor([0.1, 0.2, 0.3]), the logarithms of c_0, c_1 and c_0 * c_1
        monomials.collect(torch.tensor([5.0, 7.0, 1.0]))  # tensor([6., 8.]), the transpose
    """

    num_units: int
    num_scales: int
    products: Tensor
    units: Tensor
    exponents: Tensor
    _copies: dict[torch.device, Monomials] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device) -> Monomials:
        """Return the same monomials on ``device``; the copy is kept for the next call."""
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

    @property
    def _has_products(self) -> bool:
        return self.num_scales > self.num_units

    # Sums -------------------------------------------------------------------------------------------------------------

    def of(self, values: Tensor) -> Tensor:
        """Compute the logarithms of the monomials, ``[S]``, from those of the units' scales, ``[H]``."""
        if not self._has_products:
            return values
        return torch.cat([values, self._to_products(self.exponents.to(values) * values[self.units])])

    def collect(self, values: Tensor) -> Tensor:
        """Apply the transpose of :meth:`of`: turn derivatives by monomials, ``[S]``, into ones by units, ``[H]``."""
        return self._sum(values, self.exponents)

    def collect_sizes(self, values: Tensor) -> Tensor:
        """Apply :meth:`collect` with the magnitudes of all exponents, as to sums of magnitudes."""
        return self._sum(values, self.exponents.abs())

    def collect_parts(self, rising: Tensor, falling: Tensor) -> tuple[Tensor, Tensor]:
        """Apply :meth:`collect` to ``rising - falling``, with positive and negative parts kept apart.

        Args:
            rising: ``[S]``, what grows with each monomial.
            falling: ``[S]``, what shrinks with it.

        Returns:
            What grows and what shrinks with each unit, ``[H]`` both. A negative exponent turns one into the other.
        """
        positive, negative = self.exponents.clamp(min=0), (-self.exponents).clamp(min=0)
        grows, shrinks = self._sum(rising, positive), self._sum(falling, positive)
        if not self._has_products:
            return grows, shrinks
        own = rising.new_zeros(self.num_units)  # the units themselves have an exponent of one
        falling, rising = (torch.cat([own, values[self.num_units :]]) for values in (falling, rising))
        return grows + self._sum(falling, negative), shrinks + self._sum(rising, negative)

    def _sum(self, values: Tensor, exponents: Tensor) -> Tensor:
        own = values[: self.num_units]
        if not self._has_products:
            return own
        return own + self._to_units(exponents.to(values) * values[self.products])

    @property
    def reach(self) -> float:
        """The largest sum of absolute exponents of one monomial, at least one."""
        if not self._has_products:
            return 1.0
        return max(1.0, float(self._to_products(self.exponents.abs()).max()))

    def has_powers(self, scales: Tensor) -> bool:
        """Whether a unit enters any of the scales with these numbers by another exponent than 1 and -1, as a square."""
        return bool(torch.isin(scales, self.products[self.exponents.abs() != 1]).any())

    # Bounds -----------------------------------------------------------------------------------------------------------

    def bounded(self, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Find which monomials are bounded above and below, ``bool[S]``, given which units are, ``bool[H]``.

        A monomial is bounded above if all its terms are; a term with a negative exponent is if its unit is bounded
        below.
        """
        if not self._has_products:
            return above, below
        open_above, open_below = self._open_terms(above, below)
        caps, floors = (self._to_products(terms) == 0 for terms in (open_above, open_below))
        return torch.cat([above, caps]), torch.cat([below, floors])

    def _open_terms(self, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """Mark with one the terms that are not known to be bounded above, and below; zero for the others, ``[T]``."""
        rises = self.exponents > 0
        above, below = above[self.units], below[self.units]
        caps, floors = torch.where(rises, above, below), torch.where(rises, below, above)
        return (~caps).to(self.exponents), (~floors).to(self.exponents)

    def bound_units(self, above: Tensor, below: Tensor, scales_above: Tensor, scales_below: Tensor) -> None:
        """Find which units are bounded because a monomial is; the inverse of :meth:`bounded`.

        Args:
            above: ``bool[H]``, units that are known to be bounded above; more are marked in place.
            below: ``bool[H]``, the same from below.
            scales_above: ``bool[S]``, monomials that are bounded above.
            scales_below: ``bool[S]``, monomials that are bounded below.
        """
        above |= scales_above[: self.num_units]
        below |= scales_below[: self.num_units]
        if not self._has_products:
            return
        rises, numbers = self.exponents > 0, self.products - self.num_units
        open_above, open_below = self._open_terms(above, below)
        # If a product is bounded above and its other terms are bounded below, this term is bounded above: then no term
        # but this one is open, and the sum of what is open is this term's own entry.
        caps = scales_above[self.products] & (self._to_products(open_below)[numbers] == open_below)
        floors = scales_below[self.products] & (self._to_products(open_above)[numbers] == open_above)
        above[self.units[(caps & rises) | (floors & ~rises)]] = True
        below[self.units[(floors & rises) | (caps & ~rises)]] = True

    # Fewer units ------------------------------------------------------------------------------------------------------

    def without(self, units: Tensor) -> tuple[Tensor, Monomials]:
        """Set the scales of some units to one.

        Args:
            units: ``bool[H]``; the other units keep their order, and products that lose all factors but one are units.

        Returns:
            For each scale its new number, or -1 if it is one now, ``int32[S + 1]`` with a -1 at the end; and the new
            scales.
        """
        kept = ~units[self.units]
        products, factors, exponents = self.products[kept], self.units[kept], self.exponents[kept]
        count, cpu = int((~units).sum()), torch.device("cpu")
        number = torch.full((self.num_scales + 1,), -1, dtype=torch.int32, device=cpu)
        number[: self.num_units][~units] = torch.arange(count, dtype=torch.int32, device=cpu)
        terms = torch.bincount(products, minlength=self.num_scales)
        is_unit = (terms[products] == 1) & (exponents == 1)
        number[products[is_unit]] = number[factors[is_unit]]
        products, factors, exponents = products[~is_unit], factors[~is_unit], exponents[~is_unit]
        proper = products.unique()
        number[proper] = torch.arange(count, count + len(proper), dtype=torch.int32, device=cpu)
        columns = number[products].long(), number[factors].long(), exponents
        return number, Monomials(count, count + len(proper), *columns)

    # Masks of units ---------------------------------------------------------------------------------------------------

    def in_(self, scales: Tensor) -> Tensor:
        """Find the units that one of the marked monomials (``bool[S]``) depends on, ``bool[H]``."""
        found = scales[: self.num_units].clone()
        found[self.units[scales[self.products]]] = True
        return found

    @property
    def simple(self) -> Tensor:
        """Units that are in no product, ``bool[H]``: they multiply or divide whatever they scale by themselves."""
        simple = torch.ones(self.num_units, dtype=torch.bool, device=self.units.device)
        simple[self.units] = False
        return simple
