"""One step of all blocks: what ranks gather, in waves of bounded size, and the updates that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounding import Tally, Watch
from lightning_memopt.optim.guards import exact_arithmetic
from lightning_memopt.sharding.collectives import Gather, Task, gather, packed, run_tasks


def take_step(
    active: Sequence[tuple[dict[str, Any], Tensor]],
    blocks: Mapping[Tensor, Sequence[Block]],
    states: Mapping[Tensor, dict[str, Tensor]],
    tally: Tally,
) -> None:
    """Update all parameters that have a gradient, which has been checked.

    Args:
        active: Parameters with their groups.
        blocks: Parameter → its blocks.
        states: Parameter → its state.
        tally: Counts what the bound changes.

    Raises:
        FloatingPointError: If a weight would have become infinite or undefined; it keeps its value.
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
    """One block and what its update needs.

    Attributes:
        block: The block.
        param: Its parameter, which has a gradient.
        state: The parameter's state.
        group: The parameter's hyperparameters.
    """

    block: Block
    param: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]

    def gather_requests(self) -> list[Gather]:
        """Return what ranks have to put together first."""
        assert self.param.grad is not None
        return self.block.gather_requests(self.param.grad, self.state)

    def task(self, gathered: Sequence[Tensor], watch: Watch) -> Task:
        """Return the update as a task for ``run_tasks``."""
        assert self.param.grad is not None
        step = int(self.state["step"].item())
        return self.block.update(self.param, self.param.grad, self.state, self.group, step, gathered, watch)


class Step:
    """The updates of one step, in waves: all blocks of a wave share their collectives.

    What blocks gather is alive until their wave is done. A wave gathers no more than one collective carries, so that
    memory stays bounded however large the model is; up to that size the whole model is one wave.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Divide the updates, which nothing has changed yet, into waves: the same on every rank.

        Blocks without elements have none: means over nothing would put NaN into their state.
        """
        wanted = [(update, update.gather_requests()) for update in updates if not update.block.layout.empty]
        self._waves = list(packed(wanted, lambda entry: sum(request.nbytes for request in entry[1])))

    def run(self, watch: Watch) -> None:
        """Update all blocks; ``watch`` sees what becomes of the weights."""
        for wave in self._waves:
            run_tasks(_tasks(wave, gather([request for _, requests in wave for request in requests]), watch))


def _tasks(wave: list[tuple[Update, list[Gather]]], gathered: list[Tensor], watch: Watch) -> Iterable[Task]:
    for update, requests in wave:
        mine, gathered = gathered[: len(requests)], gathered[len(requests) :]
        yield update.task(mine, watch)
