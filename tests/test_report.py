"""What a person is told of a group is what the group does."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimization, ScalingGroup, scaling_group
from lightning_ecopt.symmetry.describe import _boxes, _elements, power, runs
from lightning_ecopt.symmetry.group import Coupling
from lightning_ecopt.symmetry.report import print_report
from tests.lightning_integration.modules import EXAMPLE, Classifier, fit
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, norm_cnn, plain_cnn
from tests.selection import few
from tests.symmetry.helpers import draw_
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case


class Lambda(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attention(nn.MultiheadAttention):
    """Attention of a sequence to itself with packed queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """One square weight for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.stem(x).relu()).relu()).relu())


class DepthwiseStream(nn.Module):
    """A residual stream with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.depthwise(x)
        return self.head(x.relu().mean((2, 3)))


def depthwise() -> nn.Module:
    """Depthwise and pointwise convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )


def flattening_cnn() -> nn.Module:
    """Convolution, batch norm and linear layers, with a flattened image between them."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))


def channels_last_cnn() -> nn.Module:
    """The same with the channels innermost."""
    last = Lambda(lambda x: x.permute(0, 2, 3, 1).flatten(1))
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), last, nn.Linear(27, 2))


def squared() -> nn.Module:
    """Squared ReLU."""
    return nn.Sequential(nn.Linear(2, 3), Lambda(lambda x: x.relu() ** 2), nn.Linear(3, 2))


def rooted() -> nn.Module:
    """The root of a ReLU."""
    return nn.Sequential(nn.Linear(2, 3), Lambda(lambda x: x.relu() ** 0.5), nn.Linear(3, 2))


class Gated(nn.Module):
    """Two factors of which both scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() * self.b(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(2, 4, 3, 2), (1, 2)),
    "one hidden unit": (lambda: mlp(2, 1, 1, 2), (1, 2)),
    "residual": (lambda: ResidualMLP(2), (1, 2)),
    "residual of width one": (lambda: ResidualMLP(2, width=1, inner=1), (1, 2)),
    "convolutions and batch norm": (norm_cnn, (2, 1, 8, 8)),
    "flattened": (flattening_cnn, (2, 1, 5, 5)),
    "flattened with channels last": (channels_last_cnn, (2, 1, 5, 5)),
    "grouped": (plain_cnn, (1, 1, 8, 8)),
    "depthwise": (depthwise, (1, 1, 8, 8)),
    "depthwise in a stream": (DepthwiseStream, (1, 1, 5, 5)),
    "ResNet": (ResNet, (2, 1, 8, 8)),
    "DenseNet": (DenseNet, (1, 1, 6, 6)),
    "packed attention": (lambda: nn.Sequential(nn.LayerNorm(4), Attention(4, 2, batch_first=True)), (1, 3, 4)),
    "squared": (squared, (1, 2)),
    "rooted": (rooted, (1, 2)),
    "gated": (Gated, (1, 2)),
    "tied": (Twice, (1, 2)),
}


def group_of(name: str) -> ScalingGroup:
    make, shape = NETWORKS[name]
    module = make().double()
    draw_(module, torch.Generator().manual_seed(0))
    return scaling_group(module, torch.randn(shape, dtype=torch.float64))


def acted(group: ScalingGroup, unit: int) -> dict[str, Tensor]:
    """Logarithms to base 2 of the factors that each element gets when the unit is rescaled by 2."""
    log_scale = torch.zeros(group.num_units, dtype=torch.float64)
    log_scale[unit] = np.log(2)
    before = {name: parameter.detach().clone() for name, parameter in group.parameters.items()}
    group.act_(log_scale)
    factors = {name: (parameter.detach() / before[name]).log2() for name, parameter in group.parameters.items()}
    group.act_(-log_scale)
    return factors


def described(group: ScalingGroup, unit: int) -> dict[str, Tensor]:
    """The same, read from the description."""
    factors = {name: torch.zeros_like(parameter).detach() for name, parameter in group.parameters.items()}
    match = re.fullmatch(r"Unit (\d+): (.*)", group.describe(unit))
    assert match is not None
    assert int(match[1]) == unit
    for part in match[2].split("; "):
        text, elements = part.split(" multiplies ")
        exponent = {"c": 1, "1/c": -1}.get(text) or eval(text.removeprefix("c^"))
        for name, index in re.findall(r"([^\s,\[]+)(\[(?:[^\[\]]|\[[^\[\]]*\])*\])?(?:, |$)", elements):
            factors[name][eval(f"np.s_{index}") if index else ...] += exponent
    return factors


def assert_described(group: ScalingGroup) -> None:
    """What descriptions and sets of units say is what acting does."""
    sets = {unit: units.powers for units in group.unit_sets() for unit in units.units.tolist()}
    assert sorted(sets) == list(range(group.num_units))
    for unit in range(group.num_units):
        expected = acted(group, unit)
        torch.testing.assert_close(described(group, unit), expected, rtol=0, atol=1e-9)
        exponents = {
            (name, round(value, 6)) for name, factor in expected.items() for value in factor.flatten().tolist()
        }
        assert sorted((name, round(value, 6)) for name, value in sets[unit]) == sorted(
            {(name, value) for name, value in exponents if value}
        )


# One unit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_description_of_a_unit_is_what_acting_does(name: str) -> None:
    group = group_of(name)
    assert group.num_units > 0
    assert_described(group)


@pytest.mark.parametrize("case", few(ZOO, FAST[::2]), ids=lambda case: case.name)
def test_the_descriptions_of_the_zoo_are_what_acting_does(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    module = case.build().eval()
    draw_(module, generator)
    assert_described(scaling_group(module, *case.inputs(generator)))


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("mlp", 1, "Unit 1: c multiplies 0.weight[1], 0.bias[1]; 1/c multiplies 2.weight[:, 1]"),
        ("flattened", 2, "Unit 2: c multiplies 1.weight[2], 1.bias[2]; 1/c multiplies 4.weight[:, 18:27]"),
        (
            "flattened with channels last",
            1,
            "Unit 1: c multiplies 0.weight[1], 0.bias[1]; 1/c multiplies 3.weight[:, 1:26:3]",
        ),
        ("one hidden unit", 0, "Unit 0: c multiplies 0.weight, 0.bias; 1/c multiplies 2.weight"),
        ("squared", 0, "Unit 0: c multiplies 0.weight[0], 0.bias[0]; c^-2 multiplies 2.weight[:, 0]"),
        ("rooted", 0, "Unit 0: c^2 multiplies 0.weight[0], 0.bias[0]; 1/c multiplies 2.weight[:, 0]"),
        # The depthwise weights lead from the stream to itself: they keep their values, their biases do not.
        (
            "depthwise in a stream",
            2,
            "Unit 2: c multiplies stem.weight[2], stem.bias[2], depthwise.bias[2]; 1/c multiplies head.weight[:, 2]",
        ),
    ],
)
def test_descriptions_name_elements_by_index_expressions(name: str, unit: int, expected: str) -> None:
    assert group_of(name).describe(unit) == expected


@pytest.mark.parametrize("unit", [-1, 7])
def test_a_unit_that_there_is_not_is_refused(unit: int) -> None:
    with pytest.raises(IndexError, match=f"there is no unit {unit}: the group has units 0 to 6"):
        group_of("mlp").describe(unit)


def test_a_group_without_units_describes_none() -> None:
    with pytest.raises(IndexError, match="there is no unit 0: the group has no units"):
        scaling_group(nn.Linear(2, 2), torch.zeros(1, 2)).describe(0)


def coupling(shape: tuple[int, ...]) -> Coupling:
    none = torch.full((1,) * len(shape), -1)
    return Coupling("w", tuple(slice(0, size, 1) for size in shape), none, none, False)


@pytest.mark.parametrize("seed", range(20))
def test_any_set_of_elements_is_split_into_boxes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    chosen = generator.random(generator.integers(1, 5, 3)) < generator.random()
    count = np.zeros(chosen.shape, int)
    for box in _boxes(chosen):
        count[np.ix_(*box)] += 1
    np.testing.assert_array_equal(count, chosen)


@pytest.mark.parametrize("seed", range(20))
def test_index_expressions_meet_every_element_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, columns = (generator.random(size) < 0.6 for size in (7, 6))
    chosen = rows[:, None] & columns
    count = np.zeros((7, 6), int)
    for text in _elements(coupling((7, 6)), chosen, (7, 6)):
        count[eval(f"np.s_{text[1:]}") if text != "w" else ...] += 1
    np.testing.assert_array_equal(count, chosen)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([*range(5), *range(20, 30)], ["w[0:5]", "w[20:30]"]),
        ([3, 35], ["w[[3, 35]]"]),
        ([1, 2, 4, 8, 16, 19, 23, 28, 30, 33], ["w[[1, 2, 4, 8, 16, 19, 23, 28, ...]]"]),
    ],
)
def test_irregular_elements_are_listed_and_long_lists_are_cut(numbers: list[int], expected: list[str]) -> None:
    chosen = np.zeros(40, bool)
    chosen[numbers] = True
    assert _elements(coupling((40,)), chosen, (40,)) == expected


def test_many_expressions_are_cut() -> None:
    found = _elements(coupling((20, 20)), np.eye(20, dtype=bool), (20, 20))
    assert found == [*(f"w[{k}, {k}]" for k in range(8)), "... (12 more of w)"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], []),
        ([4], ["4"]),
        ([4, 5], ["4:6"]),
        ([4, 6], ["4", "6"]),
        ([0, 1, 2, 7, 10, 20, 30], ["0:3", "7", "10:31:10"]),
        ([3, 5, 6, 7], ["3", "5:8"]),
    ],
)
def test_runs_are_slices(numbers: list[int], expected: list[str]) -> None:
    assert runs(numbers) == expected


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [(1, "c"), (-1, "1/c"), (2, "c^2"), (-2, "c^-2"), (0.5, "c^(1/2)"), (-1 / 3, "c^(-1/3)")],
)
def test_powers_are_written_as_people_do(exponent: float, expected: str) -> None:
    assert power(exponent) == expected


# The table ------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The lines of what is printed, without the frames of tables."""
    lines = (" ".join(re.sub("[\u2500-\u257f]", " ", line).split()) for line in text.splitlines())
    return [line for line in lines if line]


def said(group: ScalingGroup, **options: Any) -> list[str]:
    """The lines of the tables."""
    console = Console(file=io.StringIO(), width=200)
    print_report(group.overview(**options), console)
    assert isinstance(console.file, io.StringIO)
    return words(console.file.getvalue())


def test_the_summary_names_units_dimensions_and_costs() -> None:
    group = group_of("flattened")
    assert said(group) == [
        "Freedoms of the network",
        "units numbers scaled by c scaled by 1/c",
        "3 0:3 1.weight 4.weight",
        "1.bias",
        "m = 92 parameters, H = 3 freedoms, m - H = 89 path coordinates",
        "Operations that fix scales",
        "module or line operation scales what could be done",
        "1 native_batch_norm 3 nothing: its epsilon does not scale",
        "(top level) output 2 nothing: it must stay",
    ]


def test_the_summary_is_printed_to_standard_output_or_to_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    group = group_of("mlp")
    group.summary()
    assert "H = 7 freedoms" in capsys.readouterr().out
    console = Console(file=io.StringIO())
    group.summary(console)
    assert isinstance(console.file, io.StringIO)
    assert "H = 7 freedoms" in console.file.getvalue()
    assert capsys.readouterr().out == ""


def test_other_exponents_are_shown() -> None:
    assert "3 0:3 0.weight 2.weight (c^-2)" in said(group_of("squared"))
    assert "3 0:3 0.weight (c^2) 2.weight" in said(group_of("rooted"))


def test_both_exponents_of_an_element_in_a_row_and_in_a_column_are_shown() -> None:
    """Hidden features that shrink as the embeddings grow, for the embeddings are the last layer too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(5, 3), nn.Linear(3, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.hidden(self.embedding(tokens)).relu(), self.embedding.weight)

    group = scaling_group(Tied(), torch.zeros(1, 2, dtype=torch.long))
    assert "3 0:3 embedding.weight hidden.weight (1/c, c^-2)" in said(group)
    assert group.describe(1) == (
        "Unit 1: c multiplies embedding.weight[:, 1]; 1/c multiplies hidden.weight[1], hidden.weight[:, 1], "
        "hidden.bias[1]"
    )


def test_a_parameter_of_which_parts_grow_and_others_shrink_is_on_both_sides() -> None:
    lines = said(group_of("packed attention"))
    # Queries and keys, four channels of two heads.
    assert "4 4:8 1.in_proj_weight 1.in_proj_weight" in lines
    # Values.
    assert "4 8:12 1.in_proj_weight 1.out_proj.weight" in lines


def test_parameters_that_the_call_did_not_use_are_named() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = mlp(2, 3, 2), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    text = "Parameters that the traced call never used: spare.weight, spare.bias"
    assert text in said(scaling_group(Spare(), torch.zeros(1, 2)))


def test_without_freedoms_there_is_no_table_of_units() -> None:
    assert said(scaling_group(nn.Linear(2, 2), torch.zeros(1, 2)))[0] == (
        "m = 6 parameters, H = 0 freedoms, m - H = 6 path coordinates"
    )


def test_names_are_not_markup() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterDict({"[red]": nn.Parameter(torch.ones(3, 2)), "b": torch.ones(2, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weights["[red]"]).relu(), self.weights["b"])

    console = Console(file=io.StringIO(), width=200)
    scaling_group(Named(), torch.zeros(1, 2)).summary(console)
    assert isinstance(console.file, io.StringIO)
    assert "weights.[red]" in console.file.getvalue()


def test_long_lists_of_names_are_cut() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.heads = nn.Linear(2, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([head(self.stem(x).relu()) for head in self.heads], 1)

    lines = said(scaling_group(Sum(), torch.zeros(1, 2)))
    assert "heads.3.weight" in lines
    assert "... 3 more" in lines


# When training starts -------------------------------------------------------------------------------------------------


def test_the_table_of_the_callback_is_the_summary_with_dormant_units(capsys: pytest.CaptureFixture[str]) -> None:
    net = mlp(64, 6, 5, 10)
    nn.init.zeros_(net[4].weight[:, 1])
    callback = EquivalentClassOptimization(verbose="table")
    fit(Classifier(net, example=EXAMPLE), callback)
    report = words(capsys.readouterr().out)
    assert "units numbers scaled by c scaled by 1/c dormant" in report
    assert "6 0:6 net.0.weight net.2.weight" in report
    assert "5 6:11 net.2.weight net.4.weight 1" in report
    assert callback.group is not None
    plain = said(callback.group)
    assert plain[0] in report
    assert [line for line in plain if line not in report] == [
        "units numbers scaled by c scaled by 1/c",
        "5 6:11 net.2.weight net.4.weight",
        f"m = {net_size(net):,} parameters, H = 11 freedoms, m - H = {net_size(net) - 11:,} path coordinates",
    ]


def net_size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


class GatedAndPlain(nn.Module):
    """A product of two layers of 4 units, and an MLP with 3 hidden units, one of them dormant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 10)
        self.mlp = mlp(64, 3, 10)
        nn.init.zeros_(self.mlp[2].weight[:, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() * self.b(x).relu()) + self.mlp(x)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("unit", "90.9% of the freedoms used, 1 units dormant Operations"),
        (
            "path",
            "18.2% of the freedoms used, 1 units dormant; 8 units in products or powers have no paths and are "
            "optimised in weight space Operations",
        ),
    ],
)
def test_units_in_products_are_not_dormant_under_the_rule_of_paths(
    rule: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Classifier(GatedAndPlain(), example=EXAMPLE), EquivalentClassOptimization(rule=rule, verbose="table"))
    assert expected in " ".join(capsys.readouterr().out.split())


def test_the_report_of_many_sets_is_cut_and_the_summary_is_not() -> None:
    group = scaling_group(mlp(2, *[2] * 30, 2), torch.zeros(1, 2))
    assert "12 6 more sets: group.summary()" in said(group, usable=torch.ones(60, dtype=torch.bool))
    assert "2 58:60 58.weight 60.weight" in said(group)
