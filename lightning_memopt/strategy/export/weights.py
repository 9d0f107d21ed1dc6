"""Choose and convert the weights of a checkpoint for another format."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed
from lightning_memopt.optim.checkpoint.names import saved_names
from lightning_memopt.optim.weights import LOW_BITS, joined_


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


def with_all_bits(weights: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the weights, those in float32 of which optimizers keep more bits than bfloat16 has.

    Raises:
        ValueError: If such bits belong to no weight. Names may lack a prefix that all weights of the model have.
    """
    wide: dict[str, Tensor] = {}
    for state in optimizers:
        known = saved_names(state)
        if known is None and any(LOW_BITS in entries for entries in state["state"].values()):
            raise ValueError(
                "The optimizer keeps bits of bfloat16 weights, but no names say of which: export without "
                "`--dtype float32`, or save with names (`named_parameters()`)."
            )
        names = itertools.chain(*(known or []))
        numbers = itertools.chain(*(group["params"] for group in state["param_groups"]))
        for name, number in zip(names, numbers, strict=False):
            bits = state["state"].get(number, {}).get(LOW_BITS)
            if bits is None:
                continue
            mine = [key for key in weights if key == name] or [key for key in weights if key.endswith(f".{name}")]
            weight = weights[mine[0]] if len(mine) == 1 else None
            if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.shape != bits.shape:
                raise ValueError(
                    f"The optimizer keeps bits of {name!r}, of shape {tuple(bits.shape)}, which is no bfloat16 weight "
                    "of the checkpoint: export without `--dtype float32`."
                )
            wide[mine[0]] = joined_(torch.empty_like(weight, dtype=torch.float32), weight, bits)
    return {**weights, **_tied(weights, wide), **wide}


def _tied(weights: Mapping[str, Any], wide: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return other names of widened matrices. A directory does not say which weights are one, but these are equal."""
    return {
        name: wide[other]
        for name, value in weights.items()
        if name not in wide and isinstance(value, Tensor) and value.ndim > 1
        for other in wide
        if value.shape == weights[other].shape and torch.equal(value, weights[other])
    }


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
