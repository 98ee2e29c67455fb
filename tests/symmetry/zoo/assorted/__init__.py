"""Networks for other data, and of odd layers."""

from __future__ import annotations

from tests.symmetry.zoo.assorted.data import DATA
from tests.symmetry.zoo.assorted.layers import LAYERS

ASSORTED = [*DATA, *LAYERS]
