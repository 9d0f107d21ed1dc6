"""One step of all blocks: gathers in waves of bounded size, and the updates that follow."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Tally, Watch
from lightning_memopt.optim.guards import exact_arithmetic
from lightning_memopt.optim.update import Update, update
from lightning_memopt.sharding.collectives import Gather, Task, gather, packed, run_tasks


def take_step(
    active: Sequence[tuple[dict[str, Any], Tensor]],
    blocks: Mapping[Tensor, Sequence[Block]],
    states: Mapping[Tensor, dict[str, Tensor]],
    tally: Tally,
    measured: StepMemory | None = None,
    *,
    fused: bool | None = None,
) -> None:
    """Update all parameters whose gradients have been checked.

    Args:
        active: Parameters with their groups.
        blocks: Parameter → its blocks.
        states: Parameter → its state.
        tally: Counts the elements that the bound changes.
        measured: Counts the temporaries of the updates.
        fused: Whether to use kernels; None for where they are available.

    Raises:
        FloatingPointError: If a weight would become infinite or NaN. It keeps its value.
    """
    counters = [states[param]["step"] for _, param in active]
    if len({counter.device for counter in counters}) > 1:
        counters = [counter.cpu() for counter in counters]
    numbers = [int(number) + 1 for number in torch.stack(counters).tolist()] if counters else []
    # A learning rate may be a tensor, which is read once.
    groups = {id(group): group for group, _ in active}
    groups = {key: {**group, "lr": float(group["lr"])} for key, group in groups.items()}
    step = Step(
        Update(block, param, states[param], groups[id(group)], number, fused)
        for (group, param), number in zip(active, numbers, strict=True)
        for block in blocks[param]
    )
    if active:
        torch._foreach_add_([states[param]["step"] for _, param in active], 1)
    watch = tally.watch(max(numbers, default=0))
    # A dispatch mode would keep the step from being compiled.
    scratch = nullcontext() if measured is None or torch.compiler.is_compiling() else measured.update()
    with exact_arithmetic({param.device.type for _, param in active}), scratch:
        step.run(watch)
    tally.take(watch)
    watch.require_finite()


class Step:
    """The updates of one step, in waves. All blocks of a wave share their collectives; those that are alike, a task.

    Gathered tensors and stacked gradients stay alive until the end of their wave. A wave has at most one payload of a
    collective of them, which bounds memory for models of any size. Up to that size, the whole model is one wave.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Divide the updates into waves, the same on every rank. Call this before anything changes.

        Blocks without elements are left out: means over nothing would write NaN into their state.
        """
        wanted = [(update, update.gather_requests()) for update in updates if not update.block.layout.empty]
        self._waves = list(packed(wanted, _held))

    def waves(self) -> list[list[Update]]:
        """Return the updates of every wave."""
        return [[each for each, _ in wave] for wave in self._waves]

    def run(self, watch: Watch) -> None:
        """Update all blocks. ``watch`` records what happens to the weights."""
        for wave in self._waves:
            run_tasks(_tasks(wave, gather([request for _, requests in wave for request in requests]), watch))


def _held(entry: tuple[Update, list[Gather]]) -> int:
    """Return the bytes that a block holds during its wave: what it gathers, its gradient if that is stacked, scratch.

    Ranks may have other blocks that are not sharded. These are finished one batch after the other.
    """
    (update, requests), block = entry, entry[0].block
    own = 0
    if block.layout.sharded:
        own = block.scratch(update.step) + (block.share * block.layout.dtype.itemsize if block.small else 0)
    return sum(request.nbytes for request in requests) + own


def _tasks(wave: list[tuple[Update, list[Gather]]], gathered: list[Tensor], watch: Watch) -> Iterator[Task]:
    batches: dict[Hashable, list[tuple[Update, list[Tensor]]]] = {}
    for each, requests in wave:
        mine, gathered = gathered[: len(requests)], gathered[len(requests) :]
        batches.setdefault(each.alike(), []).append((each, mine))
    for batch in batches.values():
        # What the kinds stack is as large as the state. The sizes are global, so all ranks split a batch alike.
        first = batch[0][0]
        nbytes = first.block.stacked_bytes + first.block.scratch(first.step)
        for part in packed(batch, lambda entry, nbytes=nbytes: nbytes):  # type: ignore[misc]
            yield update([each for each, _ in part], [tensors for _, tensors in part], watch)
