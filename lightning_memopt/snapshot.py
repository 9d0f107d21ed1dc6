"""Frozen facts about an optimizer's blocks, which metrics, callbacks and tables read instead of live state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFacts:
    """What one block is and keeps. Bytes are over all ranks unless called local.

    Attributes:
        name: The parameter's name; with ``:role`` where the parameter holds several blocks.
        role: Its role.
        shape: Its global shape.
        momentum: Name of its momentum kind.
        rank: Rank of its momentum, where the kind has one.
        second_moment: Name of its second-moment kind.
        momentum_bytes: Bytes of its momentum state, projections included.
        second_moment_bytes: Bytes of its second-moment state.
        adamw_bytes: Bytes that ``torch.optim.AdamW`` would keep for it, in the dtype of the parameter.
        local_bytes: Bytes that this rank keeps for it.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    momentum: str
    rank: int | None
    second_moment: str
    momentum_bytes: int
    second_moment_bytes: int
    adamw_bytes: int
    local_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """The state of an optimizer, in numbers.

    Attributes:
        blocks: One entry per block.
        step: The largest number of steps any parameter has taken.
        counter_bytes: Bytes of the step counters, which AdamW has, too, and no total below includes.
        skipped: Steps that were skipped because of a non-finite gradient.
    """

    blocks: tuple[BlockFacts, ...]
    step: int = 0
    counter_bytes: int = 0
    skipped: int = 0

    @property
    def momentum_bytes(self) -> int:
        """Bytes of momentum, over all blocks and ranks."""
        return sum(block.momentum_bytes for block in self.blocks)

    @property
    def second_moment_bytes(self) -> int:
        """Bytes of second moments, over all blocks and ranks."""
        return sum(block.second_moment_bytes for block in self.blocks)

    @property
    def state_bytes(self) -> int:
        """Bytes of momentum and second moments, over all blocks and ranks."""
        return self.momentum_bytes + self.second_moment_bytes

    @property
    def adamw_bytes(self) -> int:
        """Bytes of the same parameters' state under ``torch.optim.AdamW``."""
        return sum(block.adamw_bytes for block in self.blocks)

    @property
    def local_bytes(self) -> int:
        """Bytes of momentum and second moments on this rank."""
        return sum(block.local_bytes for block in self.blocks)

    @property
    def saved(self) -> float:
        """Fraction of AdamW's state that is gone."""
        return 1 - self.state_bytes / self.adamw_bytes if self.adamw_bytes else 0.0

    def table(self) -> str:
        """Return a plain-text table of all blocks, with totals."""
        header = ("block", "role", "shape", "momentum", "second moment", "bytes", "AdamW bytes")
        rows = [
            (
                block.name,
                block.role,
                "×".join(map(str, block.shape)) or "1",
                block.momentum if block.rank is None else f"{block.momentum} r={block.rank}",
                block.second_moment,
                f"{block.momentum_bytes + block.second_moment_bytes:,}",
                f"{block.adamw_bytes:,}",
            )
            for block in self.blocks
        ]
        total = (f"{len(rows)} blocks", "", "", "", f"saved {self.saved:.1%}")
        return _align([header, *rows, (*total, f"{self.state_bytes:,}", f"{self.adamw_bytes:,}")])


def _align(rows: Iterable[tuple[str, ...]]) -> str:
    """Pad columns to equal width, numbers to the right, with rules below the header and above the totals."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = len(rows[0]) - 2

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.rjust(width) if column >= numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:-1]), rule, line(rows[-1])])
