"""Helpers for tensors that may be DTensors: local parts, full tensors, and copies between them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor. Does not import the class, which takes a second."""
    if type(tensor) is Tensor or type(tensor) is Parameter:  # the usual answer, asked several times per block and step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, or the tensor itself. For a DTensor, all its ranks call this together."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_aligned(grad: Tensor, param: Tensor) -> bool:
    """Return whether a gradient has the placements of its parameter.

    If ``fully_shard`` does not reduce the gradient, autograd may leave other placements, such as a pending sum.
    """
    if not (is_dtensor(grad) and is_dtensor(param)):
        return True
    return grad.placements == param.placements  # type: ignore[attr-defined]


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter. All its ranks call this together."""
    if is_aligned(grad, param):
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


def fill_(target: Tensor, value: Tensor) -> None:
    """Write a full tensor, or a DTensor of any placement, into the local part of ``target``."""
    if not is_dtensor(target):
        target.copy_(full_tensor(value).view(target.shape))
        return
    same = is_dtensor(value) and value.device_mesh == target.device_mesh  # type: ignore[attr-defined]
    if same and value.placements == target.placements and value.shape == target.shape:  # type: ignore[attr-defined]
        target.to_local().copy_(value.to_local())  # type: ignore[attr-defined]
        return
    sizes, offset = local_part(target.shape, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    part = full_tensor(value).view(target.shape)
    for dim, (start, length) in enumerate(zip(offset, sizes, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), length)
    target.to_local().copy_(part)  # type: ignore[attr-defined]


_PARTS: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {}


def local_part(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of this rank's part of a DTensor, and where it starts.

    Remembered, because torch enumerates the indices of every sharded dimension to find its first one.
    """
    coordinate = mesh.get_coordinate()
    where = None if coordinate is None else tuple(coordinate)
    key = tuple(shape), tuple(mesh.shape), where, tuple(placements)
    if key not in _PARTS:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, key[-1])
        _PARTS[key] = tuple(sizes), tuple(offset)
    return _PARTS[key]


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
