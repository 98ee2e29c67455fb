"""What a person is told about the freedoms of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_ecopt.symmetry import ScalingGroup, UnitSet
from lightning_ecopt.symmetry.describe import power, runs
from lightning_ecopt.symmetry.equations import Operation

MAX_ROWS = 24
MAX_NAMES = 4


def print_report(
    group: ScalingGroup, console: Console | None = None, *, usable: Tensor | None = None, rule: str = "unit"
) -> None:
    """Print the units of a network, the dimensions of its equivalent-class space and what cost freedoms.

    Args:
        group: the scaling group.
        console: where to print; by default standard output.
        usable: ``bool[H]``, when training starts: units whose freedom is used; the others are dormant, or shared by
            optimizers. The rows of the table are limited then.
        rule: the rule of training; ``"path"`` has no paths for units in products or powers.
    """
    (console or Console()).print(render_report(group, usable, rule))


def render_report(group: ScalingGroup, usable: Tensor | None = None, rule: str = "unit") -> RenderableType:
    """The report as something that rich can print."""
    dormant = None if usable is None else ~usable.cpu()
    dimensions = (
        f"m = {group.num_parameters:,} parameters, H = {group.num_units:,} freedoms, m - H = {group.dimension:,} path "
        "coordinates"
    )
    if dormant is not None:
        share = f"{1 - dormant.double().mean():.1%}" if group.num_units else "none"
        pathless = dormant & ~group.monomials.simple & (rule == "path")
        dormant &= ~pathless
        dimensions += f"; {share} of the freedoms used, {int(dormant.sum()):,} units dormant"
        if pathless.any():
            dimensions += (
                f"; {int(pathless.sum()):,} units in products or powers have no paths and are optimised in weight space"
            )
    parts: list[RenderableType] = [Text(dimensions)]
    if group.num_units:
        parts.insert(0, _units_table(group.unit_sets(), dormant))
    if group.unseen:
        parts.append(Text(f"Parameters that the traced call never used: {_shortened(group.unseen, ', ')}"))
    if group.costs:
        parts.append(_costs_table(group.costs))
    return Group(*parts)


def _units_table(sets: Sequence[UnitSet], dormant: Tensor | None) -> Table:
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
        table.add_row(*(Text(cell) for cell in row))  # not as markup: a name may have brackets
    rest = sets[len(shown) :]
    if rest:
        table.add_row(str(sum(len(units.units) for units in rest)), "", f"{len(rest)} more sets: group.summary()")
    return table


def _side(units: UnitSet, sign: int) -> str:
    """What is multiplied by ``c`` (1) or by ``1/c`` (-1), or by other powers of the same sign."""
    powers: dict[str, list[float]] = {}
    for name, exponent in units.powers:
        if exponent * sign > 0:
            powers.setdefault(name, []).append(exponent)
    return _shortened([name if p == [sign] else f"{name} ({', '.join(map(power, p))})" for name, p in powers.items()])


def _costs_table(costs: Mapping[Operation, int]) -> Table:
    table = Table(title="Operations that fix scales", title_justify="left")
    table.add_column("operation", overflow="fold")
    table.add_column("module", overflow="fold")
    table.add_column("scales", justify="right")
    by_name: dict[str, list[tuple[str, int]]] = {}
    for operation, count in costs.items():
        by_name.setdefault(operation.name, []).append((operation.module, count))
    for name, places in by_name.items():
        modules = list(dict.fromkeys(module or "(top level)" for module, _ in places))
        table.add_row(name, Text(_shortened(modules)), str(sum(count for _, count in places)))
    return table


def _shortened(names: Sequence[str], separator: str = "\n") -> str:
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        shown.append(f"... {len(names) - MAX_NAMES} more")
    return separator.join(shown)
