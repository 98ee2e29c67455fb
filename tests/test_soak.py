"""Nothing is left behind by many steps, fits and threads."""

from __future__ import annotations

import warnings

import pytest

from tests import soak
from tests.selection import full


@full
@pytest.mark.parametrize(("part", "count"), [(soak.steps, 2_000), (soak.fits, 60), (soak.threads, 32)])
def test_everything_is_as_it_was(part: object, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        soak.soak(part, count)
