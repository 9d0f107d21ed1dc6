"""Which dimension of a parameter is sharded: the one along which its optimizer state needs no other rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_memopt.plans.roles import Part, canonical_names, classify


def shard_dims(model: nn.Module, size: int) -> dict[Tensor, int]:
    """Return the dimension along which every parameter of a model is to be sharded.

    Args:
        model: Its names and shapes decide; values and devices do not.
        size: Ranks over which a parameter is divided.
    """
    named = list(model.named_parameters())
    parts = classify(model)
    names = canonical_names(name for name, _ in named)
    return {
        param: shard_dim(tuple(param.shape), parts[name], size) for name, (_, param) in zip(names, named, strict=True)
    }


def shard_dim(shape: tuple[int, ...], parts: Sequence[Part], size: int) -> int:
    """Return the dimension along which a parameter is to be sharded.

    Fused weights are sharded across the dimension that is not fused, so that their blocks stay whole; other matrices
    along the long side, so that statistics along the short side are local; square ones along their inputs, so that
    heads stay whole. ``fully_shard`` divides unevenly in dimension 0 only, so everything that another dimension does
    not divide evenly falls back to it. Weights of convolutions, which the optimizer flattens from dimension 1 on, are
    sharded along dimension 0, stacks of matrices along the stack where it divides evenly.

    Args:
        shape: The global shape.
        parts: The blocks in the parameter, from :func:`lightning_memopt.classify`.
        size: Ranks over which it is divided.
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
    """Return the dimensions for parameters that took the place of others."""
    return {replaced.get(param, param): dim for param, dim in dims.items()}
