"""Builds the snapshot of an optimizer of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memopt.memory.snapshot import BlockFacts, PartBytes, Snapshot
from lightning_memopt.memory.storages import Storages
from lightning_memopt.optim.binding import Binding
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.weights import LOW_BITS
from lightning_memopt.sharding.consensus import world_size


def snapshot_of(optimizer: Optimizer, binding: Binding, skipped: int) -> Snapshot:
    """Return immutable facts about all blocks that train or have state; see :meth:`MemOpt.snapshot`."""
    binding.require_names(optimizer)
    states = [state for state in optimizer.state.values() if state]
    storages = Storages()
    return Snapshot(
        blocks=tuple(
            facts_of(block, optimizer.state.get(param, {}), storages, group)
            for group, param, block in binding.entries(optimizer)
            if param.requires_grad or optimizer.state.get(param)
        ),
        step=max((int(state["step"].item()) for state in states), default=0),
        counter_bytes=storages.count(state["step"] for state in states),
        skipped=skipped,
        world_size=world_size(),
    )


def facts_of(block: Block, state: Mapping[str, Tensor], storages: Storages, group: Mapping[str, Any]) -> BlockFacts:
    """Return the facts about one block.

    Args:
        block: The block.
        state: Its parameter's state.
        storages: The storages counted so far.
        group: Its parameter group.
    """
    momentum, second_moment = block.kinds
    projections = momentum.projection_keys

    def parts(nbytes: Mapping[str, int], other: int) -> PartBytes:
        return PartBytes(
            momentum=sum(nbytes.get(key, 0) for key in momentum.keys if key not in projections),
            projections=sum(nbytes.get(key, 0) for key in projections),
            second_moment=sum(nbytes.get(key, 0) for key in second_moment.keys),
            other=other,
        )

    layout = block.layout
    keys = (*momentum.keys, *second_moment.keys) if state else ()
    shapes = momentum.shapes(layout) | second_moment.shapes(layout)
    size, extra = layout.state_dtype.itemsize, 0 if block.bits is None else block.bits.extra_bytes
    return BlockFacts(
        name=block.name,
        role=block.role,
        shape=layout.shape,
        full_rank=layout.short_side,
        momentum=momentum.name,
        rank=getattr(momentum, "rank", None),
        second_moment=second_moment.name,
        head_dim=layout.head_dim,
        split="" if layout.slot is None else layout.slot.text(len(layout.shape)),
        why=block.why,
        max_update=group["max_update"] if block.recipe.bounded else None,
        lr_multiplier=block.rates.lr_multiplier,
        weight_decay=None if block.rates.weight_decay == group["weight_decay"] else block.rates.weight_decay,
        state=parts(
            {key: torch.Size(shape).numel() * size for key, shape in shapes.items()},
            torch.Size(layout.shape).numel() * extra,
        ),
        local=parts(
            {key: storages.count([state[block.prefix + key]]) for key in keys},
            torch.Size(layout.local).numel() * (extra if LOW_BITS in state else 0),
        ),
        adamw_bytes=2 * torch.Size(layout.shape).numel() * block.dtype.itemsize,
        local_adamw_bytes=2 * torch.Size(layout.local).numel() * block.dtype.itemsize,
    )
