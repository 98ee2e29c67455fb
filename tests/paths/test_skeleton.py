from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lightning_ecopt import ScalingGroup, scaling_group
from lightning_ecopt.steps.coordinates import PathCoordinates
from lightning_ecopt.steps.skeleton import Skeleton, choose_skeleton
from lightning_ecopt.symmetry.coupling import NO_UNIT
from tests.networks import ResidualMLP, mlp, norm_cnn, plain_cnn
from tests.paths.cases import NETWORKS, make, point
from tests.paths.explicit import Place, ends, place_of


def choose(module: nn.Module, group: ScalingGroup, rule: str = "max") -> Skeleton:
    return choose_skeleton(group.couplings, dict(module.named_parameters()), group.alive(), rule)


def chosen_places(group: ScalingGroup, skeleton: Skeleton, side: str) -> dict[int, Place]:
    """The fixed (``"fixed"``) or outgoing (``"out"``) skeleton weight of every active unit."""
    coupling, index = getattr(skeleton, f"{side}_coupling"), getattr(skeleton, f"{side}_index")
    return {
        unit: place_of(group, int(coupling[unit]), int(index[unit]))
        for unit in range(group.num_units)
        if skeleton.active[unit]
    }


def additive_names(group: ScalingGroup) -> set[str]:
    return {coupling.parameter for coupling in group.couplings if coupling.additive}


def grown_by_hand(module: nn.Module, group: ScalingGroup, active: torch.Tensor, side: str) -> dict[int, Place]:
    """The forest, element by element: level by level, the largest first, biases where nothing else leads on.

    Units that are alive but not active are held fixed; nothing leads through the others.
    """
    into, from_ = ends(group, active)
    all_into, all_from = ends(group, torch.ones_like(active))
    alive = torch.cat([group.alive(), torch.ones(1, dtype=torch.bool)])
    near, far = (from_, into) if side == "fixed" else (into, from_)
    biases = additive_names(group)
    edges = []
    for coupling in group.couplings:
        parameter = module.get_parameter(coupling.parameter)
        region = torch.zeros(parameter.shape, dtype=torch.bool)
        region[coupling.region] = True
        for index in map(tuple, region.nonzero().tolist()):
            name = coupling.parameter
            if not (alive[all_into[name][index]] and alive[all_from[name][index]]):
                continue
            ends_at = int(near[name][index]), int(far[name][index])
            edges.append((ends_at, abs(float(parameter.detach()[index])), name in biases, (name, index)))
    reached, found = {NO_UNIT}, {}
    while True:
        for allowed in (False, True):
            level: dict[int, tuple[float, Place]] = {}
            for (start, end), size, additive, place in edges:
                leads_on = additive == allowed and size > 0 and start in reached and end not in reached
                if leads_on and (end not in level or size > level[end][0]):
                    level[end] = size, place
            if level:
                break
        if not level:
            return found
        reached |= set(level)
        found.update({unit: place for unit, (_, place) in level.items()})


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_choices_are_forests(name: str, some_inactive: bool) -> None:
    at = point(name, some_inactive=some_inactive)
    skeleton = at.skeleton
    into, from_ = ends(at.group, skeleton.active)
    for side, own_ends, other_ends in (("fixed", into, from_), ("out", from_, into)):
        other = torch.full_like(skeleton.target, NO_UNIT)
        for unit, (name_, index) in chosen_places(at.group, skeleton, side).items():
            assert int(own_ends[name_][index]) == unit
            other[unit] = int(other_ends[name_][index])
        if side == "out":
            assert torch.equal(other, skeleton.target)
        for unit in skeleton.active.nonzero()[:, 0].tolist():
            length = 0
            while unit != NO_UNIT:  # on from unit to unit, until a root is met
                unit, length = int(other[unit]), length + 1
                assert length <= skeleton.num_units


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_within_a_level_the_largest_magnitude_is_taken(name: str, seed: int) -> None:
    at = point(name, seed, some_inactive=seed == 1)
    for side in ("fixed", "out"):
        expected = grown_by_hand(at.module, at.group, at.skeleton.active, side)
        assert chosen_places(at.group, at.skeleton, side) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_no_zero_and_no_bias_is_taken_where_anything_else_leads_on(name: str) -> None:
    module, x = make(name)
    group = scaling_group(module, x)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(torch.rand_like(p) > 0.3)
    skeleton = choose(module, group)
    assert bool(skeleton.active.any())
    biases = additive_names(group)
    for side in ("fixed", "out"):
        places = chosen_places(group, skeleton, side)
        assert places == grown_by_hand(module, group, skeleton.active, side)
        for key, index in places.values():
            assert float(module.get_parameter(key)[index].detach()) != 0
    for unit, (key, _) in chosen_places(group, skeleton, "fixed").items():
        if key in biases:
            assert not any(
                bool((weight.detach()[into == unit] != 0).any())
                for (other, weight), into in zip(
                    group.parameters.items(), ends(group, skeleton.active)[0].values(), strict=True
                )
                if other not in biases
            )


def test_a_bias_is_taken_where_all_weights_into_a_unit_are_zero() -> None:
    module = mlp(3, 4, 2).double()
    group = scaling_group(module, torch.randn(1, 3, dtype=torch.float64))
    with torch.no_grad():
        module[0].weight[2] = 0
    skeleton = choose(module, group)
    places = chosen_places(group, skeleton, "fixed")
    assert bool(skeleton.active.all())
    assert sorted(key for key, _ in places.values()) == ["0.bias", *["0.weight"] * 3]
    assert ("0.bias", (2,)) in places.values()


@pytest.mark.parametrize("noise", [0.0, 1e-15, -1e-15])
def test_ties_take_the_first_index_whatever_the_rounding(noise: float) -> None:
    module = mlp(4, 3, 3, 4).double()
    group = scaling_group(module, torch.randn(1, 4, dtype=torch.float64))
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.5)
            p.mul_(1 + noise * torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape))
        module[2].weight[1, 2] = -0.5 * (1 - 4 * noise)
    skeleton = choose(module, group)
    fixed = sorted(chosen_places(group, skeleton, "fixed").values())
    out = sorted(chosen_places(group, skeleton, "out").values())
    assert fixed == [("0.weight", (row, 0)) for row in range(3)] + [("2.weight", (row, 0)) for row in range(3)]
    assert out == [("2.weight", (0, column)) for column in range(3)] + [
        ("4.weight", (0, column)) for column in range(3)
    ]


@pytest.mark.parametrize("noise", [0.0, 1e-15, -1e-15])
def test_ties_between_parameters_take_the_first_one_whatever_the_rounding(noise: float) -> None:
    module = ResidualMLP().double()
    group = scaling_group(module, torch.randn(1, 3, dtype=torch.float64))
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.5)
        module.head.weight.mul_(1 + noise)
        module.stem.weight.mul_(1 - noise)
        module.stem.bias.fill_(7.0)
    expected = {side: sorted(grown_by_hand_without_noise(module, group, side)) for side in ("fixed", "out")}
    skeleton = choose(module, group)
    for side, places in expected.items():
        assert sorted(chosen_places(group, skeleton, side).values()) == places


def grown_by_hand_without_noise(module: nn.Module, group: ScalingGroup, side: str) -> Sequence[Place]:
    """What is chosen when the magnitudes are rounded, so that ties are exact."""
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_((p * 2**20).round() / 2**20)
    return list(grown_by_hand(rounded, group, group.alive(), side).values())


@pytest.mark.parametrize("some_inactive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_coordinates_as_the_dimension_are_left(name: str, some_inactive: bool) -> None:
    at = point(name, some_inactive=some_inactive)
    fixed = list(chosen_places(at.group, at.skeleton, "fixed").values())
    out = chosen_places(at.group, at.skeleton, "out")
    assert len(set(fixed)) == len(fixed) == int(at.skeleton.active.sum())
    if not some_inactive:
        assert at.group.num_parameters - len(fixed) == at.group.dimension
    free = [out[unit] for unit in out if at.skeleton.free[unit]]
    assert len(set(free)) == len(free)
    assert not set(free) & set(fixed)
    assert all(out[unit] in fixed for unit in out if not at.skeleton.free[unit])
    # Path coordinates hold the fixed ones still, and nothing else.
    for weight in at.weights.values():
        weight.fill_(1.0)
    at.coordinates.to_coordinates_(at.weights)
    held = {(name_, tuple(index)) for name_, weight in at.weights.items() for index in (weight == 0).nonzero().tolist()}
    assert held == set(fixed)


def test_units_before_a_zero_initialised_layer_are_dormant() -> None:
    module = mlp(4, 5, 6, 3).double()
    group = scaling_group(module, torch.randn(1, 4, dtype=torch.float64))
    with torch.no_grad():
        module[4].weight.zero_()
    skeleton = choose(module, group)
    assert group.num_units == 11
    assert not bool(skeleton.active.any())
    for field in (skeleton.fixed_coupling, skeleton.out_coupling, skeleton.target, skeleton.root):
        assert bool((field == -1).all())


def test_a_zero_initialised_branch_leaves_only_its_own_units_dormant() -> None:
    module = ResidualMLP().double()
    group = scaling_group(module, torch.randn(1, 3, dtype=torch.float64))
    with torch.no_grad():
        module.down.weight.zero_()
        module.down.bias.zero_()
    skeleton = choose(module, group)
    inner = ends(group, torch.ones(9, dtype=torch.bool))[0]["up.bias"].tolist()
    assert [unit for unit in range(9) if not skeleton.active[unit]] == sorted(inner)


@pytest.mark.parametrize("side", ["in", "out"])
def test_pruned_units_are_dormant(side: str) -> None:
    module = mlp(4, 5, 6, 3).double()
    group = scaling_group(module, torch.randn(1, 4, dtype=torch.float64))
    with torch.no_grad():
        if side == "in":
            module[0].weight[3] = 0
            module[0].bias[3] = 0
        else:
            module[2].weight[:, 3] = 0
    skeleton = choose(module, group)
    pruned = int(ends(group, torch.ones(11, dtype=torch.bool))[0]["0.bias"][3])
    assert (~skeleton.active).nonzero().flatten().tolist() == [pruned]


@pytest.mark.parametrize("side", ["in", "out"])
def test_no_path_leads_through_a_dormant_unit(side: str) -> None:
    torch.manual_seed(0)
    module = mlp(4, 5, 6, 3).double()
    group = scaling_group(module, torch.randn(1, 4, dtype=torch.float64))
    with torch.no_grad():
        if side == "in":  # its outgoing weights carry nothing
            module[0].weight[3] = 0
            module[0].bias[3] = 0
        else:  # nothing comes of its incoming weights
            module[4].weight[:, 3] = 0
    skeleton = choose(module, group)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    coordinates = PathCoordinates(group.couplings, weights, skeleton)
    gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
    result = {name: gradient.clone() for name, gradient in gradients.items()}
    coordinates.transform_gradients_(result, coordinates.free_weights(weights, result))
    own = (slice(None), 3) if side == "in" else (3, slice(None))
    assert torch.equal(result["2.weight"][own], gradients["2.weight"][own])


def test_the_diagonal_rule_takes_unit_i_to_unit_i() -> None:
    module = mlp(5, 5, 5, 5).double()
    group = scaling_group(module, torch.randn(1, 5, dtype=torch.float64))
    skeleton = choose(module, group, "diagonal")
    fixed = {(key, (i, i)) for key in ("0.weight", "2.weight") for i in range(5)}
    out = {(key, (i, i)) for key in ("2.weight", "4.weight") for i in range(5)}
    assert set(chosen_places(group, skeleton, "fixed").values()) == fixed
    assert set(chosen_places(group, skeleton, "out").values()) == out
    assert int(skeleton.free.sum()) == 5
    last = ends(group, skeleton.active)[0]["2.bias"]
    first = ends(group, skeleton.active)[0]["0.bias"]
    assert skeleton.root[first].tolist() == skeleton.root[last].tolist() == last.tolist()


def test_the_diagonal_rule_takes_the_centre_of_the_kernel() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, (5, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4)
    ).double()
    group = scaling_group(module, torch.randn(1, 3, 7, 3, dtype=torch.float64))
    skeleton = choose(module, group, "diagonal")
    # The fourth unit has no fourth input: it starts over at the first.
    fixed = {("0.weight", (i, i % 3, 1, 1)) for i in range(4)} | {("2.weight", (i, i, 2, 0)) for i in range(4)}
    assert set(chosen_places(group, skeleton, "fixed").values()) == fixed
    out = {("2.weight", (i, i, 2, 0)) for i in range(4)} | {("5.weight", (i, i)) for i in range(4)}
    assert set(chosen_places(group, skeleton, "out").values()) == out


def test_the_diagonal_rule_says_so_where_it_does_not_fit() -> None:
    module, x = make("batch_norm")
    with pytest.raises(ValueError, match="diagonal choice needs non-zero diagonals and one weight tensor"):
        choose(module, scaling_group(module, x), "diagonal")
    module = mlp(4, 4, 4).double()
    with torch.no_grad():
        module[0].weight[1, 1] = 0
    with pytest.raises(ValueError, match="No path leads through 1 of 4 active units"):
        choose(module, scaling_group(module, torch.randn(1, 4, dtype=torch.float64)), "diagonal")


def test_an_unknown_rule_is_an_error() -> None:
    module = mlp(4, 4, 4)
    with pytest.raises(ValueError, match="skeleton must be 'max' or 'diagonal', got 'min'"):
        choose(module, scaling_group(module, torch.randn(1, 4)), "min")


@pytest.mark.parametrize("name", NETWORKS)
def test_balanced_members_of_one_class_have_the_same_skeleton(name: str) -> None:
    module, x = make(name)
    other = copy.deepcopy(module)
    group, other_group = scaling_group(module, x), scaling_group(other, x)
    other_group.act_(torch.randn(group.num_units, dtype=torch.float64))
    unbalanced = [choose(module, group), choose(other, other_group)]
    group.balance_()
    other_group.balance_()
    first, second = choose(module, group).state_dict(), choose(other, other_group).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name not in ("batch_norm", "resnet"):  # where a unit has one gain and little else to choose from
        before, after = (skeleton.state_dict() for skeleton in unbalanced)
        assert not all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("build", [plain_cnn, norm_cnn])
def test_a_skeleton_survives_its_state_dict(build: type) -> None:
    module = build()
    group = scaling_group(module, torch.randn(2, 1, 8, 8))
    skeleton = choose(module, group)
    again = Skeleton.from_state_dict(skeleton.state_dict())
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in skeleton.state_dict().items())
