"""Base class of the metrics, and checks of snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_memopt.figures.style import COLORS, SMALL, byte_ticks, finish
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.sharding.consensus import world_size

Axes = Any  # matplotlib's Axes; matplotlib is imported only to draw


class SnapshotMetric(Metric):
    """Base class of metrics that hold the last snapshot."""

    is_differentiable = False
    # Otherwise, forward() would add up the states of two calls.
    full_state_update = True
    # The keys to draw for several results; all keys if empty.
    lines: tuple[str, ...] = ()
    # Whether results are shares of AdamW's state, not bytes.
    shares = False

    def plot(
        self,
        val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        ax: Axes | None = None,
    ) -> tuple[Any, Axes]:
        """Draw one result, or several over time.

        Args:
            val: A result of ``compute`` or ``forward``, or a list of such results; None computes it.
            ax: A matplotlib axis to draw on; None creates a figure.

        Returns:
            Figure and axis.
        """
        val = self.compute() if val is None else val
        draw: Any = self._draw if isinstance(val, Mapping) else self._draw_lines
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(layout="constrained")
        draw(val, ax)
        return ax.get_figure(), ax

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw one result."""
        raise NotImplementedError

    def _draw_lines(self, results: Sequence[Mapping[str, Tensor]], ax: Axes) -> None:
        """Draw several results, one line per number."""
        for color, key in zip(cycle(COLORS), self.lines or results[0], strict=False):
            label = key.replace("_", " ")
            ax.plot([float(entry[key]) for entry in results], "o-", color=color, markersize=4, label=label)
        finish(ax, title=type(self).__name__, x="measurement", y="share of AdamW's state" if self.shares else "memory")
        ax.set_xticks(range(len(results)))
        if self.shares:
            ax.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        else:
            byte_ticks(ax)
        ax.legend(fontsize=SMALL)


def checked(snapshot: Snapshot, *, state: bool = True) -> Snapshot:
    """Return the snapshot after checking that a metric can use it.

    Args:
        snapshot: The snapshot.
        state: Whether the snapshot must have state, if the job has one process.

    Raises:
        TypeError: If it is not a Snapshot.
        ValueError: If it is from a job of another size, or has no state.
    """
    if not isinstance(snapshot, Snapshot):
        raise TypeError(
            f"A metric is updated with a Snapshot, got {type(snapshot).__name__}: take one with "
            "`optimizer.snapshot()`, or for any optimizer with `lightning_memopt.take_snapshot(optimizer, model)`."
        )
    if snapshot.world_size != world_size():
        raise ValueError(
            f"The snapshot was taken in a job of {snapshot.world_size} processes, but this one has {world_size()}: its "
            "local bytes are those of one rank there. Take a new one here, or use the metric's function, which accepts "
            "any snapshot."
        )
    if state and not snapshot.has_state and snapshot.world_size == 1:
        raise no_state(f"in the {len(snapshot.blocks)} blocks of the snapshot")
    return snapshot


def no_state(where: str) -> ValueError:
    """Return the error for a snapshot without state. One process of several may hold no state of its own."""
    return ValueError(
        f"There is no optimizer state to measure {where}. Most of torch's optimizers create state in the first step: "
        "take the snapshot after it. An optimizer without state, such as SGD without momentum, has nothing to measure."
    )
