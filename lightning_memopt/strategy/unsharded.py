"""Full weights and gradient norms of sharded models, for tools that cannot read DTensors."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.strategy.agreement import rank_and_size
from lightning_memopt.strategy.checkpoint.states import gathered
from lightning_memopt.strategy.gradients import checked_norm_type
from lightning_memopt.strategy.model.shard import sharded_modules


def full_state_dict(module: nn.Module, *, ignore_frozen_params: bool = False) -> dict[str, Any]:
    """Return ``module.state_dict()`` with full tensors on the CPU on the first rank, and an empty dict on the others.

    All ranks must call this function. Small tensors are gathered together. Tied weights share memory, as in the module.

    Args:
        module: A sharded model or a part of one, such as the transformers model in a LightningModule.
        ignore_frozen_params: Whether to leave out, and not to gather, parameters without ``requires_grad``. Buffers
            stay. The name is that of torch's ``StateDictOptions``.
    """
    for unit in sharded_modules(module):
        unit.reshard()  # a forward pass without a backward pass leaves gathered parameters
    first = rank_and_size()[0] == 0
    state = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if not (ignore_frozen_params and isinstance(value, nn.Parameter) and not value.requires_grad)
    }
    once = {id(value): value for value in state.values()}
    whole = dict(zip(once, gathered(list(once.values()), first), strict=True))
    return {name: whole[id(value)] for name, value in state.items()} if first else {}


@torch.no_grad()
def grad_norm(module: nn.Module, norm_type: float | str = 2.0) -> dict[str, float]:
    """Return the norms of all gradients and their total norm, the same on every rank, for any model.

    All ranks must call this function, for example in ``on_before_optimizer_step``. The keys are those of
    ``lightning.pytorch.utilities.grad_norm``, which cannot read sharded gradients: ``grad_2.0_norm/<parameter>`` and
    ``grad_2.0_norm_total``.

    Args:
        module: The model.
        norm_type: The p of the p-norm, or "inf" for the largest element.

    Raises:
        ValueError: If p is not positive.
    """
    p = checked_norm_type(norm_type)
    grads = {name: param.grad for name, param in module.named_parameters() if param.grad is not None}
    by_placement: dict[object, list[str]] = defaultdict(list)
    for name, grad in grads.items():
        by_placement[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(name)
    norms: dict[str, float] = {}
    for names in by_placement.values():
        mine = torch.stack([_norm(local_tensor(grads[name]), p) for name in names])
        norms.update(zip(names, _over_ranks(mine, grads[names[0]], p).tolist(), strict=True))
    found = {f"grad_{p}_norm/{name}": norms[name] for name in grads}
    if found:
        found[f"grad_{p}_norm_total"] = float(_norm(torch.tensor([*norms.values()], dtype=torch.float64), p))
    return found


def _norm(value: Tensor, p: float) -> Tensor:
    if not value.numel():  # the maximum of an empty tensor is an error
        return value.new_zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(value, p, dtype=torch.promote_types(value.dtype, torch.float32)).double()


def _over_ranks(mine: Tensor, grad: Tensor, p: float) -> Tensor:
    """Return the norms of full tensors from those of this rank's local parts, which are placed as ``grad`` is."""
    if not isinstance(grad, DTensor):
        return mine
    mesh, largest = grad.device_mesh, math.isinf(p)
    part = Partial("max" if largest else "sum")
    placements = [Replicate() if placement.is_replicate() else part for placement in grad.placements]
    powers = (mine if largest else mine**p).to(mesh.device_type)
    whole = DTensor.from_local(powers, mesh, placements, run_check=False).full_tensor()
    return whole if largest else whole ** (1 / p)
