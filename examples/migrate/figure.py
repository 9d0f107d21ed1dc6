"""Draws the losses of a run that is continued in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_memopt.figures.style import COLORS, DPI, REFERENCE, SMALL, STEPS, STRONG, finish, new_figure

WINDOW = 10  # steps that the strong lines average
CLOSE = 40  # steps on both sides of the switch
DASHES = (0, (2.5, 2.5))  # of all but the reference: where runs agree, it is seen between the dashes


def draw(path: Path, before: Sequence[float], after: Mapping[str, Sequence[float]]) -> None:
    """Save a figure of the whole run, and of the steps around the switch.

    Args:
        path: The image's path; its folder is created.
        before: The losses of the steps until the switch.
        after: Name → losses of the steps after it. The first one is the reference.
    """
    figure = new_figure(9.0, 3.6)
    whole, close = figure.subplots(1, 2)
    switch = len(before)
    for ax in (whole, close):
        ax.axvline(switch, color=STRONG, linewidth=1, linestyle=":", label="switch")
        _line(ax, before, color=REFERENCE)
        for (name, losses), color in zip(after.items(), (REFERENCE, *COLORS), strict=False):
            _line(ax, [*before, *losses], first=switch - 1, color=color, label=name)
    finish(whole, title="The whole run", x=STEPS, y="training loss (nats per token)")
    finish(close, title="Around the switch", x=STEPS)
    around = [*before[-CLOSE:], *(loss for losses in after.values() for loss in losses[:CLOSE])]
    end = switch + max(map(len, after.values()))
    close.set_xlim(max(1, switch - CLOSE), min(end, switch + CLOSE))
    close.set_ylim(min(around) - 0.05, max(around) + 0.05)
    whole.legend(fontsize=SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _line(ax: Any, losses: Sequence[float], *, first: int = 0, color: str, label: str | None = None) -> None:
    """Draw the losses from the step ``first`` on palely, and the average of each and those before it strongly."""
    style = "solid" if color == REFERENCE else DASHES
    steps = range(first + 1, len(losses) + 1)
    ax.plot(steps, losses[first:], color=color, linewidth=0.6, alpha=0.3)
    averages = [mean(losses[max(0, step - WINDOW) : step]) for step in steps]
    ax.plot(steps, averages, color=color, linestyle=style, label=label)


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
