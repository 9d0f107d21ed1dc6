"""Tensors that may be DTensors: the part of this rank, the whole, and copies between them."""

from __future__ import annotations

import torch
from torch import Tensor

try:  # torch can be built without distributed
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError:  # pragma: no cover
    DTensor = None  # type: ignore[assignment,misc]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, which all its ranks ask for together, or the tensor itself."""
    return tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def is_aligned(grad: Tensor, param: Tensor) -> bool:
    """Return whether a gradient has the placements of its parameter.

    Autograd may leave others where ``fully_shard`` does not reduce it, such as a pending sum over the ranks.
    """
    if DTensor is None or not (isinstance(grad, DTensor) and isinstance(param, DTensor)):
        return True
    return grad.placements == param.placements


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter; all its ranks ask for that together."""
    if is_aligned(grad, param):
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


def fill_(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, or a DTensor of any placement, into what this rank holds of ``target``."""
    if DTensor is None or not isinstance(target, DTensor):
        target.copy_(full_tensor(value).view(target.shape))
        return
    same = isinstance(value, DTensor) and value.device_mesh == target.device_mesh
    if same and value.placements == target.placements and value.shape == target.shape:  # type: ignore[attr-defined]
        target.to_local().copy_(value.to_local())  # type: ignore[attr-defined]
        return
    sizes, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    part = full_tensor(value).view(target.shape)
    for dim, (start, length) in enumerate(zip(offset, sizes, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), length)
    target.to_local().copy_(part)


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
