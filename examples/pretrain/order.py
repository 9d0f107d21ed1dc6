"""The order of training data: the same on any number of processes, and continued where it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableLoader(DataLoader[Any]):
    """Batches in a shuffled order that depends on the seed alone, and that a checkpoint remembers.

    All processes together take the next examples of this order in every step. So a step has the same examples on any
    number of processes, as long as ``batch_size * num_replicas`` is the same. Every epoch has an order of its own.
    Lightning saves the state of a loader that has ``state_dict``.

    Args:
        dataset: Where examples come from.
        batch_size: Examples per batch and process.
        num_replicas: Number of processes.
        rank: Of this process.
        seed: The same on all processes.
        **kwargs: Other arguments of the loader.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int, rank: int, seed: int = 0, **kwargs: Any
    ) -> None:
        order = _Order(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        super().__init__(dataset, batch_size, sampler=order, drop_last=True, **kwargs)
        self._order, self._size = order, batch_size
        self._given = 0  # examples of this epoch that all processes together have got

    def __iter__(self) -> Any:
        """Yield the rest of the epoch after a resume, and whole epochs from then on."""
        for batch in super().__iter__():
            self._given += self._order.num_replicas * self._size
            yield batch
        self.load_state_dict({"epoch": self._order.epoch + 1, "examples": 0})

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many examples of it all processes together have got."""
        return {"epoch": self._order.epoch, "examples": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after these examples, whatever the number of processes was."""
        self._order.epoch = state["epoch"]
        self._given = self._order.start = state["examples"]


class _Order(DistributedSampler[Any]):
    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start // self.num_replicas, None)

    def set_epoch(self, epoch: int) -> None:
        """Keep the loader's own count: Lightning's is one too high after a run that ended within an epoch."""
