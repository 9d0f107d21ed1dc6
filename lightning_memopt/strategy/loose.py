"""Parameters that belong to no unit: plain tensors, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def loose_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a sharded model that are not sharded, but for those without elements."""
    return [param for param in model.parameters() if not isinstance(param, DTensor) and param.numel()]


@torch.no_grad()
def average_gradients(params: Sequence[Tensor], group: Any) -> None:
    """Average gradients over ranks, in one collective.

    A rank whose loss does not depend on a parameter counts with a gradient of zero. A parameter that has a gradient on
    no rank keeps none.

    Args:
        params: The same ones, in the same order, on every rank.
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
