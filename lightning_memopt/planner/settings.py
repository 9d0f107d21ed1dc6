"""The settings of a run that decide its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_memopt._registry import unknown
from lightning_memopt.sharding.wrapping import Policy

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")
# Other forms that the Trainer accepts.
SHORT: dict[Any, str] = {None: "32-true", 32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that decide its memory, checked.

    Attributes:
        world_size: Number of ranks.
        replicate_size: Number of replicas of the sharded model.
        precision: Lightning's name of the precision; its other forms are converted.
        gradient_release: Whether recipes release gradients.
        master_weight_bits: Bits that recipes keep of every bfloat16 weight.
        cpu_offload: Whether parameters, gradients and optimizer state are in CPU memory.
        reshard_after_forward: Whether gathered parameters are freed between forward and backward pass; n to keep an
            n-th of them.
        unreduced: Whether gradients of full size add up over several batches before they are reduced.
        averaged: Whether a callback keeps an average of the parameters.
        batch: Sequences and tokens per sequence on a rank; None leaves activations out.
        activation_checkpointing: Whether the activations of blocks are recomputed.
        wrap: The modules that the strategy gathers as units.
        fsdp: Whether the strategy is ``memopt_fsdp`` on a single rank, too, where FSDP2 copies units.

    Raises:
        TypeError: If a number is not an integer, or a switch not a boolean.
        ValueError: If a number is too small, if the replicas do not divide the ranks or if gradients are released with
            replicas, if ``batch`` is not two numbers, or if the precision or ``reshard_after_forward`` is unknown.
    """

    world_size: int = 1
    replicate_size: int = 1
    precision: Any = "32-true"
    gradient_release: bool = False
    master_weight_bits: int = 16
    cpu_offload: bool = False
    reshard_after_forward: bool | int = True
    unreduced: bool = False
    averaged: bool = False
    batch: tuple[int, int] | None = None
    activation_checkpointing: bool = False
    wrap: Policy | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name in ("gradient_release", "cpu_offload", "averaged", "activation_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        for name in ("world_size", "replicate_size"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"`{name}` must be an integer, got {number!r}.")
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        if self.world_size % self.replicate_size:
            raise ValueError(
                f"`replicate_size` {self.replicate_size} does not divide `world_size` {self.world_size}: choose a "
                "multiple of it as the number of ranks."
            )
        if self.gradient_release and self.replicate_size > 1:
            raise ValueError(
                f"`gradient_release` frees nothing with `replicate_size={self.replicate_size}`, and the strategy "
                "refuses it: leave one of the two out."
            )
        if isinstance(self.batch, list):
            object.__setattr__(self, "batch", tuple(self.batch))
        if self.batch is not None and not _is_batch(self.batch):
            raise ValueError(
                f"`batch` must be two positive integers, such as (4, 512) for 4 x 512 tokens, got {self.batch!r}."
            )
        self._check_reshard()
        found = SHORT.get(self.precision, self.precision) if isinstance(self.precision, str | int | None) else None
        if found not in PRECISIONS:
            raise ValueError(
                f"{unknown('precision', str(self.precision), list(PRECISIONS))} For another precision, plan for the "
                "one with the same sizes, such as 'bf16-mixed' for '16-mixed'."
            )
        object.__setattr__(self, "precision", found)

    def _check_reshard(self) -> None:
        """Check what FSDP2 would check. All ranks are the same as True, and one is the same as False."""
        value = self.reshard_after_forward
        if isinstance(value, bool):
            return
        if not isinstance(value, int) or value < 1 or self.shards % value:
            raise ValueError(
                f"`reshard_after_forward` must be True, False or a number that divides the {self.shards} ranks of a "
                f"replica, got {value!r}."
            )
        if value in (1, self.shards):
            object.__setattr__(self, "reshard_after_forward", value != 1)

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of the parameters."""
        return self.world_size // self.replicate_size

    @property
    def alone(self) -> bool:
        """Whether nothing is sharded or copied."""
        return self.world_size == 1 and not self.cpu_offload and not self.fsdp


def _is_batch(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in value)
    )
