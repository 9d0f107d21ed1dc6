"""Gradient clipping where some parameters are sharded, over one mesh or several, and others are not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_memopt.layout import local_tensor


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that the 2-norm of all of them together is at most ``max_norm``, and return what it was.

    ``torch.nn.utils.clip_grad_norm_`` cannot put norms on different meshes, or plain ones, together with others.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    alike: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        alike[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(grad)
    norms = [torch.nn.utils.get_total_norm(group) for group in alike.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.float().to(whole[0].device) for norm in whole]))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = local_tensor(grad)
        local.mul_(scale.to(local.device))
    return total


@torch.no_grad()
def clip_grad_value_(params: Iterable[Tensor], limit: float) -> None:
    """Clamp the elements of all gradients to ``[-limit, limit]``."""
    assert limit > 0
    assert math.isfinite(limit)
    for param in params:
        if param.grad is not None:
            local_tensor(param.grad).clamp_(-limit, limit)
