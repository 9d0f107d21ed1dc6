"""Average gradients that FSDP2 does not reduce, and clip gradients over all meshes together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_memopt.sharding.tensors import aligned, local_tensor


def loose_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a sharded model that are not sharded, except those without elements."""
    return [param for param in model.parameters() if not isinstance(param, DTensor) and param.numel()]


@torch.no_grad()
def average_gradients(params: Sequence[Tensor], group: Any) -> None:
    """Average gradients over ranks, in one collective.

    A rank on which a parameter has no gradient contributes zeros. A parameter without a gradient on every rank stays
    without one.

    Args:
        params: The parameters, the same ones in the same order on every rank.
        group: The process group of the data-parallel ranks.
    """
    size = dist.get_world_size(group)
    if not params or size == 1:
        return
    dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    options: Any = {"dtype": dtype, "device": params[0].device}
    present = torch.tensor([param.grad is not None for param in params], **options)
    grads = [
        torch.zeros(param.numel(), **options) if param.grad is None else param.grad.flatten().to(dtype)
        for param in params
    ]
    total = torch.cat([present, *grads])
    dist.all_reduce(total, group=group)
    counts, *sums = total.split([len(params), *(param.numel() for param in params)])
    for param, count, value in zip(params, counts.tolist(), sums, strict=True):
        if count and param.grad is None:
            param.grad = torch.empty_like(param)
        if count:
            assert param.grad is not None
            param.grad.copy_((value / size).view_as(param))


def checked_norm_type(norm_type: float | str) -> float:
    """Return the p of a p-norm as a number, infinity for "inf".

    Raises:
        ValueError: If p is not positive.
    """
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"`norm_type` must be a positive number or 'inf', got {norm_type!r}.")
    return p


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale gradients so that their total p-norm is at most ``max_norm``, and return the norm before scaling.

    ``torch.nn.utils.clip_grad_norm_`` cannot combine norms from different meshes, or from DTensors and plain tensors.
    The collectives here depend on the parameters, not on which of them have a gradient. So if ranks disagree about
    that, the optimizer can report it.

    Args:
        params: The parameters.
        max_norm: The largest norm.
        norm_type: The p.
        error_if_nonfinite: Whether to refuse a norm that is not finite, which waits for the device.

    Raises:
        RuntimeError: If the norm is refused. Gradients have not changed then.
        ValueError: If p is not positive.
    """
    params, p = list(params), checked_norm_type(norm_type)
    by_placement: dict[_Placement, list[Tensor]] = {_placement(param): [] for param in params if param.requires_grad}
    for param in params:
        if param.grad is not None:
            by_placement.setdefault(_placement(param), []).append(local_tensor(aligned(param.grad, param)))
    powers = [_power(placement, grads, p) for placement, grads in by_placement.items()]
    if not powers:
        return torch.tensor(0.0)
    found = torch.stack([power.to(powers[0].device) for power in powers])
    total = (found.max() if math.isinf(p) else found.sum() ** (1 / p)).float()
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The norm of the gradients is {total.item()}, so they cannot be clipped. With "
            "`error_if_nonfinite=False`, the optimizer decides what happens: an error with names, or, with "
            "`nonfinite='skip'`, no step."
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for param in params:
        if param.grad is not None:
            local = local_tensor(param.grad)
            local.mul_(scale.to(local.device))
    return total


# The mesh of a parameter and the dimensions of the mesh that divide it.
_Placement = tuple[DeviceMesh | None, tuple[int, ...]]


def _placement(param: Tensor) -> _Placement:
    if not isinstance(param, DTensor):
        return None, ()
    return param.device_mesh, tuple(dim for dim, place in enumerate(param.placements) if not place.is_replicate())


def _power(placement: _Placement, grads: list[Tensor], p: float) -> Tensor:
    """Return the global p-norm to the power of p, or the largest element, of gradients that are sharded in one way."""
    mesh, dims = placement
    norm, largest = torch.nn.utils.get_total_norm(grads, p).double(), math.isinf(p)
    power = norm if largest else norm**p
    if mesh is not None:
        power = power.to(mesh.device_type)
        for dim in dims:
            dist.all_reduce(power, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return power


@torch.no_grad()
def clip_grad_value_(params: Iterable[Tensor], limit: float) -> None:
    """Clamp the elements of all gradients to ``[-limit, limit]``."""
    assert limit > 0
    assert math.isfinite(limit)
    for param in params:
        if param.grad is not None:
            local_tensor(param.grad).clamp_(-limit, limit)
