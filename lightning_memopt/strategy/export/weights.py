"""Choose and convert the weights of a checkpoint for another format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed


def without_prefix(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the weights whose names have a prefix, without it: those of a module inside the LightningModule.

    Raises:
        ValueError: If no name has it.
    """
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"No weight has the prefix {prefix!r}: the checkpoint has {listed(list(weights), 3)}.")
    return found


def converted(weights: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the weights with floating-point tensors in another dtype. A weight of several names stays one tensor."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def of(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        key = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride()
        return made.setdefault(key, value.to(dtype)) if value.numel() else value.to(dtype)

    return {name: of(value) for name, value in weights.items()}


def separate(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory, as safetensors needs them.

    Raises:
        TypeError: If an entry is not a tensor, such as extra state of a module.
    """
    found, seen = {}, set()
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} is of type {type(value).__name__}, and safetensors holds tensors only: name a file that "
                "ends in .pt."
            )
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return found
