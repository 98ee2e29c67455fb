"""Balancing reads the weights piece by piece, in few passes, and finds what is exact."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ecopt.common import tensors
from lightning_ecopt.steps.skeleton import choose_skeleton
from lightning_ecopt.symmetry import balance, objective, scaling_group
from lightning_ecopt.symmetry.objective import ByRegion
from tests.symmetry.helpers import copies, draw_, put_, squares
from tests.symmetry.zoo.case import Case
from tests.symmetry.zoo.tiny import SHARED, TINY

RESCALED = [case for case in [*SHARED, *TINY] if case.units]


class Largest(TorchDispatchMode):
    """The largest number of elements that one operation made room for."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in before:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def mlp(*widths: int) -> nn.Sequential:
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("case", RESCALED, ids=lambda case: case.name)
def test_nothing_depends_on_how_many_weights_are_looked_at_together(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    module = case.build()
    draw_(module, generator)
    group = scaling_group(module, *case.inputs(generator))
    start, found = copies(group), []
    for elements, few in ((2**17, tensors.FEW), (7, 0)):
        for work in tensors.PIECE_SIZES:
            monkeypatch.setitem(tensors.PIECE_SIZES, work, tensors.PieceSize(elements, elements))
        monkeypatch.setattr(tensors, "FEW", few)
        put_(group, start)
        paths = group.alive() & group.monomials.simple & ~group.scale_invariant
        own = [coupling.restricted(paths) for coupling in group.couplings]
        imbalance, applied = group.imbalance(), group.balance_()
        skeleton = choose_skeleton(own, group.parameters, paths).state_dict() if bool(paths.any()) else {}
        found.append((imbalance, applied, copies(group), skeleton))
    (imbalance, applied, weights, skeleton), (*_, others, other_skeleton) = found
    torch.testing.assert_close(found[1][0], imbalance, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found[1][1], applied, rtol=0.0, atol=1e-12)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-12, atol=0.0)
    assert all(torch.equal(value, other_skeleton[name]) for name, value in skeleton.items())


def test_a_refresh_needs_no_memory_of_the_size_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for work in tensors.PIECE_SIZES:
        monkeypatch.setitem(tensors.PIECE_SIZES, work, tensors.PieceSize(4000, 4000))
    convolutions = [nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU()]
    module = nn.Sequential(*convolutions, nn.Flatten(), *mlp(40 * 4, 300, 300, 10))
    group = scaling_group(module, torch.randn(1, 3, 8, 8))
    momentum = {name: torch.randn_like(parameter) for name, parameter in group.parameters.items()}
    with Largest() as largest:
        alive = group.alive()
        group.rescale_(momentum, group.balance_(alive), power=-1)
        choose_skeleton(group.couplings, group.parameters, alive)
    # Vectors over units, of which the padded sums take a few; the weights of the largest layer are 90,000.
    assert largest.elements <= 10 * group.num_units < 10_000


def test_float32_weights_are_balanced_as_well_as_the_same_weights_in_float64() -> None:
    torch.manual_seed(0)
    module = mlp(20, 60, 50, 40, 5)
    group = scaling_group(module, torch.randn(1, 20))
    group.act_(12 * torch.randn(group.num_units))  # squares from 1e-40 to 1e40 and beyond
    exact = scaling_group(deepcopy(module).double(), torch.randn(1, 20, dtype=torch.float64))
    exact.balance_()
    group.balance_()
    for name, parameter in group.parameters.items():
        torch.testing.assert_close(parameter.double(), exact.parameters[name], rtol=1e-6, atol=0.0)


def nearly_free(module: nn.Sequential) -> None:
    """Hold the hidden units to one another a million times as fast as to the inputs and the outputs."""
    module[0].weight.mul_(1e-3)
    module[-1].weight.mul_(1e-3)


def partly_dead(module: nn.Sequential) -> None:
    module[0].weight[3:9].zero_()
    module[2].weight[:, 20:].zero_()


def huge(module: nn.Sequential) -> None:
    """Squares beyond what single precision holds."""
    module[2].weight.mul_(1e25)


@pytest.mark.parametrize("change", [nn.Module.eval, nearly_free, partly_dead, huge])
@pytest.mark.parametrize("spread", [0.1, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_in_single_precision_end_where_those_in_double_do(
    change: Callable[[Any], Any], spread: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "FEW", 0)  # small networks take no steps in single precision
    torch.manual_seed(0)
    module = mlp(20, 40, 40, 40, 40, 5).to(dtype)
    with torch.no_grad():
        change(module)
    group = scaling_group(module, torch.randn(1, 20, dtype=dtype))
    group.act_(spread * torch.randn(group.num_units))
    start, found = copies(group), []
    for largest in (objective.SINGLE, 0.0):
        monkeypatch.setattr(objective, "SINGLE", largest)
        put_(group, start)
        found.append((group.balance_(), group.imbalance()))
    near = max(balance.resolution_of(group.parameters.values()), 1e-13)
    assert all(float(imbalance) <= 1 + 4 * near for _, imbalance in found)
    if change is not nearly_free:
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0.0, atol=16 * near)


def test_an_undefined_element_from_a_unit_to_itself_makes_it_dormant() -> None:
    cell = nn.RNN(3, 4, nonlinearity="relu", dtype=torch.float64)
    head = nn.Linear(4, 2, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0])

    group = scaling_group(Model(), torch.zeros(2, 1, 3, dtype=torch.float64))
    assert group.num_units == 4
    with torch.no_grad():
        cell.weight_hh_l0[2, 2] = torch.nan
    assert group.alive().tolist() == [True, True, False, True]
    assert float(group.balance_()[2]) == 0.0
    incoming, outgoing = squares(group)
    sound = torch.tensor([0, 1, 3])
    assert bool(incoming[sound].isfinite().all())
    torch.testing.assert_close(incoming[sound], outgoing[sound], rtol=1e-10, atol=0.0)


def test_few_passes_over_the_weights_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    group = scaling_group(mlp(300, 200, 200, 200, 200, 10), torch.randn(1, 300))
    passes: list[list[int]] = []  # in double precision, in single
    sums = ByRegion._sums

    def counted(problem: ByRegion, right: Tensor, left: Tensor, is_rough: bool = False) -> tuple[Tensor, Tensor]:
        passes[-1][is_rough] += 1
        return sums(problem, right, left, is_rough)

    monkeypatch.setattr(ByRegion, "_sums", counted)
    for _ in range(3):
        passes.append([0, 0])
        group.balance_()
        with torch.no_grad():
            for parameter in group.parameters.values():
                parameter += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)
    assert sum(passes[0]) <= 45
    assert max(sum(each) for each in passes[1:]) <= 18
    assert max(double for double, _ in passes[1:]) <= 5


def test_scale_invariant_weights_are_found_beside_others() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
            self.plain = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.normed(x).relu())

    model = Model()
    group = scaling_group(model, torch.zeros(1, 3))
    invariant = group.scale_invariant
    assert int(invariant.sum()) == 4  # the length of each row of v
    numbers = invariant.nonzero()
    owners = {coupling.parameter for coupling in group.couplings if bool(torch.isin(coupling.incoming, numbers).any())}
    assert owners == {"normed.parametrizations.weight.original1"}
