"""Forms and modules that the tests of other callbacks share."""

from __future__ import annotations

import pytest

from tests.lightning_integration.modules import EXAMPLE

#: Every pair of form, way of finding the freedoms and rule.
CASES = pytest.mark.parametrize(
    ("form", "example", "rule"),
    [
        ("callback", None, "unit"),
        ("callback", EXAMPLE, "path"),
        ("ec_sgd", None, "path"),
        ("ec_sgd", EXAMPLE, "unit"),
        ("ECSGD", None, "unit"),
    ],
    ids=["callback-first step-unit", "callback-example-path", "ec_sgd-first step-path", "ec_sgd-example-unit", "ECSGD"],
)
