"""Networks of one operation, and what is checked of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry import scaling_group
from lightning_ecopt.symmetry.rules import RULES, Call
from lightning_ecopt.symmetry.tracer import Tracer
from tests.symmetry import helpers
from tests.symmetry.helpers import assert_same, count_freedoms, directions, draw_, evaluate, normal, nullity

BATCH = 8
DRAWS = 12  # of the count: the networks are small


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
    """

    name: str
    call: Callable[[Any, Tensor], Tensor]
    units: int = 4
    spatial: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inference: bool = False
    complete: bool = True
    counted: bool = True


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
        return self.last(y.reshape(len(x), -1).to(x.dtype))


def every(ops: Sequence[Op]) -> pytest.MarkDecorator:
    """One test for each operation of a table."""
    return pytest.mark.parametrize("op", ops, ids=lambda op: f"{op.name}{op.spatial or ''}-{op.units}")


def check(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is met, keeps the function, and loses no freedom that it need not lose."""
    torch.manual_seed(0)
    module, met = Around(op), []
    draw_(module, torch.Generator().manual_seed(2))
    rule = RULES.get(op.name)  # a composite operation may do without one
    if rule is not None:
        monkeypatch.setitem(RULES, op.name, lambda call: met.append(op.name) or rule(call))
    with torch.inference_mode(op.inference):
        group = scaling_group(module, module.example())
    assert met or rule is None, "the operation was not met"
    found = directions(group)
    before = evaluate(module, (module.example(),))
    group.act_(torch.randn(group.num_units, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)
    assert group.num_units == op.units
    if op.counted:
        monkeypatch.setattr(helpers, "DRAWS", DRAWS)
        rows, living = count_freedoms(module, normal(module.shape), torch.Generator().manual_seed(5))
        rows, found = rows[:, living], found[living]
        assert (rows @ found).abs().sum() < 1e-9 * rows.abs().sum()
        missing = nullity(rows) - int(torch.linalg.matrix_rank(found))
        assert missing == 0 if op.complete else missing > 0, f"{missing} freedoms were not found"


def out_of(function: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """The form of a function that writes into tensors it is given; where gradients must pass, the plain one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and _get_current_dispatch_mode() is None:
            return function(*args, **kwargs)
        out = tuple(torch.empty(0, dtype=torch.float64) for _ in range(count))
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return function(*args, **kwargs, out=out[0] if count == 1 else out)

    return call


def directly(name: str, tracer: Tracer, output: Any, tensors: dict[str, Any], **arguments: Any) -> Any:
    """What a rule says of a call made by hand: label and tensor of each argument."""
    values = {id(tensor): value for tensor, value in tensors.values()}
    named = {key: tensor for key, (tensor, _) in tensors.items()}
    shapes = {id(tensor): tuple(tensor.shape) for tensor in named.values()}
    return RULES[name](Call(tracer, {**named, **arguments}, values, shapes, output))
