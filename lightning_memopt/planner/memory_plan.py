"""The result of a plan, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_memopt.memory.sizes import format_bytes, format_share

ADAMW = "torch.optim.AdamW"
COLUMNS = (
    "recipe",
    "parameters",
    "gradients",
    "optimizer state",
    "saved",
    "largest block, unsharded",
    "total",
    "left for activations",
)


@dataclass(frozen=True)
class RecipeMemory:
    """The memory of one rank with one recipe, in bytes.

    Attributes:
        recipe: The recipe's name. The first row is ``torch.optim.AdamW``.
        state_bytes: Optimizer state.
        total_bytes: Parameters and their average, gradients, optimizer state and the unsharded parameters of the
            largest unit.
        saved: Fraction of AdamW's state that the recipe saves.
        gradient_bytes: Gradients: all of them, or with gradient release the most that exist at a time.
        remaining: Device memory left for activations; None if the device's memory is unknown.
        fits: Whether memory is left; None if the device's memory is unknown.
        rates: How rates of blocks differ from those of their parameter groups, in words.
    """

    recipe: str
    state_bytes: int
    total_bytes: int
    saved: float
    gradient_bytes: int
    remaining: int | None = None
    fits: bool | None = None
    rates: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """The memory between forward and step of the rank that holds the most, in bytes.

    The plan includes parameters as ``fully_shard`` pads them, reduced gradients, optimizer state, and the full
    parameters of the largest module that ``fully_shard`` gathers at once. It excludes activations, the gradients of
    that module before reduction, modules that are prefetched or that contain it, temporaries of collectives and of the
    step, buffers, step counters, and the allocator's overhead.

    Attributes:
        model: Name of the model.
        parameters: Number of parameters. Shared parameters count once.
        world_size: Number of ranks.
        precision: Lightning's name of the precision.
        gpu_memory: Memory of one device, if given.
        parameter_bytes: Parameters.
        gradient_bytes: Gradients of all parameters that train.
        counter_bytes: Step counters, one per parameter that trains. They are in CPU memory, and in no total.
        unsharded_bytes: Parameters of the largest unit, gathered in its compute dtype; 0 on one rank.
        largest_unit: Name of the largest unit; None on one rank.
        matrices: Number of parameters with two or more dimensions.
        unknown: Names of the matrices whose role is ``other``.
        rows: One entry per recipe, after ``torch.optim.AdamW``.
        gradient_release: Whether recipes release gradients. AdamW, which is torch's, does not.
        master_weight_bits: Bits that recipes keep of every bfloat16 weight. More than 16 are state.
        averaged_bytes: The average of the parameters that a callback keeps, in the dtype of the module; in the totals.
    """

    model: str
    parameters: int
    world_size: int
    precision: str
    gpu_memory: int | None
    parameter_bytes: int
    gradient_bytes: int
    counter_bytes: int
    unsharded_bytes: int
    largest_unit: str | None
    matrices: int
    unknown: tuple[str, ...]
    rows: tuple[RecipeMemory, ...]
    averaged_bytes: int = 0
    gradient_release: bool = False
    master_weight_bits: int = 16

    @property
    def first_fit(self) -> str | None:
        """The recipe that fits and keeps the most state; None if none fits or the device's memory is unknown."""
        fitting = [row for row in self.rows if row.fits]
        return max(fitting, key=lambda row: row.state_bytes).recipe if fitting else None

    def row(self, recipe: str) -> RecipeMemory:
        """Return the entry of a recipe.

        Raises:
            KeyError: If it was not planned.
        """
        for row in self.rows:
            if row.recipe == recipe:
                return row
        raise KeyError(f"{recipe!r} is not in the plan; available: {', '.join(row.recipe for row in self.rows)}.")

    def title(self) -> str:
        """Return a one-line title."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        settings = [self.precision, *(["gradient release"] if self.gradient_release else [])]
        if self.master_weight_bits > 16 and self.precision == "bf16-true":
            settings.append(f"{self.master_weight_bits} bits of each weight")
        return f"{self.model}: {self.parameters:,} parameters, {ranks}, {', '.join(settings)}, memory per rank"

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text of every row, in the order of :data:`COLUMNS`.

        An asterisk marks recipes if some blocks have no known role.
        """
        mark = " *" if self.unknown else ""
        return [
            (
                row.recipe + (mark if row.recipe != ADAMW else ""),
                format_bytes(self.parameter_bytes),
                format_bytes(row.gradient_bytes),
                format_bytes(row.state_bytes),
                format_share(row.saved) if row.recipe != ADAMW else "",
                format_bytes(self.unsharded_bytes),
                format_bytes(row.total_bytes),
                "" if row.remaining is None else remaining(row.remaining),
            )
            for row in self.rows
        ]

    def note(self) -> str:
        """Return what the table does not say, a line each; empty if there is nothing.

        These are the footnote of the asterisk, the bytes of averaged weights, and the rates of blocks.
        """
        lines, count = [], len(self.unknown)
        if count:
            lines.append(f"* {count} of {self.matrices} matrices have no known role and count as 'other'.")
        if self.averaged_bytes:
            lines.append(f"The totals include {format_bytes(self.averaged_bytes)} of averaged weights.")
        return "\n".join([*lines, *(f"{row.recipe}: {', '.join(row.rates)}." for row in self.rows if row.rates)])

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return a plain-text table."""
        header = COLUMNS if self.gpu_memory is not None else COLUMNS[:-1]
        rows = [header, *(cells[: len(header)] for cells in self.cells())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title(), "", first, rule, *others, *filter(None, [self.note()])])

    def to_dict(self) -> dict[str, Any]:
        """Return all values as types that JSON supports."""
        return {**asdict(self), "unknown": list(self.unknown), "first_fit": self.first_fit}


def remaining(size: int) -> str:
    """Return the remaining bytes as text, negative if memory is missing."""
    return format_bytes(size) if size >= 0 else f"-{format_bytes(-size)}"
