"""Bar charts of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_memopt.memory.sizes import format_bytes

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")


def bars(ax: Any, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw labeled horizontal bars on a matplotlib axis, with one color per group.

    Args:
        ax: The axis.
        groups: Group → label → bytes.
    """
    labels: list[str] = []
    sizes: list[float] = []
    colours: list[str] = []
    places: list[float] = []
    for position, (colour, table) in enumerate(zip(COLOURS, groups.values(), strict=False)):
        places += [len(labels) + row + position / 2 for row in range(len(table))]  # leave a gap between groups
        labels += list(table)
        sizes += list(table.values())
        colours += [colour] * len(table)
    largest = max(sizes, default=0.0)
    scale, unit = _unit(largest)
    drawn = ax.barh(places, [size / scale for size in sizes], color=colours)
    ax.bar_label(drawn, [format_bytes(round(size)) for size in sizes], padding=3, fontsize=8)
    ax.set_yticks(places, labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * largest / scale if largest else 1)
    ax.set_xlabel(unit)
    from matplotlib.patches import Patch

    shown = [(colour, name) for colour, (name, table) in zip(COLOURS, groups.items(), strict=False) if table]
    if len(shown) > 1:
        ax.legend(handles=[Patch(color=colour, label=name) for colour, name in shown], loc="lower right", fontsize=8)


def _unit(largest: float) -> tuple[float, str]:
    """Return the size and name of the unit for a chart whose largest bar has this many bytes."""
    unit = format_bytes(round(largest)).partition(" ")[2]
    return float(1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)), unit
