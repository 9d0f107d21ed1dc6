"""Figures of the memory per rank against the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_memopt.figures.style import COLORS, REFERENCE, SMALL, STRONG, TITLE, byte_ticks, finish, new_figure
from lightning_memopt.memory.sizes import format_bytes
from lightning_memopt.planner.memory_plan import ADAMW, MemoryPlan

# Lines of recipes may overlap, so they differ in more than color.
_STYLES = (("-", "o"), (":", "s"), ("-.", "^"), ("-", "D"), (":", "v"))


def sweep_figure(plans: Sequence[MemoryPlan]) -> Any:
    """Return a matplotlib figure of total and optimizer state per rank against the number of ranks, a line per recipe.

    Args:
        plans: The result of :func:`~lightning_memopt.planner.sweep_memory`.

    Raises:
        ValueError: If there are no plans.
        ImportError: If matplotlib is missing.
    """
    if not plans:
        raise ValueError("There is nothing to plot: plan for at least one number of ranks.")
    try:
        figure = new_figure(13, 5.5)
    except ImportError as error:
        raise ImportError("Plotting a sweep needs matplotlib: pip install matplotlib.") from error

    first = plans[0]
    whole, state = figure.subplots(1, 2)
    for names, look in _line_styles(plans).items():
        position = next(position for position, row in enumerate(first.rows) if row.recipe == names[0])
        rows = [plan.rows[position] for plan in plans]
        sizes = [plan.world_size for plan in plans]
        whole.plot(sizes, [row.total_bytes for row in rows], label="\n= ".join(names), markersize=4, **look)
        state.plot(sizes, [row.state_bytes for row in rows], markersize=4, **look)
    if first.gpu_memory is not None:
        label = f"{format_bytes(first.gpu_memory)} per device"
        whole.axhline(first.gpu_memory, color=STRONG, linewidth=2, label=label)
    for axes, title in ((whole, "All but activations"), (state, "Optimizer state")):
        _scale(axes, [plan.world_size for plan in plans])
        finish(axes, title=title, x="ranks", y="memory per rank")
    figure.suptitle(f"{first.model}: {first.parameters:,} parameters, {first.precision}", fontsize=TITLE)
    figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
    return figure


def _line_styles(plans: Sequence[MemoryPlan]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return line styles by groups of recipes. Recipes with the same memory at every size share a line."""
    same: dict[tuple[int, ...], list[str]] = {}
    for position, row in sorted(enumerate(plans[0].rows), key=lambda entry: -entry[1].state_bytes):
        same.setdefault(tuple(plan.rows[position].state_bytes for plan in plans), []).append(row.recipe)
    looks = {}
    for position, names in enumerate(same.values()):
        style, marker = _STYLES[position % len(_STYLES)]
        looks[tuple(names)] = {"color": COLORS[position % len(COLORS)], "linestyle": style, "marker": marker}
        if ADAMW in names:
            looks[tuple(names)] = {"color": REFERENCE, "linestyle": "--", "marker": "o"}
    return looks


def _scale(axes: Any, sizes: Sequence[int]) -> None:
    """Set both axes to logarithmic scale, with sizes in binary units."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    byte_ticks(axes)
