"""Heat maps of a number per block over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_memopt.figures.style import LABEL, SMALL, STEPS, STRONG, finish

MAX_LABELS = 60
RANK = "rank of the momentum"
DENSE, NONE, ABSENT = math.inf, 0.0, math.nan
# Below rank 1 on the logarithmic scale of ranks, where 0 has no place.
_BELOW = 0.5
_PALE = "#dddddd"


def heat_map(
    ax: Any,
    steps: Sequence[int],
    table: Mapping[str, Sequence[float]],
    *,
    until: int | None = None,
    largest: float = 2.0,
    norm: Any = None,
    cmap: str = "viridis_r",
    label: str = RANK,
    title: str = "",
) -> None:
    """Draw a heat map with a row per block and a column per entry, as wide as the entry was in force.

    Args:
        ax: A matplotlib axis.
        steps: The first step of each entry.
        table: Block → its numbers, one per entry. NaN stays gray. Among ranks, 0 stands for no momentum (white), and
            infinity for dense momentum (orange).
        until: The last step of the last entry; None makes it as long as the average of the others.
        largest: At least this rank is on the color scale, which makes figures comparable.
        norm: The color normalization; None for the one for ranks, which is logarithmic.
        cmap: Name of a color map.
        label: Label of the color bar.
        title: The title.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not steps or not table:
        raise ValueError("There is nothing to draw yet: the metric or the callback has recorded no block.")
    from matplotlib import colormaps

    rows = [list(row) for row in table.values()]
    if until is not None and until <= steps[-1] and len(steps) > 1 and all(row[-1] == row[-2] for row in rows):
        steps, rows = steps[:-1], [row[:-1] for row in rows]  # a decision at the end that changed nothing
    numbers = [x for row in rows for x in row if x == x]
    shades = colormaps[cmap].with_extremes(bad=_PALE, under="white", over=STRONG)
    if len(numbers) < sum(map(len, rows)):
        label += " (gray: unknown)"
    ends: dict[float, str] = {}
    ranks = norm is None
    if ranks:
        from matplotlib.colors import LogNorm

        norm = LogNorm(1, max([largest, *(x for x in numbers if x < DENSE)]))
        ends = {end: name for end, name in ((NONE, "none"), (DENSE, "dense")) if end in numbers}
        rows = [[_BELOW if x == NONE else 2 * norm.vmax if x == DENSE else x for x in row] for row in rows]
    average = max(1, round((steps[-1] - steps[0]) / max(1, len(steps) - 1)))
    end = steps[-1] + average if until is None else max(until, steps[-1] + 1)
    finish(ax, title=title, x=STEPS, grid=False)
    mesh = ax.pcolormesh([*steps, end], range(len(rows) + 1), rows, norm=norm, cmap=shades)
    every = -(-len(rows) // MAX_LABELS)
    ax.set_yticks([row + 0.5 for row in range(0, len(rows), every)], list(table)[::every], fontsize=SMALL)
    ax.invert_yaxis()
    bar = _color_bar(ax, mesh, label, ends)
    if ranks:
        last = int(norm.vmax)
        ticks = [1, *(2**power for power in range(1, 16) if 1.4 * 2**power < last), last]
        bar.set_ticks(ticks, labels=list(map(str, ticks)), minor=False)
        bar.minorticks_off()


def _color_bar(ax: Any, mesh: Any, label: str, ends: Mapping[float, str]) -> Any:
    """Draw and return the color bar, with boxes for what is beyond the scale of ranks."""
    extend = {(): "neither", (NONE,): "min", (DENSE,): "max", (NONE, DENSE): "both"}[tuple(ends)]
    bar = ax.get_figure().colorbar(mesh, ax=ax, extend=extend, extendrect=True, extendfrac=0.08)
    bar.set_label(label, fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    for end, name in ends.items():
        place = 1.045 if end == DENSE else -0.045  # the middle of the box
        bar.ax.text(1.6, place, name, transform=bar.ax.transAxes, va="center", fontsize=SMALL)
    return bar


def figure_size(blocks: int) -> tuple[float, float]:
    """Return a size in inches at which the names of this many blocks are readable."""
    return 8.0, max(3.0, 1.4 + 0.2 * min(blocks, MAX_LABELS))
