"""Figures of the allocation of momentum over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_memopt._registry import unknown
from lightning_memopt.figures.heat_map import DENSE, RANK, figure_size, heat_map
from lightning_memopt.figures.style import DPI, new_figure

LABELS = {
    "rank": RANK,
    "oscillation": "cosine between gradients and\nthe average of those before",
    "residual": "share of the full momentum's\nenergy that is not kept",
}
TITLES = {
    "rank": "Momentum of every matrix",
    "oscillation": "Oscillation of every matrix's gradients",
    "residual": "Momentum that is missing in every matrix",
}


def allocation_figure(
    history: Sequence[Mapping[str, Any]], value: str = "rank", *, until: int | None = None, run: str = ""
) -> Any:
    """Return a matplotlib figure with a row per block and a column per decision, as wide as the decision was in force.

    Args:
        history: The history of :class:`~lightning_memopt.AdaptiveMomentum`.
        value: ``rank``, ``oscillation`` or ``residual``.
        until: The last step of the last decision; None makes it as long as the average of the others.
        run: What was trained, for the title.

    Raises:
        ValueError: If there is nothing to draw, or the value is unknown.
    """
    if value not in LABELS:
        raise ValueError(unknown("value to plot", value, list(LABELS)))
    from matplotlib.colors import Normalize

    key = "ranks" if value == "rank" else value
    entries = [entry for entry in history if entry[key]]
    if not entries:
        raise ValueError(f"There is no {value} to plot yet: no decision has been taken.")
    names = dict.fromkeys(name for entry in entries for name in entry[key])
    table = {name: [float(entry[key].get(name, float("nan"))) for entry in entries] for name in names}
    norm, cmap = None, "viridis_r"
    if value == "rank":
        for column, entry in enumerate(entries):
            for name in entry["dense"]:
                table[name][column] = DENSE
    elif value == "residual":
        norm = Normalize(0, 1)
    else:
        limit = max(abs(x) for row in table.values() for x in row if x == x) or 1.0
        norm, cmap = Normalize(-limit, limit), "coolwarm_r"
    figure = new_figure(*figure_size(len(table)))
    steps = [entry["step"] for entry in entries]
    title = "\n".join(filter(None, (TITLES[value], run)))
    look: dict[str, Any] = {"norm": norm, "cmap": cmap, "label": LABELS[value], "title": title}
    heat_map(figure.add_subplot(), steps, table, until=until, **look)
    return figure


def log_folder(trainer: Trainer) -> Path | None:
    """Return the log directory, or the root directory without a logger; None for a development run.

    All ranks must call this function.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
    return None if getattr(trainer, "fast_dev_run", False) else folder


def add_figure(trainer: Trainer, folder: Path, name: str, draw: Callable[[], Any]) -> None:
    """Draw a figure on the first rank, and save it as PNG in a folder, and in loggers that accept figures."""
    if not trainer.is_global_zero:
        return
    figure = draw()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=DPI)
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(f"memopt/{name}", figure, global_step=trainer.global_step)
