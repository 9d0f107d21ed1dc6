"""Figures of the allocation of momentum over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_memopt._registry import unknown
from lightning_memopt.metrics.heat_map import RANK, figure_size, heat_map

LABELS = {
    "rank": RANK,
    "oscillation": "cosine between gradients and the average of those before",
    "residual": "share of the full momentum's energy that is not kept",
}


def allocation_figure(history: Sequence[Mapping[str, Any]], value: str = "rank") -> Any:
    """Return a matplotlib figure with a row per block and a column per decision, as wide as the decision was in force.

    Args:
        history: The history of :class:`~lightning_memopt.AdaptiveMomentum`.
        value: ``rank``, ``oscillation`` or ``residual``.

    Raises:
        ValueError: If there is nothing to draw, or the value is unknown.
    """
    if value not in LABELS:
        raise ValueError(unknown("value to plot", value, list(LABELS)))
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    key = "ranks" if value == "rank" else value
    entries = [entry for entry in history if entry[key]]
    if not entries:
        raise ValueError(f"There is no {value} to plot yet: no decision has been taken.")
    names = dict.fromkeys(name for entry in entries for name in entry[key])
    table = {name: [float(entry[key].get(name, float("nan"))) for entry in entries] for name in names}
    norm, colours = None, "viridis_r"
    if value == "residual":
        norm = Normalize(0, 1)
    elif value == "oscillation":
        limit = max(abs(x) for row in table.values() for x in row if x == x) or 1.0
        norm, colours = Normalize(-limit, limit), "coolwarm_r"
    figure = Figure(figsize=figure_size(len(table)), layout="constrained")
    steps = [entry["step"] for entry in entries]
    heat_map(figure.add_subplot(), steps, table, norm=norm, colours=colours, label=LABELS[value])
    return figure


def add_figure(trainer: Trainer, name: str, draw: Callable[[], Any]) -> None:
    """Save a figure as PNG in the log directory, or the root directory, and in loggers that accept figures.

    All ranks must call this function. The first rank draws.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: call it on all ranks
    if not trainer.is_global_zero:
        return
    figure = draw()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(f"memopt/{name}", figure, global_step=trainer.global_step)
