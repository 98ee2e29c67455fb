"""What tells a person the freedoms of a network: tables, or one line and what could be done about lost freedoms.

``rich`` is imported only when a table is printed: training needs none of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ecopt.symmetry.advice import advice, is_possible
from lightning_ecopt.symmetry.describe import UnitSet, power, runs
from lightning_ecopt.symmetry.scales import Operation

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

#: Most rows of the table of units when training starts; ``group.summary()`` shows all.
MAX_ROWS = 24
#: Most names in one cell.
MAX_NAMES = 4
#: Most sets of units whose sizes are written one by one, most lines about lost freedoms, and most places in each.
MAX_SIZES, MAX_LOSSES, MAX_PLACES = 4, 3, 2


@dataclass(frozen=True, eq=False)
class Overview:
    """What a report says of a scaling group.

    Args:
        num_parameters: number of scalar parameters m.
        sets: the units, sorted into sets.
        costs: for each operation that fixed scales, how many of them would otherwise have been free.
        unseen: names of parameters that the traced call did not use.
        simple: ``bool[H]``, units in no product or power.
        usable: ``bool[H]``, units whose freedom training uses; ``None`` if the report is not about training.
        needs_paths: whether training goes by paths, which units in products or powers do not have.
        followers: copies of the weights that are rescaled with them, in words: ``target follows online``.
    """

    num_parameters: int
    sets: Sequence[UnitSet]
    costs: Mapping[Operation, int]
    unseen: Sequence[str]
    simple: Tensor
    usable: Tensor | None = None
    needs_paths: bool = False
    followers: Sequence[str] = ()

    @property
    def num_units(self) -> int:
        """Number of freedoms H."""
        return len(self.simple)

    @property
    def pathless(self) -> Tensor:
        """Units that training does not use because they have no paths, ``bool[H]``."""
        unused = torch.zeros_like(self.simple) if self.usable is None else ~self.usable
        return unused & ~self.simple & self.needs_paths

    @property
    def dormant(self) -> Tensor | None:
        """Units that training does not use although they may have paths, ``bool[H]``."""
        return None if self.usable is None else ~self.usable & ~self.pathless


def in_brief(overview: Overview, how_to_see_all: str) -> list[str]:
    """Say in one line how many freedoms there are, and in further ones what a user could do to have more of them.

    Args:
        overview: what to say.
        how_to_see_all: a call that prints the tables.

    Example::

        in_brief(group.overview(), "group.summary()")
        # ["8 freedoms in 2 layers",
        #  "net.3: gelu holds 16 scales fixed (another activation: ReLU, LeakyReLU, PReLU)"]
    """
    if not overview.num_units:
        return [
            f"no freedoms, steps stay plain; {how_to_see_all} says why",
            *_losses(overview.costs, how_to_see_all),
        ]
    sizes = [f"{len(units.units):,}" for units in overview.sets]
    count = " + ".join(sizes) if len(sizes) <= MAX_SIZES else f"{overview.num_units:,}"
    layers = {_layer(name) for units in overview.sets for name, _ in units.powers}
    text = f"{count} freedom{'s'[: overview.num_units > 1]} in {len(layers):,} layer{'s'[: len(layers) > 1]}"
    if overview.usable is not None:
        used = int(overview.usable.sum())
        text += ", all used" if used == overview.num_units else f", {used:,} of them used"
    lines = [text, *_losses(overview.costs, how_to_see_all)]
    if overview.followers:
        lines.append(_following(overview.followers))
    return lines


def _layer(parameter: str) -> str:
    """The module that has a parameter, parametrized or not; the parameter itself if that is the network."""
    plain = re.sub(r"(^|\.)parametrizations\.([^.]+)\..*", r"\1\2", parameter)
    return plain.rpartition(".")[0] or plain


def _losses(costs: Mapping[Operation, int], how_to_see_all: str) -> list[str]:
    """Name what has cost freedoms and could be changed: where, the operation, what could be done; most scales first."""
    losses = [loss for loss in _alike(costs) if is_possible(loss.todo)]
    losses.sort(key=lambda loss: -loss.count)
    lines = [
        f"{_listed(loss.modules, MAX_PLACES)}: {loss.names[0]} holds {loss.count:,} scales fixed ({loss.todo})"
        for loss in losses[:MAX_LOSSES]
    ]
    if losses[MAX_LOSSES:]:
        lines.append(f"{len(losses) - MAX_LOSSES} more operations hold scales fixed: {how_to_see_all}")
    return lines


def _listed(names: Sequence[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def _following(followers: Sequence[str]) -> str:
    return "Rescaled with what it follows: " + _shortened(followers, ", ")


def print_report(overview: Overview, console: Console | None = None) -> None:
    """Print the units of a network, the dimensions of its equivalent-class space and what cost freedoms.

    Args:
        overview: what to say.
        console: where to print; by default standard output.
    """
    from rich import console as rich_console

    (console or rich_console.Console()).print(rich_console.Group(*_parts(overview)))


def html_report(overview: Overview) -> str:
    """Return the same parts as HTML: what a notebook shows of a group."""
    from rich.table import Table
    from rich.text import Text

    parts = []
    for part in _parts(overview):
        if isinstance(part, Table):
            parts.append(_html_table(part))
        elif isinstance(part, Text):
            parts.append(f"<p>{escape(part.plain)}</p>")
    return f"<div>{''.join(parts)}</div>"


def _html_table(table: Table) -> str:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    rows = [[str(column.header) for column in table.columns], *zip(*columns, strict=True)]
    cells = (
        "".join(f"<{kind} style='text-align: left'>{escape(cell).replace(chr(10), '<br>')}</{kind}>" for cell in row)
        for kind, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    )
    return f"<table><caption>{escape(str(table.title))}</caption>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _parts(overview: Overview) -> list[RenderableType]:
    """Make the parts of the report, from top to bottom."""
    from rich.text import Text

    parts: list[RenderableType] = [Text(_dimensions(overview))]
    if overview.num_units:
        parts.insert(0, _units_table(overview.sets, overview.dormant))
    if overview.followers:
        parts.append(Text(_following(overview.followers)))
    if overview.unseen:
        parts.append(Text(f"Parameters that the traced call never used: {_shortened(overview.unseen, ', ')}"))
    if overview.costs:
        parts.append(_costs_table(overview.costs))
    return parts


def _dimensions(overview: Overview) -> str:
    """Say in one line how many parameters, freedoms and path coordinates there are, and how many freedoms are used."""
    m, num_units = overview.num_parameters, overview.num_units
    text = f"m = {m:,} parameters, H = {num_units:,} freedoms, m - H = {m - num_units:,} path coordinates"
    if overview.usable is None or overview.dormant is None:
        return text
    share = f"{1 - (~overview.usable).double().mean():.1%}" if num_units else "none"
    text += f"; {share} of the freedoms used, {int(overview.dormant.sum()):,} units dormant"
    if overview.pathless.any():
        count = int(overview.pathless.sum())
        text += f"; {count:,} units in products or powers have no paths and are optimised in weight space"
    return text


def _units_table(sets: Sequence[UnitSet], dormant: Tensor | None) -> Table:
    """Make the table of units, one row for each set; limited to ``MAX_ROWS`` when training starts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Freedoms of the network", title_justify="left")
    table.add_column("units", justify="right")
    table.add_column("numbers", overflow="fold")
    table.add_column("scaled by c", overflow="fold")
    table.add_column("scaled by 1/c", overflow="fold")
    if dormant is not None:
        table.add_column("dormant", justify="right")
    shown = sets if dormant is None else sets[:MAX_ROWS]
    for units in shown:
        row = [str(len(units.units)), _shortened(runs(units.units.tolist())), _side(units, 1), _side(units, -1)]
        if dormant is not None:
            row.append(str(int(dormant[units.units].sum()) or ""))
        table.add_row(*(Text(cell) for cell in row))  # plain text: in markup, brackets in names would be tags
    rest = sets[len(shown) :]
    if rest:
        table.add_row(str(sum(len(units.units) for units in rest)), "", f"{len(rest)} more sets: group.summary()")
    return table


def _side(units: UnitSet, sign: int) -> str:
    """List the parameters that are multiplied by ``c`` (sign 1) or ``1/c`` (sign -1), or other powers of that sign."""
    powers: dict[str, list[float]] = {}
    for name, exponent in units.powers:
        if exponent * sign > 0:
            powers.setdefault(name, []).append(exponent)
    return _shortened([name if p == [sign] else f"{name} ({', '.join(map(power, p))})" for name, p in powers.items()])


@dataclass(frozen=True)
class _Loss:
    """What operations of one kind have cost.

    Args:
        names: ATen names of the operations, which differ in what stands in brackets: ``output['a']``, ``output['b']``.
        modules: where they were called.
        count: how many scales they have fixed.
        todo: what could be done.
    """

    names: Sequence[str]
    modules: Sequence[str]
    count: int
    todo: str


def _alike(costs: Mapping[Operation, int]) -> list[_Loss]:
    """Put together operations with one ATen name, and parts of the output alike."""
    alike: dict[str, list[Operation]] = {}
    for operation in costs:
        alike.setdefault(re.sub(r"\[\d+\]", "[]", operation.name), []).append(operation)
    return [
        _Loss(
            list(dict.fromkeys(operation.name for operation in operations)),
            list(dict.fromkeys(operation.module or "(top level)" for operation in operations)),
            sum(costs[one] for one in operations),
            advice(operations[0].name, [operation.module for operation in operations]),
        )
        for operations in alike.values()
    ]


def _costs_table(costs: Mapping[Operation, int]) -> Table:
    """Make the table of operations that fix scales; first those about which something could be done."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Operations that fix scales", title_justify="left")
    table.add_column("module or line", overflow="fold")
    table.add_column("operation", overflow="fold")
    table.add_column("scales", justify="right")
    table.add_column("what could be done", overflow="fold")
    for loss in sorted(_alike(costs), key=lambda loss: not is_possible(loss.todo)):
        table.add_row(Text(_shortened(loss.modules)), Text(_shortened(loss.names)), f"{loss.count:,}", Text(loss.todo))
    return table


def _shortened(names: Sequence[str], separator: str = "\n") -> str:
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        shown.append(f"... {len(names) - MAX_NAMES} more")
    return separator.join(shown)
