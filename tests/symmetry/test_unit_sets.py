"""Sorting units into sets."""

from __future__ import annotations

import torch

from lightning_ecopt.symmetry import Coupling, Monomials
from lightning_ecopt.symmetry.describe import sort_units


def test_so_many_units_that_pairs_of_them_do_not_fit_into_32_bits() -> None:
    count = 50_000
    units = torch.arange(count, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    coupling = Coupling("gain", (slice(0, count, 1),), units, units.roll(1), additive=False)
    (units_alike,) = sort_units([coupling], Monomials(count, count, none, none, none.double()))
    assert units_alike.units.tolist() == list(range(count))
    assert units_alike.powers == (("gain", 1.0), ("gain", -1.0))
