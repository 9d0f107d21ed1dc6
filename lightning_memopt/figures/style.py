"""One style for every figure: colors, sizes of text, labels and units."""

from __future__ import annotations

import math
from typing import Any

from lightning_memopt.memory.sizes import format_bytes

# Okabe and Ito's colors, which can be told apart with every kind of color vision. Yellow is too pale for a line.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#777777")
STRONG = "#D55E00"  # theirs as well, for what must stand out: a limit, dense momentum
REFERENCE = "black"  # AdamW
STEPS = "optimizer step"
DPI = 150
TITLE, LABEL, SMALL = 11, 10, 8


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches. No window belongs to it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(ax: Any, *, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Label a matplotlib axis, and give its text, ticks and grid the common style."""
    ax.set_title(title, fontsize=TITLE)
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=SMALL)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(alpha=0.3)


def byte_ticks(ax: Any) -> None:
    """Label the y axis in binary units, at powers of two or multiples of one."""
    axis = ax.yaxis
    if ax.get_yscale() == "linear":
        low, high = axis.get_view_interval()
        from matplotlib.ticker import MultipleLocator

        axis.set_major_locator(MultipleLocator(2 ** max(0, round(math.log2(max(1.0, high - low) / 5)))))
    axis.set_major_formatter(lambda value, position: f"{'-' if value < 0 else ''}{format_bytes(round(abs(value)))}")
