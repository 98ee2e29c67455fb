from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

from tests.lightning_integration.fsdp_script import NO_CALLS
from tests.selection import everything, few

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import communication

NARROW, WIDE = 32, 128
STRATEGIES = [name for name in communication.STRATEGIES if not (NO_CALLS and name == "FSDP2")]
CASES = list(product(STRATEGIES, communication.BASES))
#: What the default run has: the strategy for which most is exchanged.
ALWAYS = (STRATEGIES[-1], "SGD-M")

Costs = dict[tuple[str, str], dict[str, list[communication.Cost]]]


@pytest.fixture(scope="module")
def found() -> Costs:
    """Of each strategy and base, and each rule, the costs of the narrow and the wide network."""
    chosen = (STRATEGIES, list(communication.BASES)) if everything() else ([ALWAYS[0]], [ALWAYS[1]])
    costs: Costs = {}
    for cost in communication.measure((NARROW, WIDE), *chosen):
        costs.setdefault((cost.strategy, cost.base), {}).setdefault(cost.rule, []).append(cost)
    return costs


@pytest.mark.parametrize(("strategy", "base"), few(CASES, [ALWAYS]))
def test_what_is_added_is_some_bytes_for_each_unit(found: Costs, strategy: str, base: str) -> None:
    costs = found[strategy, base]
    assert costs.keys() == ({"unit"} if strategy == "FSDP2" else {"unit", "path"})
    for narrow, wide in costs.values():
        for cost in (narrow, wide):
            if strategy != "FSDP2":
                assert cost.step == 0
            assert cost.step <= 24 * cost.units
            assert cost.look <= 80 * cost.units
            assert cost.refresh <= 600 * cost.units
            assert cost.first <= 600 * cost.units + 1000
        assert wide.weights > 15 * narrow.weights
        assert wide.look <= 4.5 * narrow.look
        assert wide.refresh <= 8 * narrow.refresh  # balancing may take more rounds


@pytest.mark.parametrize(("strategy", "base"), few(CASES, [ALWAYS]))
def test_plain_steps_exchange_what_is_known_of_them(found: Costs, strategy: str, base: str) -> None:
    for pair in found[strategy, base].values():
        for cost in pair:
            bytes_of_weights = 4 * cost.weights
            if strategy == "DDP":  # the gradients
                assert cost.plain == bytes_of_weights
            elif strategy == "DDP, fp16":
                assert cost.plain == bytes_of_weights // 2
            else:  # weights for both passes, one layer kept; gradients
                assert 2 * bytes_of_weights < cost.plain < 3 * bytes_of_weights


def test_the_page_has_a_row_for_each_cost() -> None:
    costs = [communication.Cost(64, "FSDP2", "AdamW", "unit", 133120, 3072, 8704, 39468, 43564)]
    page = communication.report(costs).splitlines()
    assert "| FSDP2 | AdamW | unit | 12,480 | 128 | 133,120 | 3,072 | 8,704 | 39,468 | 43,564 |" in page
