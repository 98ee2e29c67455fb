"""Networks for sequences and sets."""

from __future__ import annotations

from tests.symmetry.zoo.sequence.attention import ATTENTION
from tests.symmetry.zoo.sequence.feed_forward import FEED_FORWARD
from tests.symmetry.zoo.sequence.llama import LLAMA
from tests.symmetry.zoo.sequence.recurrent import RECURRENT
from tests.symmetry.zoo.sequence.sets import SETS
from tests.symmetry.zoo.sequence.transformers import TRANSFORMERS

SEQUENCE = [*ATTENTION, *TRANSFORMERS, *LLAMA, *FEED_FORWARD, *RECURRENT, *SETS]
