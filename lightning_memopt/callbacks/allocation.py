"""Convert an optimizer's blocks to a policy's input, and the policy's result to changes of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from lightning_memopt.callbacks.policies import Candidate
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.reformat import by_block
from lightning_memopt.optim.signals import BlockSignals

Changes = dict[str, dict[str, Any]]


def adaptable(optimizers: Sequence[torch.optim.Optimizer], index: int | None) -> MemOpt:
    """Return the optimizer to adapt.

    Args:
        optimizers: All optimizers of a module.
        index: Index of the optimizer; None selects the only one that can be adapted.

    Raises:
        ValueError: If it cannot be adapted, or `index` is None and there is more than one.
    """
    if index is not None and not 0 <= index < len(optimizers):
        raise ValueError(f"`optimizer_idx` is {index}, but the module has {len(optimizers)} optimizers.")
    reasons = [_reason_against(optimizer) for optimizer in optimizers]
    able = [place for place, reason in enumerate(reasons) if not reason and index in (None, place)]
    if len(able) > 1:
        raise ValueError(
            f"Optimizers {', '.join(map(str, able))} can be adapted: choose one with `optimizer_idx`, and add one "
            "callback per optimizer."
        )
    if not able:
        found = [f"optimizer {place}: {reason}" for place, reason in enumerate(reasons) if index in (None, place)]
        raise ValueError(
            f"AdaptiveMomentum has nothing to adapt ({'; '.join(found) or 'the module has no optimizer'}). Return an "
            "optimizer such as lightning_memopt.AdaPMLean from configure_optimizers, or remove the callback."
        )
    optimizer = optimizers[able[0]]
    assert isinstance(optimizer, MemOpt)
    return optimizer


def _reason_against(optimizer: torch.optim.Optimizer) -> str:
    """Return why an optimizer cannot be adapted; an empty string if it can."""
    if not isinstance(optimizer, MemOpt):
        return f"{type(optimizer).__name__} is not an optimizer of lightning_memopt"
    optimizer.snapshot()  # raises an error with the way out if names are not known yet
    blocks = list(trained_matrices(optimizer))
    if not blocks:
        return "it trains no matrix"
    # Blocks that are frozen may train later.
    matrices = (block for *_, block in optimizer.blocks() if not block.layout.vector)
    inner = next((block for block in matrices if block.recipe.momentum.averages_squares), None)
    if inner is not None:
        return (
            f"the momentum {inner.recipe.momentum.name!r} of {inner.name!r} holds a second moment as well, which no "
            "other rank could continue from"
        )
    if not any(block.recipe.momentum.keys for block in blocks):
        return f"its recipe {optimizer.param_groups[0]['recipe']!r} has no momentum"
    if any(group["betas"][0] == 0 for group in optimizer.param_groups):
        return "its beta1 is 0, which means no momentum"
    return ""


def trained_matrices(optimizer: MemOpt) -> Iterator[Block]:
    """Yield the blocks whose momentum can be changed: those that train and are not vectors."""
    for _, param, block in optimizer.blocks():
        if param.requires_grad and not block.layout.vector:
            yield block


def rank_of(block: Block, dense_rank: int) -> int:
    """Return the rank of the block's momentum: 0 for none, `dense_rank` for dense."""
    momentum = block.recipe.momentum
    if not momentum.keys:
        return 0
    return min(getattr(momentum, "rank", dense_rank), dense_rank)


def candidate(block: Block, signals: Mapping[str, BlockSignals]) -> Candidate:
    """Return the facts about a block that a policy sees."""
    *stack, m, n = block.layout.matrix
    found = Candidate(
        name=block.name,
        role=block.role,
        count=prod(stack),
        m=m,
        n=n,
        rank=0,
        itemsize=block.layout.state_dtype.itemsize,
        signals=signals.get(block.name),
    )
    return replace(found, rank=rank_of(block, found.dense_rank))


def compressed_kind(optimizer: MemOpt) -> str:
    """Return the momentum kind for ranks between none and dense: that of most blocks, or low rank."""
    momenta = [block.recipe.momentum for block in trained_matrices(optimizer)]
    names = Counter(momentum.name for momentum in momenta if hasattr(momentum, "rank"))
    return names.most_common(1)[0][0] if names else "low_rank"


def change_to(block: Candidate, rank: int, compressed: str) -> dict[str, Any]:
    """Return the change for :meth:`MemOpt.reformat` that gives a block momentum of a rank."""
    if rank == 0:
        return {"momentum": "none"}
    if rank >= block.dense_rank:
        return {"momentum": "dense"}
    return {"momentum": compressed, "rank": rank}


def momentum_bytes(optimizer: MemOpt, changes: Mapping[str, Any]) -> int:
    """Return the bytes of momentum of all blocks, over all ranks, after changes."""
    total, wanted = 0, by_block((block for *_, block in optimizer.blocks()), changes)
    for block in _holders(optimizer):
        changed = block.changed(wanted[block.name]) if block.name in wanted else block
        total += changed.recipe.momentum.nbytes(block.layout)
    return total


def matrix_bytes(optimizer: MemOpt) -> dict[str, int]:
    """Return the bytes of momentum of every block whose momentum can be changed."""
    return {block.name: block.recipe.momentum.nbytes(block.layout) for block in trained_matrices(optimizer)}


def fixed_bytes(optimizer: MemOpt) -> int:
    """Return the bytes of momentum that no policy changes: those of vectors and of blocks that no longer train."""
    return momentum_bytes(optimizer, {}) - sum(matrix_bytes(optimizer).values())


def _holders(optimizer: MemOpt) -> Iterator[Block]:
    """Yield the blocks that have momentum: those that train, and those that trained before they were frozen."""
    for _, param, block in optimizer.blocks():
        if param.requires_grad or optimizer.state.get(param):
            yield block


def adamw_momentum_bytes(optimizer: MemOpt) -> int:
    """Return the bytes of momentum that ``torch.optim.AdamW`` would keep for the same blocks."""
    return sum(prod(block.layout.shape) * block.dtype.itemsize for block in _holders(optimizer))
