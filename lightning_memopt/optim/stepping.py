"""One step of all blocks: gathers in waves of bounded size, and the updates that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Tally, Watch
from lightning_memopt.optim.guards import exact_arithmetic
from lightning_memopt.sharding.collectives import Gather, Task, gather, packed, run_tasks


def take_step(
    active: Sequence[tuple[dict[str, Any], Tensor]],
    blocks: Mapping[Tensor, Sequence[Block]],
    states: Mapping[Tensor, dict[str, Tensor]],
    tally: Tally,
) -> None:
    """Update all parameters whose gradients have been checked.

    Args:
        active: Parameters with their groups.
        blocks: Parameter → its blocks.
        states: Parameter → its state.
        tally: Counts the elements that the bound changes.

    Raises:
        FloatingPointError: If a weight would become infinite or NaN. It keeps its value.
    """
    step = Step(Update(block, param, states[param], group) for group, param in active for block in blocks[param])
    for _, param in active:
        states[param]["step"] += 1
    watch = tally.watch(states[param]["step"] for _, param in active)
    with exact_arithmetic({param.device.type for _, param in active}):
        step.run(watch)
    tally.take(watch)
    watch.require_finite()


@dataclass(frozen=True)
class Update:
    """One block and the inputs of its update.

    Attributes:
        block: The block.
        param: Its parameter, which has a gradient.
        state: The parameter's state.
        group: The parameter's group.
    """

    block: Block
    param: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]

    def gather_requests(self) -> list[Gather]:
        """Return the gathers that the update needs."""
        assert self.param.grad is not None
        return self.block.gather_requests(self.param.grad, self.state)

    def task(self, gathered: Sequence[Tensor], watch: Watch) -> Task:
        """Return the update as a task for ``run_tasks``."""
        assert self.param.grad is not None
        step = int(self.state["step"].item())
        return self.block.update(self.param, self.param.grad, self.state, self.group, step, gathered, watch)


class Step:
    """The updates of one step, in waves. All blocks of a wave share their collectives.

    Gathered tensors stay alive until the end of their wave. A wave gathers at most one payload of a collective, which
    bounds memory for models of any size. Up to that size, the whole model is one wave.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Divide the updates into waves, the same on every rank. Call this before anything changes.

        Blocks without elements are left out: means over nothing would write NaN into their state.
        """
        wanted = [(update, update.gather_requests()) for update in updates if not update.block.layout.empty]
        self._waves = list(packed(wanted, lambda entry: sum(request.nbytes for request in entry[1])))

    def run(self, watch: Watch) -> None:
        """Update all blocks. ``watch`` records what happens to the weights."""
        for wave in self._waves:
            run_tasks(_tasks(wave, gather([request for _, requests in wave for request in requests]), watch))


def _tasks(wave: list[tuple[Update, list[Gather]]], gathered: list[Tensor], watch: Watch) -> Iterable[Task]:
    for update, requests in wave:
        mine, gathered = gathered[: len(requests)], gathered[len(requests) :]
        yield update.task(mine, watch)
