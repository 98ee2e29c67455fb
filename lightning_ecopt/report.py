"""What a person is told about the freedoms of a network."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.tracer import Operation

MAX_ROWS = 24
MAX_NAMES = 4


def print_report(group: ScalingGroup, usable: Tensor, console: Console | None = None) -> None:
    """Print the units of a network, the dimensions of its equivalent-class space and what cost freedoms.

    Args:
        group: the scaling group.
        usable: ``bool[H]``, units that are optimised in path coordinates; the others are dormant, or shared by
            optimizers.
        console: where to print; by default standard output.
    """
    (console or Console()).print(render_report(group, usable))


def render_report(group: ScalingGroup, usable: Tensor) -> RenderableType:
    """The report as something that rich can print."""
    parts: list[RenderableType] = [_units_table(group, usable.cpu()), _summary(group, usable)]
    if group.costs:
        parts.append(_costs_table(group.costs))
    return Group(*parts)


def _units_table(group: ScalingGroup, usable: Tensor) -> Table:
    table = Table(title="Freedoms of the network", title_justify="left")
    table.add_column("units", justify="right")
    table.add_column("scaled by c")
    table.add_column("scaled by 1/c")
    table.add_column("dormant", justify="right")
    sets = group.unit_sets()
    for units in sets[:MAX_ROWS]:
        dormant = int((~usable[units.units]).sum())
        table.add_row(str(len(units.units)), _names(units.incoming), _names(units.outgoing), str(dormant or ""))
    if len(sets) > MAX_ROWS:
        rest = sets[MAX_ROWS:]
        table.add_row(str(sum(len(units.units) for units in rest)), f"... {len(rest)} more sets", "", "")
    return table


def _summary(group: ScalingGroup, usable: Tensor) -> Text:
    used = int(usable.sum())
    share = f"{used / group.num_units:.1%}" if group.num_units else "none"
    return Text(
        f"m = {group.num_parameters:,} parameters, H = {group.num_units:,} freedoms, m - H = {group.dimension:,} path "
        f"coordinates; {share} of the freedoms used, {group.num_units - used:,} units dormant"
    )


def _costs_table(costs: Mapping[Operation, int]) -> Table:
    table = Table(title="Operations that fix scales", title_justify="left")
    table.add_column("operation")
    table.add_column("module")
    table.add_column("scales", justify="right")
    by_name: dict[str, list[tuple[str, int]]] = {}
    for operation, count in costs.items():
        by_name.setdefault(operation.name, []).append((operation.module, count))
    for name, places in by_name.items():
        modules = tuple(dict.fromkeys(module or "(top level)" for module, _ in places))
        table.add_row(name, _names(modules), str(sum(count for _, count in places)))
    return table


def _names(names: tuple[str, ...]) -> str:
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        shown.append(f"... {len(names) - MAX_NAMES} more")
    return "\n".join(shown)
