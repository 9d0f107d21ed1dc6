"""One step of all blocks: what ranks gather, in waves of bounded size, and the updates that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_memopt.block import Block
from lightning_memopt.bounding import Watch
from lightning_memopt.collectives import Gather, Task, drive, gather, packed


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

    def wants(self) -> list[Gather]:
        """Return what ranks have to put together first."""
        assert self.param.grad is not None
        return self.block.wants(self.param.grad, self.state)

    def task(self, gathered: Sequence[Tensor], watch: Watch) -> Task:
        """Return the update as a task for ``drive``."""
        assert self.param.grad is not None
        step = int(self.state["step"].item())
        return self.block.update(self.param, self.param.grad, self.state, self.group, step, gathered, watch)


class Step:
    """The updates of one step, in waves: all blocks of a wave share their collectives.

    What blocks gather is alive until their wave is done. A wave gathers no more than one collective carries, so that
    memory stays bounded however large the model is; up to that size the whole model is one wave.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        """Divide the updates, which nothing has changed yet, into waves: the same on every rank."""
        wanted = [(update, update.wants()) for update in updates]
        self._waves = list(packed(wanted, lambda entry: sum(request.nbytes for request in entry[1])))
        self._gathered: list[Tensor] | None = None

    def begin(self, also: Sequence[Gather] = ()) -> list[Tensor]:
        """Gather for the first wave, and ``also`` in the same collective; return the latter."""
        wanted = [request for _, requests in self._waves[0] for request in requests] if self._waves else []
        found = gather([*also, *wanted])
        self._gathered = found[len(also) :]
        return found[: len(also)]

    def run(self, watch: Watch) -> None:
        """Update all blocks; ``watch`` sees what becomes of the weights."""
        for wave in self._waves:
            if self._gathered is None:
                self._gathered = gather([request for _, requests in wave for request in requests])
            found, self._gathered = self._gathered, None
            drive(_tasks(wave, found, watch))


def _tasks(wave: list[tuple[Update, list[Gather]]], gathered: list[Tensor], watch: Watch) -> Iterable[Task]:
    for update, requests in wave:
        mine, gathered = gathered[: len(requests)], gathered[len(requests) :]
        yield update.task(mine, watch)
