"""Networks small enough that their freedoms can be counted without any knowledge of layers."""

from __future__ import annotations

from tests.symmetry.zoo.assorted import ASSORTED
from tests.symmetry.zoo.sequence import SEQUENCE
from tests.symmetry.zoo.vision import VISION

ZOO = [*VISION, *SEQUENCE, *ASSORTED]
