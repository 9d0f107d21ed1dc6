"""Pictures of how the allocation of momentum developed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_memopt._registry import unknown

TITLES = {
    "rank": "rank of the momentum (white: none)",
    "oscillation": "cosine between gradients and the average of those before",
    "residual": "share of the full momentum's energy that is not kept",
}
MAX_LABELS = 60


def allocation_figure(history: Sequence[Mapping[str, Any]], value: str = "rank") -> Any:
    """Return a matplotlib figure: a row per block, a column per decision, as wide as it was in force.

    Args:
        history: That of :class:`~lightning_memopt.AdaptiveMomentum`.
        value: ``rank``, ``oscillation`` or ``residual``.

    Raises:
        ValueError: If there is nothing to draw, or no such value.
    """
    if value not in TITLES:
        raise ValueError(unknown("value to plot", value, list(TITLES)))
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    key = "ranks" if value == "rank" else value
    entries = [entry for entry in history if entry[key]]
    if not entries:
        raise ValueError(f"There is no {value} to plot yet: no decision has been taken.")
    names = list(dict.fromkeys(name for entry in entries for name in entry[key]))
    table = [[float(entry[key].get(name, float("nan"))) for entry in entries] for name in names]
    steps = [entry["step"] for entry in entries]
    width = max(1, round((steps[-1] - steps[0]) / max(1, len(steps) - 1)))
    figure = Figure(figsize=(8, max(2.5, 1.2 + 0.2 * min(len(names), MAX_LABELS))), layout="constrained")
    axes = figure.add_subplot()
    numbers = [x for row in table for x in row if x == x]
    norm: Normalize
    if value == "rank":
        table = [[x if x > 0 else float("nan") for x in row] for row in table]
        norm, colours = LogNorm(1, max(2.0, *numbers)), "viridis_r"
    elif value == "residual":
        norm, colours = Normalize(0, 1), "viridis_r"
    else:
        limit = max(map(abs, numbers)) or 1.0
        norm, colours = Normalize(-limit, limit), "coolwarm_r"
    mesh = axes.pcolormesh([*steps, steps[-1] + width], range(len(names) + 1), table, norm=norm, cmap=colours)
    every = -(-len(names) // MAX_LABELS)
    axes.set_yticks([row + 0.5 for row in range(0, len(names), every)], names[::every], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("step of the optimizer")
    bar = figure.colorbar(mesh, label=TITLES[value])
    if value == "rank":
        ticks = sorted({1, *(2**power for power in range(12) if 2**power < max(numbers)), int(max(2.0, *numbers))})
        bar.set_ticks(ticks, labels=list(map(str, ticks)), minor=False)
        bar.minorticks_off()
    return figure


def add_figure(trainer: Trainer, name: str, draw: Callable[[], Any]) -> None:
    """Write a figure as PNG into the log directory, or the root directory, and into loggers that take figures.

    All ranks call this; the first one draws.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # ranks agree on it in a collective
    if not trainer.is_global_zero:
        return
    figure = draw()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(f"memopt/{name}", figure, global_step=trainer.global_step)
