"""What of the output counts, and which part of it a report names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.common.nested import named_tensors_in
from lightning_ecopt.symmetry import scaling_group
from lightning_ecopt.symmetry.report import Overview, print_report
from tests.symmetry.helpers import assert_complete, assert_same, normal


class Cache:
    """Keys and values, as an object that is no container."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []


@dataclass
class Output:
    logits: Tensor
    cache: Cache | None = None


class Decoder(nn.Module):
    """Two layers of attention that return what later calls need."""

    def __init__(self, *, real: bool = False, read: Callable[[Any], Any] = lambda output: output) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(3, 12) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.real, self.read = real, read
        self.double()

    def forward(self, x: Tensor) -> Any:
        cache = Cache()
        if self.real:
            assert float(x.sum()) != 0  # which a fake tensor has no answer to
        for project, back in zip(self.projections, self.back, strict=True):
            query, key, value = project(x).chunk(3, -1)
            cache.layers.append({"key": key, "value": value})
            x = x + back(F.scaled_dot_product_attention(query, key, value))
        return self.read(Output(x, cache))


X = torch.linspace(-1, 2, 30, dtype=torch.float64).view(2, 5, 3)


def logits(output: Output) -> Tensor:
    return output.logits


def test_a_cache_among_the_outputs_is_named() -> None:
    group = scaling_group(Decoder(), X)
    assert group.num_units == 0
    costs = {operation.name: count for operation, count in group.costs.items() if operation.name.startswith("output")}
    assert costs == {f"output.cache.layers[{layer}]['{part}']": 4 for layer in range(2) for part in ("key", "value")}


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_what_counts_of_the_output_can_be_said(real: bool) -> None:
    module = Decoder(real=real)
    group = scaling_group(module, X, outputs=logits)
    assert group.num_units == 2 * (4 + 4)
    before, cached = logits(module(X)), module(X).cache.layers[0]["key"]
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(logits(module(X)), before)
    assert not torch.allclose(module(X).cache.layers[0]["key"], cached)


def test_what_counts_has_all_its_freedoms() -> None:
    assert_complete(Decoder(read=logits), normal((2, 5, 3)))


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize(
    ("outputs", "units"),
    [
        (lambda output: output.logits.logsumexp(-1).mean(), 16),
        (lambda output: (output.logits, [output.cache.layers[1]["value"]]), 12),
        (lambda output: {"loss": output.logits.sum() + output.cache.layers[0]["key"].square().mean()}, 12),
        (lambda output: output.cache.layers[0]["value"], 12),
    ],
    ids=["loss", "two parts", "loss that looks at hidden values", "a part alone"],
)
def test_what_is_computed_from_the_output_counts(outputs: Callable[[Any], Any], units: int, real: bool) -> None:
    module = Decoder(real=real)
    group = scaling_group(module, X, outputs=outputs)
    tensors = [tensor for _, tensor in named_tensors_in(outputs(module(X)), "")]
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    again = [tensor for _, tensor in named_tensors_in(outputs(module(X)), "")]
    for one, other in zip(tensors, again, strict=True):
        assert_same(other, one)
    assert group.num_units == units


@pytest.mark.parametrize(
    ("outputs", "error", "match"),
    [
        ("logits", TypeError, "a function of what the module returns, but got str"),
        (lambda output: None, ValueError, "no tensor of what Decoder returns"),
        (lambda output: output.logit, AttributeError, "logit"),
    ],
)
def test_mistakes_are_named(outputs: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scaling_group(Decoder(), X, outputs=outputs)


class Slots:
    __slots__ = ("inner", "unset")

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_every_tensor_has_the_expression_that_leads_to_it() -> None:
    a, b, c, d, e, f, g = (torch.zeros(n) for n in range(7))
    structure = {
        "x": [a, (b, a)],
        3: Slots(OrderedDict(y=c)),
        (1, 2): {d},
        "made": Output(e),
        "later": lambda: f,
        "next": iter([g]),
    }
    found = named_tensors_in(structure, "output", objects=True)
    assert [name for name, _ in found] == [
        "output['x'][0]",
        "output['x'][1][0]",
        "output[3].inner['y']",
        "output[...][0]",
        "output['made'].logits",
        "output['later'].__closure__[0]",
        "output['next'][...][0]",
    ]
    assert [tensor for _, tensor in found] == [a, b, c, d, e, f, g]
    for name, tensor in found[:3] + found[4:5]:
        assert eval(name, {"output": structure}) is tensor


def test_a_report_has_one_row_for_parts_that_differ_in_numbers() -> None:
    group = scaling_group(Decoder(), X)
    text = StringIO()
    overview = Overview(group.num_parameters, [], group.costs, (), torch.zeros(0, dtype=torch.bool))
    print_report(overview, Console(file=text, width=120))
    words = [line.split() for line in text.getvalue().splitlines() if "output." in line and "8" in line]
    assert [[word for word in line if word.startswith("output.")] for line in words] == [
        ["output.cache.layers[0]['key']"],
        ["output.cache.layers[0]['value']"],
    ]
