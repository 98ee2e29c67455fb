"""Networks of one operation, and what is checked of each of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry import ScalingGroup, equations, scaling_group
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.rules import RULES, Call
from tests.selection import full
from tests.symmetry.helpers import assert_same, count_freedoms, directions, draw_, evaluate, normal, nullity

BATCH = 8
DRAWS = 4  # for the count: fewer than elsewhere will do for networks so small


@dataclass(frozen=True)
class Op:
    """Operations between a first and a last layer.

    Args:
        name: base name of the ATen operation that must be met.
        call: from the module, whose further parameters are attributes, and the features of the first layer.
        units: number of freedoms of the whole network.
        spatial: 0 for features ``[8, 4]`` of a linear layer, more for ``[8, 4, 4, ...]`` of a convolution.
        shapes: shapes of further parameters.
        inference: trace in inference mode, where composite operations are not taken apart before they are seen.
        complete: whether these are all freedoms that there are.
        counted: whether the freedoms can be counted: gradients must show what the output depends on.
        large: trace as if matrices had too many elements for a scale of each.
    """

    name: str
    call: Callable[[Any, Tensor], Tensor]
    units: int = 4
    spatial: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inference: bool = False
    complete: bool = True
    counted: bool = True
    large: bool = False


class Around(nn.Module):
    """First layer, operation, last layer."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.first = kinds[op.spatial - 1](2, 4, 2, padding="same") if op.spatial else nn.Linear(2, 4)
        for name, shape in op.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.register_buffer("known", torch.full((4,), 0.5))
        self.register_buffer("matrix", torch.arange(16.0).reshape(4, 4) / 8 - 1)
        self.double()
        with torch.no_grad():
            features = op.call(self, self.first(self.example())).reshape(BATCH, -1).shape[1]
        self.last = nn.Linear(features, 2).double()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the inputs."""
        return BATCH, 2, *((), (4,), (4, 4), (2, 2, 2))[self.op.spatial]

    def example(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op.call(self, self.first(x))
        return self.last(y.reshape(len(x), self.last.in_features).to(x.dtype))


def every(ops: Sequence[Op]) -> pytest.MarkDecorator:
    """One test for each row of a table; by default for the first four rows of each operation."""
    seen: Counter[str] = Counter()
    cases = []
    for op in ops:
        seen[op.name] += 1
        cases.append(pytest.param(op, marks=full if seen[op.name] > 4 else ()))
    return pytest.mark.parametrize("op", cases, ids=lambda op: f"{op.name}{op.spatial or ''}-{op.units}")


def find(op: Op) -> tuple[Around, ScalingGroup, Tensor]:
    """The network, its group, and the directions of this; that acting keeps the function is checked."""
    torch.manual_seed(0)
    module = Around(op)
    draw_(module, torch.Generator().manual_seed(2))
    with torch.inference_mode(op.inference), pytest.MonkeyPatch.context() as patch:
        if op.large:
            patch.setattr(equations, "MOST_ELEMENTS", 3)
        group = scaling_group(module, module.example())
    found = directions(group)
    before = evaluate(module, (module.example(),))
    group.act_(torch.randn(group.num_units, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)
    return module, group, found


def check(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is met, keeps the function, and loses no freedom that it need not lose."""
    met = []
    rule = RULES.get(op.name)  # a composite operation may do without one
    if rule is not None:
        monkeypatch.setitem(RULES, op.name, lambda call: met.append(op.name) or rule(call))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, group, found = find(op)
    assert not [str(warning.message) for warning in caught if "held fixed" in str(warning.message)]
    assert met or rule is None, "the operation was not met"
    assert group.num_units == op.units
    if op.counted and op.complete:
        found_all = any(count_missing(module, found, draws) == 0 for draws in (DRAWS, 30 * DRAWS))  # few need so many
        assert found_all, "there are more freedoms"
    elif op.counted:
        assert count_missing(module, found, 8 * DRAWS) > 0, "there are no more freedoms"


def count_missing(module: Around, found: Tensor, draws: int) -> int:
    """How many freedoms there are besides those found, by the count that knows nothing of layers."""
    rows, living = count_freedoms(module, normal(module.shape), torch.Generator().manual_seed(5), draws)
    rows, found = rows[:, living], found[living]
    assert (rows @ found).abs().sum() < 1e-9 * rows.abs().sum(), "what was found is no freedom"
    return nullity(rows) - int(torch.linalg.matrix_rank(found))


def traced() -> bool:
    """Whether a call is being traced, and not counted or evaluated: then it need not pass gradients."""
    return _get_current_dispatch_mode() is not None


def detached(tensor: Tensor) -> Tensor:
    """Without its gradient where that is traced."""
    return tensor.detach() if traced() else tensor


def out_of(function: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """The form of a function that writes into tensors it is given, where that is traced."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not traced():
            return function(*args, **kwargs)
        out = tuple(torch.empty(0, dtype=torch.float64) for _ in range(count))
        args, kwargs = tree_map_only(Tensor, detached, (args, kwargs))
        return function(*args, **kwargs, out=out[0] if count == 1 else out)

    return call


def directly(name: str, equations: Equations, output: Any, tensors: dict[str, Any], **arguments: Any) -> Any:
    """What a rule says of a call made by hand: label and tensor of each argument."""
    values = {id(tensor): value for tensor, value in tensors.values()}
    named = {key: tensor for key, (tensor, _) in tensors.items()}
    shapes = {id(tensor): tuple(tensor.shape) for tensor in named.values()}
    return RULES[name](Call(equations, {**named, **arguments}, values, shapes, output))
