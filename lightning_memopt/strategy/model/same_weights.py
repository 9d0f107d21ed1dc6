"""Check that all ranks have the same model structure, and broadcast the weights from rank 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_memopt.strategy.agreement import on_all


def check_same_structure(model: nn.Module) -> None:
    """Check that the model has the same structure on all ranks, so that no later collective hangs or mixes weights.

    Raises:
        ValueError: If it does not, on all ranks; the message names the first difference.
    """
    lines = [
        f"{name}: {tuple(tensor.shape)} {tensor.dtype} requires_grad={tensor.requires_grad}"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if len(set(on_all(lambda: digest))) == 1:
        return
    everyone = on_all(lambda: lines)
    for rank, theirs in enumerate(everyone):
        for first, other in zip_longest(everyone[0], theirs, fillvalue="nothing"):
            if first != other:
                raise ValueError(
                    f"The ranks have created different models: rank 0 has {first!r} where rank {rank} has {other!r}. "
                    "Create the same model on every rank."
                )


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast the values of rank 0 to all ranks."""
    for tensor in dict.fromkeys(tensors):
        if tensor.numel():
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            if value.data_ptr() != tensor.data_ptr():
                tensor.copy_(value)


@torch.no_grad()
def broadcast_replicas(model: nn.Module) -> None:
    """Broadcast each shard of a sharded model to its replicas, and plain tensors to all ranks."""
    plain = []
    for tensor in dict.fromkeys((*model.parameters(), *model.buffers())):
        if not isinstance(tensor, DTensor):
            plain.append(tensor)
            continue
        for position, placement in enumerate(tensor.placements):
            if placement.is_replicate() and tensor.device_mesh.size(position) > 1 and tensor.to_local().numel():
                dist.broadcast(tensor.to_local(), group=tensor.device_mesh.get_group(position), group_src=0)
    broadcast(plain)
