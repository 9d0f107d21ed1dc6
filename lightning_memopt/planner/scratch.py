"""Temporary memory of a step: the step's own code runs on the meta device, and its storages are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import two_chunks
from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.optim.block import initial_state
from lightning_memopt.optim.bounds import Watch
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.stepping import Step
from lightning_memopt.optim.update import Update
from lightning_memopt.sharding.collectives import MAX_PAYLOAD


def updates_of(optimizer: MemOpt, step: int) -> list[Update]:
    """Return the updates of all blocks whose parameter has a gradient, with new state."""
    by_param: dict[Tensor, list[Any]] = {}
    for group, param, block in optimizer.blocks():
        if param.grad is not None:
            by_param.setdefault(param, []).append((group, block))
    return [
        Update(block, param, state, group, step)
        for param, entries in by_param.items()
        for state in [initial_state([block for _, block in entries])]
        for group, block in entries
    ]


@torch.no_grad()
def step_scratch(optimizer: MemOpt, units: Sequence[set[Tensor]] = ()) -> int:
    """Return the most bytes of temporaries that are alive at one time in a step, as on a GPU without kernels.

    Args:
        optimizer: The optimizer of parameters on the meta device, with gradients.
        units: The parameters of every unit, if each is updated by itself.
    """
    peak, seen = 0, set[Hashable]()
    first = updates_of(optimizer, 1)
    # In the first step all subspaces are chosen, and in the second one a part of them.
    later = [replace(update, step=2) for update in first] if any(update.block.recurring for update in first) else []
    for updates in filter(None, (first, later)):
        parts = [[each for each in updates if each.param in unit] for unit in units] if units else [updates]
        for run in _different(parts, seen):
            with two_chunks(), Temporaries() as temporaries:
                Step(run).run(Watch())
            peak = max(peak, temporaries.peak)
    return peak


def _different(parts: Iterable[list[Update]], seen: set[Hashable]) -> Iterator[list[Update]]:
    """Yield runs of updates that hold memory together, without those that are like earlier ones.

    Most layers of a model are alike, so that this takes seconds for any model.
    """
    for updates in parts:
        for run in _runs(updates):
            kind = frozenset(Counter(update.alike() for update in run).items())
            if kind not in seen:
                seen.add(kind)
                yield run


def _runs(updates: list[Update]) -> Iterator[list[Update]]:
    """Yield the waves of a step; without sharding, batches, which then are made one after the other."""
    if any(update.block.layout.sharded for update in updates):
        yield from Step(updates).waves()
        return
    batches: dict[Hashable, list[Update]] = {}
    for update in updates:
        batches.setdefault(update.alike(), []).append(update)
    for (first, *_), batch in ((batch, batch) for batch in batches.values()):
        nbytes = first.block.stacked_bytes + first.block.scratch(first.step)
        yield batch[: max(1, MAX_PAYLOAD // max(1, nbytes))]
