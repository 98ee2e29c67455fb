"""What several tests of the symmetry need: random weights, a count of freedoms, a comparison of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.symmetry import ScalingGroup, scaling_group

DRAWS = 30
BATCH_NORM = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def draw_(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight, bias and gain anew, none of them near zero, and the running statistics too."""
    for parameter in module.parameters():
        size = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.copy_(size * sign / max(1, parameter.shape[1:].numel()) ** 0.5)
    for part in module.modules():
        if isinstance(part, BATCH_NORM):
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=generator))


def count_freedoms(
    module: nn.Module,
    inputs: Callable[[torch.Generator, float], tuple[Any, ...]],
    generator: torch.Generator,
    *,
    batched: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rows ``w * df/dw`` over many draws of weights and inputs, and which parameter elements ever mattered.

    A direction d with rows @ d = 0 is a rescaling ``w * exp(t d)`` that leaves the outputs unchanged to first order,
    for all weights: a freedom, whatever the network is made of. ``batched=False`` computes gradients one by one.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    rows: list[Tensor] = []
    # Rows of one draw agree on more directions than the network has freedoms, so a number of draws is needed too.
    while len(rows) < DRAWS or sum(len(row) for row in rows) < 2 * count + 20:
        draw_(module, generator)
        # Wide enough inputs to meet both sides of every bend.
        output = flat_output(module(*inputs(generator, 4.0)))
        grads = _gradients(output, parameters, batched)
        logarithmic = [
            torch.zeros(len(output), p.numel(), dtype=output.dtype)
            if g is None
            else (g * p.detach()).reshape(len(g), -1)
            for p, g in zip(parameters, grads, strict=True)
        ]
        rows.append(torch.cat(logarithmic, 1))
    matrix = torch.cat(rows)
    return matrix, matrix.abs().amax(0) > 0


def _gradients(output: Tensor, parameters: list[nn.Parameter], batched: bool) -> Sequence[Tensor | None]:
    """For each parameter the gradients of all elements of a vector, stacked."""
    unit = torch.eye(len(output), dtype=output.dtype)
    if batched:
        return torch.autograd.grad(output, parameters, unit, is_grads_batched=True, allow_unused=True)
    one_by_one = [torch.autograd.grad(output, parameters, row, retain_graph=True, allow_unused=True) for row in unit]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*one_by_one, strict=True)]


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator, float], tuple[Tensor, ...]]:
    """Draws normally distributed inputs of these shapes."""
    return lambda generator, size: tuple(
        size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def assert_complete(
    module: nn.Module,
    inputs: Callable[[torch.Generator, float], tuple[Any, ...]],
    seed: int = 0,
    *,
    batched: bool = True,
) -> None:
    """The units are freedoms, and there are no others."""
    generator = torch.Generator().manual_seed(seed)
    draw_(module, generator)
    found = directions(scaling_group(module, *inputs(generator, 1.0)))
    rows, living = count_freedoms(module, inputs, generator, batched=batched)
    rows, found = rows[:, living], found[living]
    assert (rows @ found).abs().sum() < 1e-9 * rows.abs().sum()
    # Units that touch only elements which never matter are no freedoms of the function, in either count.
    assert int(torch.linalg.matrix_rank(found)) == nullity(rows)


def nullity(matrix: Tensor) -> int:
    """Dimension of the null space; fails unless there is a clear gap below the smallest singular value that counts."""
    matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-300)
    matrix = matrix / matrix.norm(dim=0)
    values = torch.linalg.svdvals(matrix)
    values = values / values[0]
    assert not ((values > 1e-11) & (values < 1e-5)).any(), f"no clear gap: {values.tolist()}"
    return int((values <= 1e-11).sum())


def directions(group: ScalingGroup) -> Tensor:
    """Log-factors of all parameter elements for each unit, ``[m, H]``."""
    columns = []
    for unit in range(group.num_units):
        tensors = {name: torch.ones_like(p, dtype=torch.float64) for name, p in group.parameters.items()}
        group.rescale_(tensors, torch.eye(group.num_units, dtype=torch.float64)[unit])
        columns.append(torch.cat([tensor.log().flatten() for tensor in tensors.values()]))
    return torch.stack(columns, 1) if columns else torch.zeros(group.num_parameters, 0, dtype=torch.float64)


def broken_units(group: ScalingGroup, free: ScalingGroup) -> Tensor:
    """Units of a group that are no freedoms of another one of the same parameters, alone or together; ``bool[H]``."""
    columns, space = directions(group), torch.linalg.qr(directions(free)).Q
    return (columns - space @ (space.t() @ columns)).norm(dim=0) > 1e-6 * columns.norm(dim=0)


def flat_output(output: Any) -> Tensor:
    """All real numbers in an output of any structure, as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors_in(output, objects=True) if tensor.is_floating_point()])


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
