"""Immutable facts about an optimizer's blocks. Metrics, callbacks and tables read these instead of live state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_memopt.memory.sizes import format_share


@dataclass(frozen=True)
class PartBytes:
    """Bytes of optimizer state, by purpose.

    Attributes:
        momentum: Momentum, without projections.
        projections: Bases of the subspaces that the momentum is projected on.
        second_moment: Second moments.
        other: All other state of an optimizer, such as the extra bits of bfloat16 weights.
    """

    momentum: int = 0
    projections: int = 0
    second_moment: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.momentum + self.projections + self.second_moment + self.other


@dataclass(frozen=True)
class BlockFacts:
    """Facts about one block. Byte counts refer to the whole block, held once, unless they are called local.

    Attributes:
        name: The parameter's name, followed by ``:role`` if the parameter holds several blocks.
        role: Its role.
        shape: Its global shape.
        full_rank: Rank of an uncompressed momentum: the short side of the block as a matrix.
        momentum: Name of its momentum kind.
        rank: Rank of its momentum, if the kind has one.
        second_moment: Name of its second-moment kind.
        state: Bytes of its state.
        local: Bytes of the storages that hold this rank's part of the state, each counted once.
        adamw_bytes: Bytes that ``torch.optim.AdamW`` would keep for it, in the dtype of the parameter.
        local_adamw_bytes: Bytes that ``torch.optim.AdamW`` would keep for this rank's part of it.
        head_dim: Outputs per attention head, for queries and keys, if known.
        split: Which rows or columns of a fused parameter it is, as text; empty for a whole parameter.
        why: What decided its role, in a few words.
        max_update: Bound on every element of an update, in units of the learning rate; None if it is unbounded.
        pending: Whether the optimizer has not created its state yet, so that its saving is unknown.
        lr_multiplier: Its learning rate in units of that of its parameter group.
        weight_decay: Its weight decay; None if it is that of its parameter group.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    full_rank: int
    momentum: str
    rank: int | None
    second_moment: str
    state: PartBytes
    local: PartBytes
    adamw_bytes: int
    local_adamw_bytes: int
    head_dim: int | None = None
    split: str = ""
    why: str = ""
    max_update: float | None = None
    pending: bool = False
    lr_multiplier: float = 1.0
    weight_decay: float | None = None

    @property
    def rates(self) -> str:
        """How its rates differ from those of its parameter group, in words; empty if they do not."""
        lr = f"lr × {self.lr_multiplier:g}" if self.lr_multiplier != 1 else ""
        decay = f"decay {self.weight_decay:g}" if self.weight_decay is not None else ""
        return ", ".join(filter(None, (lr, decay)))

    @property
    def momentum_bytes(self) -> int:
        """Bytes of its momentum, projections included."""
        return self.state.momentum + self.state.projections

    @property
    def second_moment_bytes(self) -> int:
        """Bytes of its second moment."""
        return self.state.second_moment

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds for it."""
        return self.local.total


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of a model and of the process on this rank, in bytes. Each storage is counted once.

    Attributes:
        device: Where the parameters are. ``peak`` refers to this device.
        parameters: Bytes of parameters.
        gradients: Bytes of existing gradients, or with gradient release the most that existed at a time.
        buffers: Bytes of the modules' buffers.
        peak: Peak memory: on a GPU, of tensors (``torch.cuda.max_memory_allocated``); on a CPU, the resident set of
            the process, including the interpreter and libraries.
        unsharded: The most bytes at a time of units that FSDP2 has gathered, their gradients before these are reduced,
            and the buffers of both, in a step that was traced; 0 if none was.
        scratch: The most bytes at a time of temporaries of the optimizers' updates, in a step that was traced.
    """

    device: str
    parameters: int
    gradients: int
    buffers: int
    peak: int
    unsharded: int = 0
    scratch: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The state of an optimizer in numbers.

    Attributes:
        blocks: One entry per block.
        step: The largest number of steps that any parameter has taken.
        counter_bytes: Bytes of the step counters. AdamW keeps the same, and no total below includes them.
        skipped: Steps skipped because of a non-finite gradient.
        world_size: Number of processes in the job. A snapshot shows what one of them sees.
        memory: All memory besides the state; only if a module was given.
    """

    blocks: tuple[BlockFacts, ...]
    step: int = 0
    counter_bytes: int = 0
    skipped: int = 0
    world_size: int = 1
    memory: ProcessMemory | None = None

    @property
    def momentum_bytes(self) -> int:
        """Bytes of momentum of all blocks, projections included."""
        return sum(block.momentum_bytes for block in self.blocks)

    @property
    def second_moment_bytes(self) -> int:
        """Bytes of second moments of all blocks."""
        return sum(block.second_moment_bytes for block in self.blocks)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all blocks."""
        return sum(block.state.total for block in self.blocks)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of the same parameters' state under ``torch.optim.AdamW``."""
        return sum(block.adamw_bytes for block in self.blocks)

    @property
    def local_bytes(self) -> int:
        """Bytes of state on this rank."""
        return sum(block.local_bytes for block in self.blocks)

    @property
    def has_state(self) -> bool:
        """Whether any state exists."""
        return any(block.local_bytes or block.state.total for block in self.blocks)

    @property
    def saved(self) -> float:
        """Fraction of AdamW's state that is saved, over the blocks that are not pending."""
        adamw = sum(block.adamw_bytes for block in self.blocks if not block.pending)
        return 1 - self.state_bytes / adamw if adamw else 0.0

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return a plain-text table of all blocks, with totals. What no block has is left out."""
        columns = {
            "block": [block.name for block in self.blocks],
            "role": [block.role for block in self.blocks],
            "why": [block.why for block in self.blocks],
            "shape": ["×".join(map(str, block.shape)) or "1" for block in self.blocks],
            "part": [block.split for block in self.blocks],
            "head size": ["" if block.head_dim is None else str(block.head_dim) for block in self.blocks],
            "momentum": [
                block.momentum if block.rank is None else f"{block.momentum} r={block.rank}" for block in self.blocks
            ],
            "second moment": [block.second_moment for block in self.blocks],
            "bound": ["" if block.max_update is None else f"{block.max_update:g}" for block in self.blocks],
            "rates": [block.rates for block in self.blocks],
            "bytes": [f"{block.state.total:,}" for block in self.blocks],
            "AdamW bytes": [f"{block.adamw_bytes:,}" for block in self.blocks],
        }
        for column in ("why", "part", "head size", "rates"):
            if not any(columns[column]):
                del columns[column]
        totals = {"block": f"{len(self.blocks)} blocks", "bound": f"saved {format_share(self.saved)}"}
        totals |= {"bytes": f"{self.state_bytes:,}", "AdamW bytes": f"{self.adamw_bytes:,}"}
        rows = zip(*columns.values(), strict=True)
        return _align([tuple(columns), *rows, tuple(totals.get(column, "") for column in columns)])


def _align(rows: Iterable[tuple[str, ...]]) -> str:
    """Pad columns to equal width, right-align numbers, and rule off the header and the totals."""
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
