"""Networks put together at random from the bricks of real ones: exact action, one balanced member, nothing missed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from lightning_ecopt.symmetry import scaling_group
from tests.selection import examples, few
from tests.symmetry.helpers import (
    assert_complete,
    assert_same,
    assert_same_weights,
    copies,
    count_freedoms,
    draw_,
    evaluate,
    log_scales,
    put_,
)
from tests.symmetry.random_networks.descriptions import BUILDERS, EVERYWHERE, Brick, Network
from tests.symmetry.random_networks.networks import OWN, Composed, every_kind_of_data, networks, seeds

#: Bricks for all data with vectors, the others with what they are for.
EVERY_BRICK = [(data, kind) for data in EVERYWHERE for kind in (BUILDERS if data == "vectors" else OWN)[data]]
CHECKS = [HealthCheck.filter_too_much, HealthCheck.too_slow]


def assert_exact(network: Network, seed: int) -> None:
    """Acting and balancing change no output, and a class has one balanced member."""
    generator = torch.Generator().manual_seed(seed)
    module = Composed(network)
    draw_(module, generator)
    inputs = module.sample(generator, 1.0)
    group = scaling_group(module, *inputs)
    for training in (False, True):
        module.train(training)
        before = evaluate(module, inputs)
        group.act_(log_scales(group, generator))
        assert_same(evaluate(module, inputs), before)
    # Units that are not alive, if there are any, have no balanced scale, and are left alone.
    elsewhere = torch.where(group.alive(), log_scales(group, generator), 0.0)
    start = copies(group)
    group.balance_()
    assert_same(evaluate(module, inputs), before, 1e-9)
    balanced = copies(group)
    group.balance_()
    assert_same_weights(balanced, copies(group))
    put_(group, start)
    group.act_(elsewhere).balance_()
    assert_same_weights(balanced, copies(group))


def is_countable(module: Composed, seed: int) -> bool:
    """Whether the draws that the count makes are enough for it: half of them must tell as much as all.

    What is nearly always dead, behind a ReLU of a ReLU, takes part in too few of them. And where a soft function is
    saturated, derivatives are rounding errors; the count, which norms every row, would take them for numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    draw_(module, generator)
    module.sample(generator, 1.0)
    rows, living = count_freedoms(module, module.sample, generator)
    sizes = rows.abs().amax(1)
    if not bool(living.any()) or bool(((sizes > 0) & (sizes < 1e-12 * sizes.max())).any()):
        return False
    rows = rows[sizes > 0][:, living]
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows / rows.norm(dim=0)
    ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-9)) for part in (rows[: len(rows) // 2], rows)]
    return ranks[0] == ranks[1] and int((rows != 0).sum(0).min()) >= 20


@pytest.mark.parametrize(
    ("data", "kind"),
    few(EVERY_BRICK, EVERY_BRICK[::2]),
)
def test_every_brick(data: str, kind: str) -> None:
    network = Network(data, 2, bricks=[Brick("layer", 2), Brick(kind, 2)])
    assert_exact(network, 0)
    module = Composed(network)
    assert_complete(module, module.sample)


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(Network("vectors", 1, bricks=[Brick("layer"), Brick("split")]), id="a piece of no channels"),
        pytest.param(Network("vectors", 2, bricks=[Brick("more channels")]), id="zeros beside channels of one label"),
    ],
)
def test_networks_that_once_failed(network: Network) -> None:
    assert_exact(network, 0)
    module = Composed(network)
    assert_complete(module, module.sample)


@every_kind_of_data
@examples(50, suppress_health_check=CHECKS)
@given(draw=st.data(), seed=seeds)
def test_random_networks_compute_the_same_after_acting_and_balancing(data: str, draw: st.DataObject, seed: int) -> None:
    assert_exact(draw.draw(networks(data), label="network"), seed)


@every_kind_of_data
@examples(50, suppress_health_check=CHECKS)
@given(draw=st.data(), seed=seeds, training=st.booleans())
def test_random_networks_have_no_freedoms_but_those_found(
    data: str, draw: st.DataObject, seed: int, training: bool
) -> None:
    torch.manual_seed(seed)
    module = Composed(draw.draw(networks(data), label="network")).train(training)
    assume(is_countable(module, seed))
    assert_complete(module, module.sample, seed)
