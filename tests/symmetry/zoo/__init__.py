"""Networks small enough that their freedoms can be counted without any knowledge of layers."""

from __future__ import annotations

from tests.symmetry.zoo.assorted import ASSORTED
from tests.symmetry.zoo.case import Use
from tests.symmetry.zoo.sequence import SEQUENCE
from tests.symmetry.zoo.vision import VISION

ZOO = [*VISION, *SEQUENCE, *ASSORTED]
#: Of each family a few, for the default run.
FAST = [case for case in ZOO if Use.FAST in case.good_for]
