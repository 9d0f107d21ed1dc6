"""What is known of one block of a parameter: its role, its place, and facts about the layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_memopt.sharding.slot import Slot

ROLES = (
    "embedding",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp",
    "head",
    "linear",  # a linear layer of unknown part: Mamba's projections, poolers, projectors
    "convolution",
    "router",
    "lora",
    "vector",
    "other",
)


@dataclass(frozen=True)
class Part:
    """One block of a parameter: its role, its place, and facts about the layer.

    Attributes:
        role: One of :data:`ROLES`.
        slot: The part of the parameter that it covers; None for the whole parameter.
        output_dim: The dimension of the outputs: ``-2`` as in ``torch.nn.Linear``, ``-1`` for transposed weights.
        head_dim: Outputs per attention head, for queries and keys, if known.
        flatten: Whether a three-dimensional parameter is one matrix, its trailing dimensions flattened, instead of a
            stack of matrices.
        why: What decided, in a few words, such as ``module Embedding`` or ``word q_proj``.
    """

    role: str
    slot: Slot | None = None
    output_dim: int = -2
    head_dim: int | None = None
    flatten: bool = False
    why: str = field(default="", compare=False)


def unsplit(part: Any) -> bool:
    """Return whether a part, or a block, is a fused weight whose roles are not known, as its ``why`` says."""
    return bool(part.why.startswith("not split"))
