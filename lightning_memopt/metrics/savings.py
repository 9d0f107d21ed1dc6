"""The fraction of AdamW's state that is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.figures.style import COLORS, REFERENCE, SMALL, finish
from lightning_memopt.memory.sizes import format_share
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.metrics.base import Axes, SnapshotMetric, checked, no_state

# Names of the results, in figures.
LABELS = {"saved": "all state", "saved_momentum": "momentum", "saved_second_moment": "second moment"}


def memory_savings(snapshot: Snapshot) -> dict[str, float]:
    """Return the fractions of AdamW's state that one process saves.

    AdamW keeps two numbers per element of every parameter that trains, in the dtype of the parameter. Step counters are
    excluded on both sides. Bytes are those of the state's storages. A fraction is negative if they exceed AdamW's.

    Args:
        snapshot: A snapshot of this process.

    Returns:
        Fractions by name.

        - ``saved``: 1 − state / AdamW's state. Step counters are left out.
        - ``saved_momentum``: The same for momentum, projections included.
        - ``saved_second_moment``: The same for second moments.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 256)
        >>> savings = memory_savings(lm.AdaPMLean(model.named_parameters()).snapshot())
        >>> {name: round(fraction, 4) for name, fraction in savings.items()}
        {'saved': 0.9257, 'saved_momentum': 0.8912, 'saved_second_moment': 0.9603}
    """
    return _fractions(_sizes(snapshot))


class MemorySavings(SnapshotMetric):
    """Fractions of AdamW's state on the same parameters that are saved.

    As :func:`memory_savings`, but for the total bytes of all processes.

    Args:
        **kwargs: As in ``torchmetrics.Metric``.

    Example:
        >>> import torch, lightning_memopt as lm
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 256)
        >>> metric = MemorySavings()
        >>> metric.update(lm.MemOpt(model.named_parameters(), recipe="adamw").snapshot())
        >>> float(metric.compute()["saved"])
        0.0
    """

    higher_is_better = True
    shares = True

    sizes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sizes", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, snapshot: Snapshot) -> None:
        """Replace the last snapshot.

        Raises:
            ValueError: If there is no state, or the snapshot is from a job of another size.
        """
        self.sizes = torch.tensor(_sizes(checked(snapshot)), device=self.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the fractions by name.

        Raises:
            ValueError: If no process has any state.
        """
        if not self.sizes[2]:
            raise no_state("on any process")
        fractions = _fractions(self.sizes.tolist())
        return {name: torch.tensor(x, device=self.device) for name, x in fractions.items()}

    def _draw(self, val: Mapping[str, Tensor], ax: Axes) -> None:
        """Draw the fractions as bars."""
        finish(ax, title="Saved, compared with AdamW", x="share of AdamW's state", grid=False)
        shares = list(map(float, val.values()))
        drawn = ax.barh([LABELS[name] for name in val], shares, color=COLORS[2])
        ax.bar_label(drawn, list(map(format_share, shares)), padding=3, fontsize=SMALL)
        ax.set_xlim(1.25 * min(0.0, *shares), 1.15)
        ax.xaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        ax.axvline(1, color=REFERENCE, linestyle="dashed", linewidth=1)
        ax.invert_yaxis()


def _sizes(snapshot: Snapshot) -> list[int]:
    """Return local bytes of momentum, second moments, all state, and AdamW's state."""
    local = [block.local for block in snapshot.blocks]
    return [
        sum(entry.momentum + entry.projections for entry in local),
        sum(entry.second_moment for entry in local),
        sum(entry.total for entry in local),
        sum(block.local_adamw_bytes for block in snapshot.blocks if not block.pending),
    ]


def _fractions(sizes: Sequence[int]) -> dict[str, float]:
    momentum, second_moment, state, adamw = sizes
    if not adamw:
        return {"saved": 0.0, "saved_momentum": 0.0, "saved_second_moment": 0.0}
    return {
        "saved": 1 - state / adamw,
        "saved_momentum": 1 - 2 * momentum / adamw,
        "saved_second_moment": 1 - 2 * second_moment / adamw,
    }
