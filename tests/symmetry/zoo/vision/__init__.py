"""Networks for images."""

from __future__ import annotations

from tests.symmetry.zoo.vision.branches import BRANCHES
from tests.symmetry.zoo.vision.images import IMAGES
from tests.symmetry.zoo.vision.mobile import MOBILE
from tests.symmetry.zoo.vision.plain import PLAIN
from tests.symmetry.zoo.vision.residual import RESIDUAL
from tests.symmetry.zoo.vision.transformers import TRANSFORMERS

VISION = [*PLAIN, *RESIDUAL, *BRANCHES, *MOBILE, *IMAGES, *TRANSFORMERS]
