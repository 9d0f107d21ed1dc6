"""The result of a plan, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_memopt.memory.rows import PEAK, ROWS
from lightning_memopt.memory.sizes import format_bytes, format_share

ADAMW = "torch.optim.AdamW"
COLUMNS = (
    *("recipe", ROWS["gradients"], ROWS["optimizer_state"], "saved", ROWS["scratch"], PEAK),
    "left for activations",
)
HOST = "in CPU memory"
AVERAGED = "averaged weights"


@dataclass(frozen=True)
class RecipeMemory:
    """The memory of one rank with one recipe, in bytes.

    Attributes:
        recipe: The recipe's name. The first row is ``torch.optim.AdamW`` with ``fused=True``.
        state_bytes: Optimizer state.
        total_bytes: The peak on the device: the most that parameters and their average, buffers, optimizer state,
            gradients, unsharded units and the step's scratch take at a time, with activations if there is a batch.
        saved: Fraction of AdamW's state that the recipe saves.
        gradient_bytes: Gradients: all of them, or with gradient release the most that exist at a time.
        scratch_bytes: The most temporary memory of a step.
        host_bytes: With CPU offloading, what is in CPU memory: parameters, gradients, optimizer state and scratch.
        remaining: Device memory that is left; None if the device's memory is unknown.
        fits: Whether memory is left; None if the device's memory is unknown.
        rates: How rates of blocks differ from those of their parameter groups, in words.
    """

    recipe: str
    state_bytes: int
    total_bytes: int
    saved: float
    gradient_bytes: int
    scratch_bytes: int
    host_bytes: int = 0
    remaining: int | None = None
    fits: bool | None = None
    rates: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """The peak memory of the rank that holds the most, in bytes.

    The plan includes parameters as ``fully_shard`` pads them, buffers, reduced gradients, optimizer state, temporaries
    of the step, and at the fullest moment of the backward pass gathered parameters, gradients that are not yet reduced,
    and the buffers of both. It includes activations if there is a batch. It excludes step counters and the allocator's
    overhead.

    Attributes:
        model: Name of the model.
        parameters: Number of parameters. Shared parameters count once.
        world_size: Number of ranks.
        precision: Lightning's name of the precision.
        gpu_memory: Memory of one device, if given.
        parameter_bytes: Parameters.
        gradient_bytes: Gradients of all parameters that train.
        counter_bytes: Step counters, one per parameter that trains. They are in CPU memory, and in no total.
        unsharded_bytes: The most that gathered parameters, unreduced gradients and the buffers of both take at a time.
            If nothing is sharded: autocast's copies of weights, with ``bf16-mixed`` and gradient release; else 0.
        matrices: Number of parameters with two or more dimensions.
        unknown: Names of the matrices whose role is ``other``.
        rows: One entry per recipe, after ``torch.optim.AdamW``.
        buffer_bytes: The modules' buffers.
        averaged_bytes: The average of the parameters that a callback keeps, in the dtype of the module.
        gradient_release: Whether recipes release gradients. AdamW, which is torch's, does not.
        master_weight_bits: Bits that recipes keep of every bfloat16 weight. More than 16 are state.
        replicate_size: Number of replicas of the sharded model.
        cpu_offload: Whether parameters, gradients and optimizer state are in CPU memory.
        sharded: Whether FSDP2 gathers units.
        batch: Sequences and tokens per sequence on a rank; None if activations are not planned.
        activation_bytes: Activations and temporaries of a pass; None if they are not planned.
        activation_checkpointing: Whether the activations of blocks are recomputed.
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
    matrices: int
    unknown: tuple[str, ...]
    rows: tuple[RecipeMemory, ...]
    buffer_bytes: int = 0
    averaged_bytes: int = 0
    gradient_release: bool = False
    master_weight_bits: int = 16
    replicate_size: int = 1
    cpu_offload: bool = False
    sharded: bool = False
    batch: tuple[int, int] | None = None
    activation_bytes: int | None = None
    activation_checkpointing: bool = False

    @property
    def first_fit(self) -> str | None:
        """The recipe that fits and keeps the most state; None if none fits or the device's memory is unknown."""
        fitting = [row for row in self.rows if row.fits]
        return max(fitting, key=lambda row: row.state_bytes).recipe if fitting else None

    @property
    def smallest(self) -> RecipeMemory:
        """The entry that needs the least memory on the device, and of those the least in CPU memory."""
        return min(self.rows, key=lambda row: (row.total_bytes, row.host_bytes))

    def row(self, recipe: str) -> RecipeMemory:
        """Return the entry of a recipe.

        Raises:
            KeyError: If it was not planned.
        """
        for row in self.rows:
            if row.recipe == recipe:
                return row
        raise KeyError(f"{recipe!r} is not in the plan; available: {', '.join(row.recipe for row in self.rows)}.")

    def settings(self) -> list[str]:
        """Return the settings in words."""
        found = [f"{self.replicate_size} replicas"] if self.replicate_size > 1 else []
        found += [self.precision, *(["gradient release"] if self.gradient_release else [])]
        if self.master_weight_bits > 16 and self.precision == "bf16-true":
            found.append(f"{self.master_weight_bits} bits of each weight")
        found += ["CPU offloading"] if self.cpu_offload else []
        found += ["activation checkpointing"] if self.activation_checkpointing else []
        return [*found, *([f"{self.batch[0]} x {self.batch[1]} tokens"] if self.batch is not None else [])]

    def title(self) -> str:
        """Return a one-line title."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{self.model}: {self.parameters:,} parameters, {', '.join([ranks, *self.settings()])}"

    def shared(self) -> str:
        """Return in words what all recipes have in common."""
        sizes = {
            ROWS["parameters"]: self.parameter_bytes,
            AVERAGED: self.averaged_bytes,
            ROWS["buffers"]: self.buffer_bytes,
            ROWS["unsharded"] if self.sharded else "autocast's copies": self.unsharded_bytes,
        }
        if self.batch is not None:
            sizes[f"activations of {self.batch[0]} x {self.batch[1]} tokens"] = self.activation_bytes or 0
        # With offloading, parameters and their average are in CPU memory, as are gradients, state and scratch.
        host = [key for key in (ROWS["parameters"], AVERAGED) if self.cpu_offload]
        device = _listed({key: size for key, size in sizes.items() if key not in host})
        if not self.cpu_offload:
            return f"On each rank: {device}."
        held = _listed({key: sizes[key] for key in host})
        return f"On each rank: {device}. In CPU memory: {held}, gradients, optimizer state and scratch."

    @property
    def left(self) -> str:
        """The name of the column of memory that is left."""
        return COLUMNS[-1] if self.batch is None else "left"

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        found = [*COLUMNS[:-1], *([self.left] if self.gpu_memory is not None else [])]
        return tuple([*found, HOST] if self.cpu_offload else found)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the text of every row, in the order of :meth:`columns`.

        An asterisk marks recipes if some blocks have no known role.
        """
        mark = " *" if self.unknown else ""
        return [
            (
                row.recipe + (mark if row.recipe != ADAMW else ""),
                format_bytes(row.gradient_bytes),
                format_bytes(row.state_bytes),
                format_share(row.saved) if row.recipe != ADAMW else "",
                format_bytes(row.scratch_bytes),
                format_bytes(row.total_bytes),
                *([] if row.remaining is None else [remaining(row.remaining)]),
                *([format_bytes(row.host_bytes)] if self.cpu_offload else []),
            )
            for row in self.rows
        ]

    def note(self) -> str:
        """Return what the table does not say, a line each; empty if there is nothing.

        These are the footnote of the asterisk, and the rates of blocks.
        """
        count = len(self.unknown)
        lines = [f"* {count} of {self.matrices} matrices have no known role and count as 'other'."] if count else []
        return "\n".join([*lines, *(f"{row.recipe}: {', '.join(row.rates)}." for row in self.rows if row.rates)])

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return a plain-text table."""
        rows = [self.columns(), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title(), self.shared(), "", first, rule, *others, *filter(None, [self.note()])])

    def to_dict(self) -> dict[str, Any]:
        """Return all values as types that JSON supports."""
        return {**asdict(self), "unknown": list(self.unknown), "first_fit": self.first_fit}


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)


def remaining(size: int) -> str:
    """Return the remaining bytes as text, negative if memory is missing."""
    return format_bytes(size) if size >= 0 else f"-{format_bytes(-size)}"
