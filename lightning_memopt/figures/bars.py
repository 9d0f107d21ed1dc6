"""Bar charts of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_memopt.figures.style import COLORS, SMALL, finish
from lightning_memopt.memory.sizes import format_bytes


def bars(ax: Any, groups: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw labeled horizontal bars on a matplotlib axis, with one color per group.

    Args:
        ax: The axis.
        groups: Group → label → bytes.
        title: The title.
    """
    labels: list[str] = []
    sizes: list[float] = []
    colors: list[str] = []
    places: list[float] = []
    for position, (color, table) in enumerate(zip(COLORS, groups.values(), strict=False)):
        places += [len(labels) + row + position / 2 for row in range(len(table))]  # leave a gap between groups
        labels += list(table)
        sizes += list(table.values())
        colors += [color] * len(table)
    largest = max(sizes, default=0.0)
    scale, unit = _unit(largest)
    finish(ax, title=title, x=f"memory ({unit})", grid=False)
    drawn = ax.barh(places, [size / scale for size in sizes], color=colors)
    ax.bar_label(drawn, [format_bytes(round(size)) for size in sizes], padding=3, fontsize=SMALL)
    ax.set_yticks(places, labels, fontsize=SMALL)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * largest / scale if largest else 1)
    from matplotlib.patches import Patch

    shown = [(color, name) for color, (name, table) in zip(COLORS, groups.items(), strict=False) if table]
    if len(shown) > 1:
        handles = [Patch(color=color, label=name) for color, name in shown]
        ax.legend(handles=handles, loc="best", fontsize=SMALL)


def _unit(largest: float) -> tuple[float, str]:
    """Return the size and name of the unit for a chart whose largest bar has this many bytes."""
    unit = format_bytes(round(largest)).partition(" ")[2]
    return float(1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)), unit
