"""Gradient clipping where some parameters are sharded, over one mesh or several, and others are not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_memopt.sharding.layout import aligned, local_tensor


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that the 2-norm of all of them together is at most ``max_norm``, and return what it was.

    ``torch.nn.utils.clip_grad_norm_`` cannot put norms on different meshes, or plain ones, together with others. Here
    the collectives depend on the parameters, not on which of them have a gradient: if ranks disagree about that, the
    optimizer can say so.
    """
    params = list(params)
    alike: dict[_Cut, list[Tensor]] = {_cut(param): [] for param in params if param.requires_grad}
    for param in params:
        if param.grad is not None:
            alike.setdefault(_cut(param), []).append(local_tensor(aligned(param.grad, param)))
    squares = [_square(cut, grads) for cut, grads in alike.items()]
    if not squares:
        return torch.tensor(0.0)
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt().float()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for param in params:
        if param.grad is not None:
            local = local_tensor(param.grad)
            local.mul_(scale.to(local.device))
    return total


# The mesh of a parameter and the dimensions of the mesh that divide it.
_Cut = tuple[DeviceMesh | None, tuple[int, ...]]


def _cut(param: Tensor) -> _Cut:
    if not isinstance(param, DTensor):
        return None, ()
    return param.device_mesh, tuple(dim for dim, place in enumerate(param.placements) if not place.is_replicate())


def _square(cut: _Cut, grads: list[Tensor]) -> Tensor:
    """Return the sum of the squares of gradients that are cut alike, of which this rank holds its parts."""
    mesh, dims = cut
    square = torch.nn.utils.get_total_norm(grads).double().square()
    if mesh is not None:
        square = square.to(mesh.device_type)
        for dim in dims:
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square


@torch.no_grad()
def clip_grad_value_(params: Iterable[Tensor], limit: float) -> None:
    """Clamp the elements of all gradients to ``[-limit, limit]``."""
    assert limit > 0
    assert math.isfinite(limit)
    for param in params:
        if param.grad is not None:
            local_tensor(param.grad).clamp_(-limit, limit)
