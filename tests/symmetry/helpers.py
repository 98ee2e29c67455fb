"""What several tests of the symmetry need: random weights, a count of freedoms, a comparison of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import ScalingGroup, scaling_group
from lightning_ecopt.symmetry.check import DRAWS, count_freedoms, directions, draw_, flat_output, nullity

BATCH_NORM = nn.modules.batchnorm._BatchNorm

__all__ = ["count_freedoms", "directions", "draw_", "flat_output", "nullity"]


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator, float], tuple[Tensor, ...]]:
    """Draws normally distributed inputs of these shapes."""
    return lambda generator, size: tuple(
        size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def assert_complete(
    module: nn.Module,
    inputs: Callable[[torch.Generator, float], tuple[Any, ...]],
    seed: int = 0,
    draws: int = DRAWS,
) -> None:
    """The units are freedoms, and there are no others."""
    generator = torch.Generator().manual_seed(seed)
    draw_(module, generator)
    found = directions(scaling_group(module, *inputs(generator, 1.0)))
    rows, living = count_freedoms(module, inputs, generator, draws)
    rows, found = rows[:, living], found[living]
    assert (rows @ found).abs().sum() < 1e-9 * rows.abs().sum()
    # Units that touch only elements which never matter are no freedoms of the function, in either count.
    assert int(torch.linalg.matrix_rank(found)) == nullity(rows)


def broken_units(group: ScalingGroup, free: ScalingGroup) -> Tensor:
    """Units of a group that are no freedoms of another one of the same parameters, alone or together; ``bool[H]``."""
    columns, space = directions(group), torch.linalg.qr(directions(free)).Q
    return (columns - space @ (space.t() @ columns)).norm(dim=0) > 1e-6 * columns.norm(dim=0)


@torch.no_grad()
def evaluate(module: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """The output as one vector, with the same random numbers on every call."""
    torch.manual_seed(0)
    return flat_output(module(*inputs))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance * float(expected.abs().max()), f"changed by {difference}"


@torch.no_grad()
def squares(group: ScalingGroup) -> tuple[Tensor, Tensor]:
    """Sums of squares into and out of each unit, written out element by element."""
    sums = torch.zeros(2, group.num_units + 1, dtype=torch.float64)  # the last, -1, is what is held fixed
    for coupling in group.couplings:
        mass = coupling.view(group.parameters[coupling.parameter]).double().square()
        for total, ids in zip(sums, (coupling.incoming, coupling.outgoing), strict=True):
            index = ids.expand(mass.shape).flatten() % (group.num_units + 1)
            total.index_add_(0, index, mass.flatten())
    return sums[0, :-1], sums[1, :-1]


def copies(group: ScalingGroup) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in group.parameters.items()}


@torch.no_grad()
def put_(group: ScalingGroup, weights: dict[str, Tensor]) -> None:
    for name, parameter in group.parameters.items():
        parameter.copy_(weights[name])


def log_scales(group: ScalingGroup, generator: torch.Generator, size: float = 1.0) -> Tensor:
    return size * torch.randn(group.num_units, generator=generator, dtype=torch.float64)


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=tolerance, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")
