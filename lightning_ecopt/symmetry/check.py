"""Whether the units of a network are all its freedoms, by a count that knows nothing of layers, operations or rules.

A freedom is a direction d in the logarithms of the weights along which no output changes. To first order, that is::

    sum_e d_e w_e df/dw_e = 0        for every output f, whatever the weights and the inputs

So the rows ``w * df/dw`` of many draws of weights and inputs span all that is no freedom, and the dimension of their
null space is the number of freedoms. That takes as many backward passes as there are outputs: it is for small networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.rules import RULES
from lightning_ecopt.symmetry.stand_ins import STAND_INS, name_of, named_operation, short
from lightning_ecopt.symmetry.trace import scaling_group

#: Draws of weights and inputs, at least: rows of one draw agree on more directions than the network has freedoms.
DRAWS = 30
#: The draws for the count are so much larger than the example, so that they meet both sides of every bend.
SIZE = 4.0
#: Largest relative change of an output in float64 that is rounding.
ROUNDING = 1e-9

Sample = Callable[[torch.Generator, float], tuple[Any, ...]]


def check_freedoms(module: nn.Module, *inputs: Any, complete: bool = True, seed: int = 0) -> int:
    """Find out whether the units that :func:`scaling_group` finds are freedoms, and all that there are.

    A copy of the module, in float64, is rescaled at random, which must change no output; then the freedoms are counted
    without any knowledge of what the module is made of. Keep it small: a few features are as good as many.

    Args:
        module: any small module, deterministic, through which gradients flow.
        *inputs: of one call. Floating-point numbers among them are replaced by random ones.
        complete: whether to count the freedoms, too, and not only to rescale.
        seed: of the draws.

    Returns:
        The number of freedoms.

    Raises:
        ValueError: if an output changes, if there are more freedoms than were found, or if they cannot be counted.

    Example::

        assert check_freedoms(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)) == 4
    """
    return _examined(module, inputs, complete, seed).num_units


class _UnsoundError(ValueError):
    """A freedom that was found is none."""


class _IncompleteError(ValueError):
    """There are more freedoms than were found."""

    def __init__(self, missing: int, group: ScalingGroup) -> None:
        self.missing, self.group = missing, group
        costs = ", ".join(f"{operation.name} ({count})" for operation, count in group.costs.items())
        super().__init__(
            f"The group is incomplete: {missing} more freedoms were counted. Scales were fixed by: {costs}."
        )


def _examined(module: nn.Module, inputs: Sequence[Any], complete: bool, seed: int) -> ScalingGroup:
    module = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(seed)
    group = scaling_group(module, *_drawn(inputs)(generator, 1.0))
    for _ in range(3):
        draw_(module, generator)
        change = _largest_change(module, group, _drawn(inputs)(generator, 1.0), generator)
        if not change <= ROUNDING:
            raise _UnsoundError(
                f"The group is unsound: rescaling its units changes an output by {100 * change:.2g} % of its size."
            )
    if not complete:
        return group
    rows, living = count_freedoms(module, _drawn(inputs), generator)
    found = directions(group)[living]
    rows = rows[:, living]
    if not (rows @ found).abs().sum() < ROUNDING * rows.abs().sum():
        raise _UnsoundError("The group is unsound: rescaling one of its units changes the outputs to first order.")
    missing = nullity(rows) - int(torch.linalg.matrix_rank(found))
    if missing:
        raise _IncompleteError(missing, group)
    return group


def check_stand_in(operation: Callable[..., Any] | str, *inputs: Any, complete: bool = True, seed: int = 0) -> int:
    """Find out whether the stand-in of an operation is sound, and whether it says all that there is to say.

    The operation is put into a small network: its floating-point inputs come from linear layers, its outputs lead into
    others. Inputs that are ``nn.Parameter`` are weights of this network, too. Then :func:`check_freedoms` checks it.

    Args:
        operation: what is called, such as ``torch.ops.mylib.scaled_relu``, its name, or a function that calls it.
        *inputs: its arguments; tensors have the batch first, and a few rows and features are enough.
        complete: whether to count the freedoms, too. Without it, the stand-in may say less than there is to say.
        seed: of the draws.

    Returns:
        The number of freedoms of the small network.

    Raises:
        ValueError: if there is no stand-in, or it is wrong, or incomplete, or the freedoms cannot be counted.

    Example::

        check_stand_in(torch.ops.mylib.scaled_relu, torch.randn(8, 4), 0.5)
    """
    name = operation if isinstance(operation, str) else name_of(operation)
    called = named_operation(operation) if isinstance(operation, str) else operation
    subject = "The stand-in" if name is None else f"The stand-in of {name}"
    with _noting_stand_ins() as met:
        try:
            group = _examined(_Around(called, inputs), inputs, complete, seed)
        except _UnsoundError as error:
            raise ValueError(f"{subject} is unsound, it allows too much. {error}") from None
        except _IncompleteError as error:
            _check_taught(name, error.group)
            few = f"it holds {error.missing} freedoms fixed that the operation has"
            raise ValueError(f"{subject} is incomplete: {few}. {error}") from None
    _check_taught(name, group)
    if not met if name is None else short(name) not in met | RULES.keys():
        warn(f"No stand-in{'' if name is None else f' of {name}'} was met, so that none was checked.")
    return group.num_units


def _check_taught(name: str | None, group: ScalingGroup) -> None:
    """Check that nothing was held fixed for want of a stand-in."""
    for operation, count in group.costs.items():
        is_meant = "::" in operation.name or (name is not None and operation.name == short(name))
        if is_meant and operation.name not in STAND_INS and operation.name not in RULES:
            raise ValueError(f"{operation.name} has no stand-in, so that it holds {count} scales fixed.")


@contextmanager
def _noting_stand_ins() -> Iterator[set[str]]:
    """Take down which stand-ins are traced."""
    before, met = dict(STAND_INS), set[str]()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            met.add(name)
            return function(*args, **kwargs)

        return noted

    STAND_INS.update({name: noting(name, function) for name, function in before.items()})
    try:
        yield met
    finally:
        STAND_INS.update(before)


class _Around(nn.Module):
    """Linear layers, an operation, linear layers."""

    def __init__(self, operation: Callable[..., Any], inputs: Sequence[Any]) -> None:
        super().__init__()
        self.operation = lambda *arguments: operation(*arguments)  # can be copied, whatever the operation is
        self.first, self.own, self.last = nn.ModuleDict(), nn.ParameterDict(), nn.ModuleList()
        for number, value in enumerate(inputs):
            if isinstance(value, nn.Parameter):
                self.own[str(number)] = nn.Parameter(value.detach().clone())
            elif isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                self.first[str(number)] = nn.Linear(value.shape[-1], value.shape[-1])
        with torch.no_grad():
            outputs = self._through(inputs, next(self.parameters(), torch.empty(0)).dtype)
        self.last.extend(nn.Linear(output.shape[1], 2) for output in outputs)

    def _through(self, inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        arguments = tree_map_only(Tensor, lambda t: t.to(dtype) if dtype and t.is_floating_point() else t, list(inputs))
        for key, parameter in self.own.items():
            arguments[int(key)] = parameter
        for key, layer in self.first.items():
            arguments[int(key)] = layer(arguments[int(key)])
        outputs = [output for output in tensors_in(self.operation(*arguments)) if output.is_floating_point()]
        return [output.flatten(1) if output.dim() > 1 else output.reshape(-1, 1) for output in outputs]

    def forward(self, *inputs: Any) -> list[Tensor]:
        return [layer(output) for layer, output in zip(self.last, self._through(inputs), strict=True)]


# The count ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight, bias and gain anew, none of them near zero, and the running statistics too."""
    for parameter in module.parameters():
        size = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.copy_(size * sign / max(1, parameter.shape[1:].numel()) ** 0.5)
    for part in module.modules():
        if (
            isinstance(part, nn.modules.batchnorm._BatchNorm)
            and part.running_mean is not None
            and part.running_var is not None
        ):
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=generator))


def count_freedoms(
    module: nn.Module, inputs: Sample, generator: torch.Generator, draws: int = DRAWS
) -> tuple[Tensor, Tensor]:
    """Rows ``w * df/dw`` over many draws of weights and inputs, and which parameter elements ever mattered.

    Args:
        module: in float64.
        inputs: draws the inputs, from a generator and the size of what is drawn.
        generator: of all draws.
        draws: how many there are at least.

    Raises:
        ValueError: if no gradient flows.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    rows: list[Tensor] = []
    while len(rows) < draws or sum(len(row) for row in rows) < 2 * count + 20:
        draw_(module, generator)
        output = flat_output(module(*inputs(generator, SIZE)))
        if not output.requires_grad:
            raise ValueError("The freedoms cannot be counted: no gradient flows from the outputs to the weights.")
        logarithmic = [
            torch.zeros(len(output), p.numel(), dtype=output.dtype)
            if g is None
            else (g * p.detach()).reshape(len(g), -1)
            for p, g in zip(parameters, _gradients(output, parameters), strict=True)
        ]
        rows.append(torch.cat(logarithmic, 1))
    matrix = torch.cat(rows)
    return matrix, matrix.abs().amax(0) > 0


def _gradients(output: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of all elements of an output, ``[N, ...]``; ``None`` for a parameter that has none."""
    eye = torch.eye(len(output), dtype=output.dtype)
    try:
        return torch.autograd.grad(output, parameters, eye, is_grads_batched=True, allow_unused=True, retain_graph=True)
    except RuntimeError:  # an operation cannot be batched
        each = [torch.autograd.grad(output, parameters, row, allow_unused=True, retain_graph=True) for row in eye]
        return [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]


def nullity(matrix: Tensor) -> int:
    """Dimension of the null space.

    Raises:
        ValueError: if there is no clear gap below the smallest singular value that counts.
    """
    matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-300)
    matrix = matrix / matrix.norm(dim=0)
    values = torch.linalg.svdvals(matrix)
    values = values / values[0]
    if ((values > 1e-11) & (values < 1e-5)).any():
        raise ValueError(f"The freedoms cannot be counted: there is no clear gap in {values.tolist()}.")
    return int((values <= 1e-11).sum())


def directions(group: ScalingGroup) -> Tensor:
    """Log-factors of all parameter elements for each unit, ``[m, H]``."""
    columns = []
    for unit in range(group.num_units):
        tensors = {name: torch.ones_like(p, dtype=torch.float64) for name, p in group.parameters.items()}
        group.rescale_(tensors, torch.eye(group.num_units, dtype=torch.float64)[unit])
        columns.append(torch.cat([tensor.log().flatten() for tensor in tensors.values()]))
    return torch.stack(columns, 1) if columns else torch.zeros(group.num_parameters, 0, dtype=torch.float64)


def flat_output(output: Any) -> Tensor:
    """All real numbers in an output of any structure, as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors_in(output, objects=True) if tensor.is_floating_point()])


def _drawn(inputs: Sequence[Any]) -> Sample:
    """Draws inputs like those given."""

    def like(tensor: Tensor, generator: torch.Generator, size: float) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    def draw(generator: torch.Generator, size: float) -> tuple[Any, ...]:
        return tuple(tree_map_only(Tensor, lambda tensor: like(tensor, generator, size), list(inputs)))

    return draw


@torch.no_grad()
def _largest_change(
    module: nn.Module, group: ScalingGroup, inputs: tuple[Any, ...], generator: torch.Generator
) -> float:
    """By how much of its size an output changes if all units are rescaled at random; NaN if one is not finite."""
    before = flat_output(module(*inputs))
    group.act_(torch.randn(group.num_units, generator=generator, dtype=torch.float64))
    return float((flat_output(module(*inputs)) - before).abs().max() / before.abs().max().clamp_min(1e-300))
