"""Chooses the dimension along which to shard each parameter, so that its optimizer state needs no other rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_memopt.plans.roles import Part, canonical_names, classify


def shard_dims(model: nn.Module, size: int) -> dict[Tensor, int]:
    """Return the dimension along which to shard every parameter of a model.

    Args:
        model: Only its names and shapes are used, not its values or devices.
        size: Number of ranks that a parameter is divided over.
    """
    named = list(model.named_parameters())
    parts = classify(model)
    names = canonical_names(name for name, _ in named)
    return {
        param: shard_dim(tuple(param.shape), parts[name], size) for name, (_, param) in zip(names, named, strict=True)
    }


def shard_dim(shape: tuple[int, ...], parts: Sequence[Part], size: int) -> int:
    """Return the dimension along which to shard a parameter.

    Fused weights are sharded along the dimension that is not fused, so their blocks stay whole. Other matrices are
    sharded along the long side, so statistics along the short side are local; square matrices along their inputs, so
    heads stay whole. ``fully_shard`` divides unevenly in dimension 0 only, so a parameter falls back to dimension 0 if
    the preferred dimension does not divide evenly. Convolution weights, which the optimizer flattens from dimension 1
    on, are sharded along dimension 0. Stacks of matrices are sharded along the stack if it divides evenly.

    Args:
        shape: The global shape.
        parts: The blocks in the parameter, from :func:`lightning_memopt.classify`.
        size: Number of ranks that it is divided over.
    """
    preferred = _preferred(shape, parts, size)
    return preferred if shape and shape[preferred] % size == 0 else 0


def _preferred(shape: tuple[int, ...], parts: Sequence[Part], size: int) -> int:
    flattened = len(shape) > 3 or parts[0].flatten
    if len(shape) < 2 or flattened or (len(shape) == 3 and shape[0] % size == 0):
        return 0
    rows, columns = len(shape) - 2, len(shape) - 1
    slot = parts[0].slot
    if slot is not None:
        return columns if slot.dim % len(shape) == rows else rows
    if shape[rows] == shape[columns]:
        return columns if parts[0].output_dim == -2 else rows
    return rows if shape[rows] > shape[columns] else columns


def renamed(dims: Mapping[Tensor, int], replaced: Mapping[Tensor, Tensor]) -> dict[Tensor, int]:
    """Return the dimensions with replaced parameters in place of the old ones."""
    return {replaced.get(param, param): dim for param, dim in dims.items()}
