"""The picture of a scaling group: which layers share which units, and what is held fixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_ecopt.common.plotting import pyplot
from lightning_ecopt.symmetry.advice import Reason, reason
from lightning_ecopt.symmetry.layers import Layer, Line

if TYPE_CHECKING:
    from lightning_ecopt.common.plotting import Axes, Picture

#: In inches, as the axes are: the height of a row, the length of a bar, the distance of two lanes.
ROW, BAR, LANE = 0.27, 2.1, 0.5
#: What is around the axes of a figure of its own: names to the left, the legend below.
LEFT, RIGHT, ABOVE, BELOW = 1.9, 0.2, 0.45, 0.3
FREE, UNUSED = "#1b7f79", "#eeeeee"
ALIKE: Reason = "what must scale alike, as in sums"
COLOURS: dict[Reason, str] = {
    "an end: input, output, loss": "#c9ced3",
    "a norm: its epsilon does not scale": "#f3cf83",
    "an activation that does not bend at zero": "#ee8f85",
    "softmax, exp, log or a loss": "#bba7db",
    ALIKE: "#a5cbe8",
    "an operation without a rule": "#b98f73",
    "on request, or by a check": "#f2a9c9",
}
#: Most letters of a text in a bar.
LONGEST = 30


def plot_layers(layers: Sequence[Layer], lines: Sequence[Line], title: str, ax: Axes | None) -> Picture:
    """Draw the map of the units: a row for each layer, a line for each set of units.

    Args:
        layers: the rows, from top to bottom.
        lines: of the units.
        title: above the picture.
        ax: where to draw; by default in a figure of its own.
    """
    plt = pyplot()
    lanes = 1 + max((line.lane for line in lines), default=-1)
    width, height = BAR + 0.35 + LANE * lanes, ROW * max(len(layers), 1)
    reasons = list(dict.fromkeys(why for layer in layers for why in _reasons(layer)))
    if ax is None:
        below = BELOW + 0.2 * (len(reasons) + 3)
        size = (max(LEFT + width + RIGHT, 5.5), ABOVE + height + below)
        figure = plt.figure(figsize=size)
        ax = figure.add_axes((LEFT / size[0], below / size[1], width / size[0], height / size[1]))
    for row, layer in enumerate(layers):
        _draw_bar(ax, row, layer)
    for line in lines:
        _draw_line(ax, line)
    ax.set(xlim=(0, width), ylim=(max(len(layers), 1) - 0.5, -0.5), xticks=[])
    ax.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9, loc="left")
    for side in ax.spines.values():
        side.set_visible(False)
    _add_legend(ax, reasons, lines)
    return ax.figure, ax  # type: ignore[return-value]  # no subfigure


def _reasons(layer: Layer) -> list[Reason]:
    """Why values of a layer are held fixed."""
    is_met = layer.is_used and not layer.free and not layer.held
    return [ALIKE] if is_met else [reason(operation) for operation in layer.held]


def _draw_bar(ax: Any, row: int, layer: Layer) -> None:
    """Draw which of the values that a layer leads into are free, and which are held, by what."""
    parts = [(FREE, "white", layer.free, f"{layer.free:,} free")] if layer.free else []
    by: dict[Reason, Counter[str]] = {}
    for operation, count in layer.held.items():
        by.setdefault(reason(operation), Counter())[operation.name] += count
    parts += [(COLOURS[why], "black", sum(of.values()), _held_text(of)) for why, of in by.items()]
    if not parts:
        text = "held: meets fixed values" if layer.is_used else "not used by the traced call"
        parts = [(COLOURS[ALIKE] if layer.is_used else UNUSED, "black", 1, text)]
    total, start = sum(count for _, _, count, _ in parts), 0.0
    for colour, ink, count, text in parts:
        length = BAR * count / total
        ax.barh(row, length, left=start, height=0.72, color=colour)
        if len(text) * 0.065 < length:
            ax.text(start + 0.06, row, text, color=ink, fontsize=7, va="center")
        start += length


def _held_text(operations: Counter[str]) -> str:
    text = f"{sum(operations.values()):,} held: {', '.join(operations)}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _draw_line(ax: Any, line: Line) -> None:
    """Draw which layers share some units."""
    x = BAR + 0.35 + LANE * line.lane
    ax.plot([x, x], [line.rows[0], line.rows[-1]], color=FREE, linewidth=1.6, zorder=2)
    for rows, face in ((line.into - line.out_of, FREE), (line.out_of, "white")):
        ax.plot([x] * len(rows), sorted(rows), "o", color=FREE, markerfacecolor=face, markersize=6, zorder=3)
    both = line.into & line.out_of
    ax.plot([x] * len(both), sorted(both), "o", color=FREE, markersize=2.5, zorder=4)
    middle = (line.rows[0] + line.rows[-1]) / 2
    ax.text(x + 0.08, middle, f"{line.size:,}", color=FREE, fontsize=7, va="center", zorder=5)


def _add_legend(ax: Any, reasons: Sequence[Reason], lines: Sequence[Line]) -> None:
    """Say below the axes what marks and colours mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(face: str, size: float = 6) -> Line2D:
        return Line2D([], [], color=FREE, marker="o", markerfacecolor=face, markersize=size, linewidth=0)

    entries: list[tuple[Any, str]] = []
    if lines:
        entries += [(mark(FREE), "units: c multiplies the layer"), (mark("white"), "1/c multiplies the layer")]
    if any(line.into & line.out_of for line in lines):
        entries.append(((mark("white"), mark(FREE, 2.5)), "c one part of it, 1/c another, as queries and keys"))
    entries += [(Patch(color=COLOURS[why]), f"held fixed: {why}") for why in reasons]
    if entries:
        handles, texts = zip(*entries, strict=True)
        ax.legend(handles, texts, loc="upper left", bbox_to_anchor=(0, -0.01), fontsize=8, frameon=False)
