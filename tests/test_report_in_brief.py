"""The report in one line says what the table says, and nothing that nobody could act on."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import lightning_ecopt
from lightning_ecopt import EquivalentClassOptimization, scaling_group
from lightning_ecopt.symmetry.advice import advice
from lightning_ecopt.symmetry.report import in_brief
from tests.lightning_integration.modules import EXAMPLE, Classifier, fit
from tests.networks import ResidualMLP, mlp

HOW = "group.summary()"


def brief(net: nn.Module, shape: tuple[int, ...] = (1, 4), **options: Any) -> list[str]:
    return in_brief(scaling_group(net, torch.zeros(shape)).overview(**options), HOW)


class AtTheTop(nn.Module):
    """Weights that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first).relu(), self.last)


def normalised() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))


# The line -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: mlp(4, 8, 6, 2), "8 + 6 freedoms in 3 layers"),
        (lambda: mlp(4, 1, 2), "1 freedom in 2 layers"),
        (lambda: mlp(4, 1200, 2), "1,200 freedoms in 2 layers"),
        (lambda: mlp(4, *[2] * 4, 2), "2 + 2 + 2 + 2 freedoms in 5 layers"),
        (lambda: mlp(4, *[300] * 5, 2), "1,500 freedoms in 6 layers"),
        (lambda: ResidualMLP(4, width=5, inner=3), "5 + 3 freedoms in 4 layers"),
        (AtTheTop, "3 freedoms in 2 layers"),
        (normalised, "3 + 3 freedoms in 2 layers"),  # the length of a row of v, and g
    ],
)
def test_the_line_has_the_sizes_of_sets_and_the_number_of_layers(make: Callable[[], nn.Module], expected: str) -> None:
    assert brief(make()) == [expected]


@pytest.mark.parametrize(("used", "expected"), [(8, "all used"), (7, "7 of them used"), (0, "0 of them used")])
def test_the_line_tells_how_many_freedoms_are_used(used: int, expected: str) -> None:
    assert brief(mlp(4, 8, 2), usable=torch.arange(8) < used) == [f"8 freedoms in 2 layers, {expected}"]


def test_what_follows_is_named() -> None:
    assert brief(mlp(4, 8, 2), followers=["target follows online"]) == [
        "8 freedoms in 2 layers",
        "Rescaled with what it follows: target follows online",
    ]


# What could be done ---------------------------------------------------------------------------------------------------


class Unknown(nn.Module):
    """An operation that has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x, x)


TODO = "(another activation: ReLU, LeakyReLU, PReLU)"


def test_what_could_be_changed_is_named_by_module_and_most_scales_first() -> None:
    net = nn.Sequential(
        *(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU()),
        *(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), Unknown(), nn.Linear(5, 2)),
    )
    assert brief(net) == [
        "6 freedoms in 2 layers",
        f"3, 5 and 1 more: gelu holds 48 scales fixed {TODO}",
        f"1: silu holds 8 scales fixed {TODO}",
        "11: hypot holds 5 scales fixed (perhaps a stand-in: help(lightning_ecopt.symmetry.stand_in))",
    ]


def test_a_line_says_how_many_more_there_are_and_how_to_see_them() -> None:
    layers = (nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ELU())
    net = nn.Sequential(*(each for layer in layers for each in (nn.Linear(4, 4), layer)), nn.Linear(4, 2))
    lines = brief(net)
    assert len(lines) == 5
    assert lines[-1] == "2 more operations hold scales fixed: group.summary()"


def test_nothing_is_said_that_nobody_could_act_on() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(-1))
    group = scaling_group(net, torch.zeros(1, 4))
    assert {"native_layer_norm", "_softmax"} <= {operation.name for operation in group.costs}
    assert in_brief(group.overview(), HOW) == ["8 freedoms in 2 layers"]


def test_without_freedoms_the_line_says_where_the_reasons_are() -> None:
    assert brief(nn.Linear(4, 2)) == ["no freedoms, steps stay plain; group.summary() says why"]
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    assert brief(net) == [
        "no freedoms, steps stay plain; group.summary() says why",
        f"1: gelu holds 8 scales fixed {TODO}",
    ]


def test_all_that_holds_scales_fixed_without_being_an_operation_has_its_own_advice() -> None:
    names = [
        call.args[0].value
        for path in Path(lightning_ecopt.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Operation"
        if isinstance(call.args[0], ast.Constant)
    ]
    # The first two only say that labels are equal; the third is the example of a docstring.
    names = [name for name in names if name not in ("step", "copies of weights", "the gradient")]
    assert len(names) > 5
    assert [name for name in names if "stand-in" in advice(name)] == []


# When training starts -------------------------------------------------------------------------------------------------


class Smooth(nn.Sequential):
    """One layer that costs freedoms, and one that does not."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("options", [{}, {"verbose": True}], ids=["default", "True"])
@pytest.mark.parametrize("example", [None, EXAMPLE], ids=["first step", "example"])
def test_the_callback_prints_one_line(
    options: dict[str, Any], example: Tensor | None, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Classifier(mlp(64, 12, 16, 10), example=example), EquivalentClassOptimization(**options))
    assert printed(capsys) == [
        "12 + 16 freedoms in 3 layers, all used; lr = 0.1 is the relative length of a step of a unit"
    ]


def test_lost_freedoms_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(Smooth()), EquivalentClassOptimization(rule="path"))
    assert printed(capsys) == [
        "12 freedoms in 2 layers, all used; lr = 0.1 is SGD's, in values of basis paths",
        f"net.1: gelu holds 16 scales fixed {TODO}",
    ]


@pytest.mark.parametrize("verbose", [True, "table"])
@pytest.mark.filterwarnings("ignore:The network has no scaling freedoms")
def test_without_freedoms_nothing_is_said_of_the_rate(verbose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(nn.Linear(64, 10)), EquivalentClassOptimization(verbose=verbose))
    said = "\n".join(printed(capsys))
    assert "lr = " not in said
    if verbose is True:
        assert said == 'no freedoms, steps stay plain; verbose="table" or callback.group.summary() says why'


def test_the_table_is_printed_if_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    callback = EquivalentClassOptimization(verbose="table")
    fit(Classifier(Smooth()), callback)
    table = printed(capsys)
    assert table.pop() == "lr = 0.1 is the relative length of a step of a unit"
    assert callback.group is not None
    callback.group.summary()
    summary = printed(capsys)
    costs = "Operations that fix scales"
    assert table[table.index(costs) :] == summary[summary.index(costs) :]
    assert table[0] == summary[0] == "Freedoms of the network"


@pytest.mark.parametrize("verbose", ["tabel", "line", 2, None])
def test_another_word_is_refused(verbose: Any) -> None:
    message = f"EquivalentClassOptimization: verbose must be True, False or 'table', not {verbose!r}"
    with pytest.raises(ValueError, match=message):
        EquivalentClassOptimization(verbose=verbose)


class Penalised(Classifier):
    """Its loss holds fixed what its example inputs leave free."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.net[0](batch[0]).exp().mean()


@pytest.mark.parametrize("verbose", [True, "table"])
def test_a_further_line_says_that_there_are_fewer(verbose: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Penalised(mlp(64, 12, 16, 10), example=EXAMPLE), EquivalentClassOptimization(verbose=verbose))
    assert printed(capsys)[-1] == "16 of 28 units are free now; callback.group.summary() says why."
