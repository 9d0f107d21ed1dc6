"""Heat maps of a number per block over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_LABELS = 60
RANK = "rank of the momentum\n(white: none)"


def heat_map(
    ax: Any,
    steps: Sequence[int],
    table: Mapping[str, Sequence[float]],
    *,
    until: int | None = None,
    norm: Any = None,
    colours: str = "viridis_r",
    label: str = RANK,
) -> None:
    """Draw a heat map with a row per block and a column per entry, as wide as the entry was in force.

    Args:
        ax: A matplotlib axis.
        steps: The first step of each entry.
        table: Block → its numbers, one per entry. NaN stays white.
        until: The last step of the last entry; None makes it as long as the average of the others.
        norm: The color normalization; None for the one for ranks: logarithmic, with white for rank 0.
        colours: Name of a color map.
        label: Label of the color bar.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not steps or not table:
        raise ValueError("There is nothing to draw yet: the metric or the callback has recorded no block.")
    from matplotlib.colors import LogNorm

    ranks = norm is None
    if ranks:
        table = {name: [x if x > 0 else float("nan") for x in row] for name, row in table.items()}
        numbers = [x for row in table.values() for x in row if x == x]
        norm = LogNorm(1, max(2.0, *numbers, 0.0))
    average = max(1, round((steps[-1] - steps[0]) / max(1, len(steps) - 1)))
    end = steps[-1] + average if until is None else max(until, steps[-1] + 1)
    names, rows = list(table), list(table.values())
    mesh = ax.pcolormesh([*steps, end], range(len(names) + 1), rows, norm=norm, cmap=colours)
    every = -(-len(names) // MAX_LABELS)
    ax.set_yticks([row + 0.5 for row in range(0, len(names), every)], names[::every], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("step")
    bar = ax.get_figure().colorbar(mesh, ax=ax, label=label)
    if ranks:
        largest = int(norm.vmax)
        ticks = sorted({1, *(2**power for power in range(12) if 2**power < largest), largest})
        bar.set_ticks(ticks, labels=list(map(str, ticks)), minor=False)
        bar.minorticks_off()


def figure_size(blocks: int) -> tuple[float, float]:
    """Return a size in inches at which the names of this many blocks are readable."""
    return 8.0, max(2.8, 1.2 + 0.2 * min(blocks, MAX_LABELS))
