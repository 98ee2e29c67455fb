"""Pictures and HTML of a group, and pictures of metrics, show what is there."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from html import unescape
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from torch import nn

from lightning_ecopt import (
    EquivalentClassDistance,
    InvarianceViolation,
    PathNorm,
    ScalingGroup,
    UnitImbalance,
    scaling_group,
)
from lightning_ecopt.symmetry.advice import LATER, Reason, reason
from lightning_ecopt.symmetry.describe import UnitSet
from lightning_ecopt.symmetry.layers import Layer, Line, layers_of, lines_of
from lightning_ecopt.symmetry.plot import COLOURS
from lightning_ecopt.symmetry.scales import Operation
from tests.metrics.cases import zeros
from tests.networks import ResidualMLP, ResNet, mlp
from tests.selection import few
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case

mpl.use("Agg")


class Mixed(nn.Module):
    """A parameter of its own, a norm, packed attention, and an activation that costs freedoms."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(3, 4))
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.gelu, self.down = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x + self.position)
        return self.down(self.gelu(self.up(self.attention(h, h, h, need_weights=False)[0])))


def mixed() -> ScalingGroup:
    return scaling_group(Mixed(), torch.ones(1, 3, 4))


def layers(group: ScalingGroup) -> list[Layer]:
    return layers_of(group.parameters, group.couplings, group.held)


def lines(group: ScalingGroup) -> list[Line]:
    return lines_of(group.unit_sets(), layers(group))


def told(group: ScalingGroup) -> list[tuple[str, int, dict[str, int]]]:
    return [(layer.name, layer.free, {why.name: count for why, count in layer.held.items()}) for layer in layers(group)]


def test_each_layer_says_what_is_free_and_what_holds_the_rest() -> None:
    assert told(mixed()) == [
        ("position", 0, {}),  # it is added to inputs, which are fixed
        ("norm", 4, {}),
        ("attention", 12, {}),
        ("attention.out_proj", 4, {}),
        ("up", 0, {"gelu": 6}),
        ("down", 0, {"output": 2}),
    ]
    assert told(scaling_group(ResNet(), torch.ones(1, 1, 8, 8)))[:4] == [
        ("stem.0", 0, {"native_batch_norm": 3}),
        ("stem.1", 3, {}),
        ("blocks.0.conv1", 0, {"native_batch_norm": 3}),
        ("blocks.0.bn1", 3, {}),
    ]


def test_units_that_are_left_out_are_held_by_request() -> None:
    group = scaling_group(mlp(3, 4, 5, 2), zeros(1, 3))
    unwanted = torch.arange(9) < 3
    assert told(group.without(unwanted)) == [
        ("0", 1, {"left out by the user": 3}),
        ("2", 5, {}),
        ("4", 0, {"output": 2}),
    ]
    assert group.without(unwanted).without(torch.ones(6, dtype=torch.bool), Operation("gradient", "")).held == {
        **{
            name: {Operation("left out by the user", ""): 3, Operation("gradient", ""): 1}
            for name in ("0.weight", "0.bias")
        },
        **{name: {Operation("gradient", ""): 5} for name in ("2.weight", "2.bias")},
        **{name: {Operation("output", ""): 2} for name in ("4.weight", "4.bias")},
    }


@pytest.mark.parametrize("case", few(ZOO, FAST), ids=lambda case: case.name)
def test_the_map_has_all_units_and_no_two_lines_cross(case: Case) -> None:
    module = case.build()
    group = scaling_group(module, *case.inputs(torch.Generator().manual_seed(0)))
    found, drawn = layers(group), lines(group)
    assert sum(line.size for line in drawn) == group.num_units
    taken = [(line.lane, row) for line in drawn for row in line.rows]
    assert len(taken) == len(set(taken))
    # What operations hold in the layers was charged to them, each value at least once.
    held = {why for layer in found for why in layer.held}
    assert held <= group.costs.keys()
    for line in drawn:
        assert all(found[row].free for row in line.into)


def test_lines_that_meet_in_a_layer_are_in_different_lanes() -> None:
    rows = [Layer(name, 1, {}) for name in "abc"]

    def units(into: str, out_of: str) -> UnitSet:
        return UnitSet(torch.arange(5), ((f"{into}.weight", 1.0), (f"{out_of}.weight", -1.0)))

    found = lines_of([units("a", "b"), units("a", "c"), units("c", "c"), units("b", "c")], rows)
    assert [(line.size, line.lane, set(line.into), set(line.out_of)) for line in found] == [
        (5, 0, {0}, {2}),
        (5, 1, {0}, {1}),
        (5, 2, {1}, {2}),
        (5, 1, {2}, {2}),
    ]


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_picture_says_what_the_map_says() -> None:
    figure, ax = mixed().plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == [name for name, *_ in told(mixed())]
    assert {"4 free", "12 free", "6 held: gelu", "2 held: output", "held: meets fixed values"} <= set(texts(ax))
    assert texts(ax).count("4") == len(lines(mixed()))
    assert ax.get_title(loc="left") == f"H = {mixed().num_units} freedoms of m = {mixed().num_parameters} parameters"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == [
        "units: c multiplies the layer",
        "1/c multiplies the layer",
        "c one part of it, 1/c another, as queries and keys",
        "held fixed: what must scale alike, as in sums",
        "held fixed: an activation that does not bend at zero",
        "held fixed: an end: input, output, loss",
    ]
    plt.close(figure)


def test_a_picture_can_be_part_of_another() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    found = scaling_group(ResidualMLP(), zeros(1, 3)).plot(left)
    assert found == (figure, left)
    assert UnitImbalance().plot([torch.tensor(1.0), torch.tensor(2.0)], right) == (figure, right)
    assert not right.texts or right.get_ylabel() == "UnitImbalance"
    plt.close(figure)


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Sequential(nn.Identity())])
def test_a_network_without_units_has_a_picture(module: nn.Module) -> None:
    figure, ax = scaling_group(module, zeros(1, 3)).plot()
    assert ax.get_title(loc="left").startswith("H = 0 freedoms")
    plt.close(figure)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", "an activation that does not bend at zero"),
        ("native_batch_norm", "a norm: its epsilon does not scale"),
        ("_softmax", "softmax, exp, log or a loss"),
        ("nll_loss_forward", "softmax, exp, log or a loss"),
        ("add", "what must scale alike, as in sums"),
        ("output[0]", "an end: input, output, loss"),
        ("loss", "an end: input, output, loss"),
        ("an_operation_of_mine", "an operation without a rule"),
        *((name, "on request, or by a check") for name in sorted(LATER)),
    ],
)
def test_reasons(name: str, expected: Reason) -> None:
    assert reason(Operation(name, "")) == expected
    assert expected in COLOURS


class Odd(nn.Module):
    """A name that a page would take for a tag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("<b>&[red]", nn.Linear(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(getattr(self, "<b>&[red]")(x).relu())


@pytest.mark.parametrize("make", [mixed, lambda: scaling_group(Odd(), zeros(1, 3))])
def test_a_notebook_shows_the_report(make: Callable[[], ScalingGroup]) -> None:
    group = make()
    html = group._repr_html_()
    file = io.StringIO()
    group.summary(Console(file=file, width=300))
    words = re.findall(r"[^\s│┃━┏┓┡┩╇┳└┘┴─]+", file.getvalue())
    assert sorted(unescape(re.sub(r"<[^>]*>", " ", html)).split()) == sorted(words)
    assert "<b>" not in html
    assert html.count("<table>") == 2


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    group = mixed()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (group.plot, UnitImbalance().plot):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ecopt\[plots\]'"):
            plot()
    assert "pip" not in group._repr_html_()


def test_metrics_are_drawn_as_those_of_torchmetrics() -> None:
    net = mlp(3, 4, 2)
    group = scaling_group(net, zeros(1, 3))
    net(torch.ones(1, 3)).sum().backward()
    values: dict[Any, tuple[Any, ...]] = {
        UnitImbalance(): (group,),
        PathNorm(): (net, zeros(1, 3)),
        EquivalentClassDistance(): (net, net, group),
        InvarianceViolation(): (group,),
    }
    for metric, arguments in values.items():
        found = [metric(*arguments) for _ in range(3)]
        for figure, ax in (metric.plot(), metric.plot(found)):
            assert ax.get_ylabel() == type(metric).__name__
            assert ax.get_yscale() == ("log" if isinstance(metric, UnitImbalance) else "linear")
            plt.close(figure)
        assert torch.tensor(ax.lines[0].get_ydata()).tolist() == pytest.approx([float(value) for value in found])


@pytest.mark.filterwarnings("error")
def test_a_large_imbalance_is_drawn_without_a_warning() -> None:
    figure, ax = UnitImbalance().plot([torch.tensor(1.0), torch.tensor(1000.0)])
    assert ax.get_ylim()[0] < 1 < 1000 < ax.get_ylim()[1]
    plt.close(figure)
