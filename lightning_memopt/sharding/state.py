"""Storage of a block's state: its shapes, the rank that stores each part, and what ranks gather for a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memopt.sharding.layout import Cut, Layout, pieces
from lightning_memopt.sharding.tensors import local_part

# The last two sizes of a state tensor. ``-2`` or ``-1`` means "as many as that dimension of the block", and every rank
# works on its part. With a number, every rank works on all.
Sizes = tuple[int, ...]
# The sizes of a state tensor with one number per element, in the shape of the block.
ELEMENTWISE: Sizes = ()


def allocate(layout: Layout, sizes: Sizes) -> Tensor:
    """Allocate one state tensor of a block, filled with zeros. Stack dimensions come first.

    A state tensor with a sharded dimension of the block is sharded along it. Any other tensor, such as the right factor
    of a matrix with sharded rows, is sharded along its own longest dimension: ranks gather it for a step and keep
    their piece.

    Args:
        layout: The layout of the block.
        sizes: The last two sizes, or ``ELEMENTWISE``.
    """
    placements = () if layout.mesh is None else _placements(layout, sizes)
    return _zeros(layout, shape_of(layout, sizes), placements, layout.state_dtype)


def like_param(layout: Layout, dtype: torch.dtype) -> Tensor:
    """Allocate zeros with the shape and the placement of the parameter that holds the block."""
    return _zeros(layout, layout.param_shape, layout.placements, dtype)


def _zeros(layout: Layout, shape: tuple[int, ...], placements: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    if layout.mesh is None:
        return torch.zeros(shape, dtype=dtype, device=layout.device)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mine, _ = local_part(shape, layout.mesh, placements)
    local = torch.zeros(mine, dtype=dtype, device=layout.device)
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype)
    # Not from_local, which would move the state of offloaded parameters to the mesh's device.
    return DTensor(local, DTensorSpec(layout.mesh, placements, tensor_meta=meta), requires_grad=False)


def shape_of(layout: Layout, sizes: Sizes) -> tuple[int, ...]:
    """Return the global shape of a state tensor."""
    if sizes == ELEMENTWISE:
        return layout.shape
    return (*layout.matrix[:-2], *(layout.matrix[size] if size < 0 else size for size in sizes))


def origin(layout: Layout, sizes: Sizes) -> tuple[int, ...]:
    """Return where this rank's part starts in the whole state tensor, seen as ``[..., m, n]``."""
    if sizes == ELEMENTWISE:
        return layout.offset
    parts = [layout.offset[size] if size < 0 else 0 for size in sizes]
    return (*layout.offset[:-2], *parts)


def cut_of(layout: Layout, sizes: Sizes) -> Cut | None:
    """Return how a state tensor is cut if ranks need it whole; None if each rank works on its part."""
    for position in layout.shards():
        placement = _placements(layout, sizes)[position]
        if placement.is_shard() and _follows(layout, sizes, position) is None:
            lengths = pieces(shape_of(layout, sizes)[placement.dim], layout.mesh.size(position))
            return layout.cut(position, placement.dim, lengths)
    return None


def _follows(layout: Layout, sizes: Sizes, position: int) -> int | None:
    """Return the dimension of a state tensor that is sharded like mesh dimension ``position`` shards the block."""
    if layout.gathered:
        return None
    dim = layout.matrix_dim(layout.placements[position].dim)
    stack = len(layout.matrix) - 2
    if sizes == ELEMENTWISE:
        return layout.placements[position].dim
    if dim < -2:
        return dim + len(layout.matrix)
    return next((stack + place for place, size in enumerate(sizes) if size == dim), None)


def _placements(layout: Layout, sizes: Sizes) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard

    shape = shape_of(layout, sizes)
    placements: list[Any] = [Replicate()] * len(layout.placements)
    shards = layout.shards()
    for position in shards:
        follows = _follows(layout, sizes, position)
        if follows is not None:
            placements[position] = Shard(follows)
        elif len(shards) == 1 and shape:
            placements[position] = Shard(max(range(len(shape)), key=lambda dim: shape[dim]))
    return tuple(placements)
