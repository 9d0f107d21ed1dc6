"""The order of training data: the same on any number of processes, and continued where it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableLoader(DataLoader[Any]):
    """Batches in a shuffled order that depends on the seed alone, and that a checkpoint remembers.

    All processes together take the next examples of this order in every step. So a step has the same examples on any
    number of processes, as long as ``batch_size * num_replicas`` is the same. Every epoch has an order of its own.

    Args:
        dataset: Where examples come from.
        batch_size: Examples per batch and process.
        num_replicas: Number of processes that share the data.
        rank: Of this process among them.
        seed: The same on all processes.
        **kwargs: Other arguments of the loader.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int, rank: int, seed: int = 0, **kwargs: Any
    ) -> None:
        order = _Order(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        super().__init__(dataset, batch_size, sampler=order, drop_last=True, **kwargs)
        self._order, self._step = order, batch_size * num_replicas  # all batches are whole

    def __iter__(self) -> Any:
        """Yield the rest of the epoch after a resume, and whole epochs from then on."""
        for number, batch in enumerate(super().__iter__(), self._order.start // self._step + 1):
            # Before the batch is used: a Trainer does not ask for more after the last batch.
            ends = number == len(self)
            self.load_state_dict(
                {
                    "epoch": self._order.epoch + ends,
                    "examples": 0 if ends else number * self._step,
                }
            )
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many examples of it all processes together have got."""
        return {"epoch": self._order.epoch, "examples": self._order.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after these examples, whatever the number of processes was."""
        self._order.epoch, self._order.start = state["epoch"], state["examples"]


def data_ranks(of: Any) -> dict[str, int]:
    """Return how many processes share the data, and which of them this is: ``num_replicas`` and ``rank``.

    With tensor parallelism, several processes compute one batch together: they are one of these.

    Args:
        of: A Trainer, or the strategy of Fabric.
    """
    return getattr(of, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}


class ResumableDataModule(LightningDataModule):
    """A data module whose checkpoints hold the place in the training data.

    Lightning saves the state of loaders, too, but does not restore it at the end of an epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._train: ResumableLoader | None = None
        self._place: dict[str, int] = {}

    @property
    def ranks(self) -> dict[str, int]:
        """How many processes share the data, and which of them this is, as `data_ranks` says."""
        return data_ranks(self.trainer)

    def resumable(self, dataset: Any, batch_size: int, seed: int, **kwargs: Any) -> ResumableLoader:
        """Return the loader of the training data, at the place of the checkpoint if there is one."""
        place = self.state_dict()
        self._train = ResumableLoader(dataset, batch_size, **self.ranks, seed=seed, **kwargs)
        if place:
            self._train.load_state_dict(place)
        return self._train

    def state_dict(self) -> dict[str, int]:
        """Return the place in the training data."""
        return self._place if self._train is None else self._train.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a place, in the loader that is made next."""
        self._place, self._train = state, None


class _Order(DistributedSampler[Any]):
    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start // self.num_replicas, None)

    def set_epoch(self, epoch: int) -> None:
        """Keep the loader's own count: Lightning's is one too high after a run that ended within an epoch."""
