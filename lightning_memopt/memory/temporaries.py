"""Temporary memory of operations, by storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.memory.storages import storages_of


class Temporaries(TorchDispatchMode):
    """Counts operations, and the largest number of bytes of storages made inside that live at one time.

    Work space inside an operation, such as a factorization, is not counted.

    Attributes:
        operations: Number of operations other than views.
        peak: The largest number of bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.peak, self._now = 0, 0, 0
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        given = {id(storage) for storage in storages_of((args, kwargs))}
        for storage in storages_of(out):
            if id(storage) not in given and id(storage) not in self._made:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def freed(reference: Any) -> None:
            del self._made[key]
            self._changed(key, -nbytes)

        self._made[key] = weakref.ref(storage, freed)
        self._changed(key, nbytes)

    def _changed(self, key: int, nbytes: int) -> None:
        """Count a storage that was made, or with negative bytes one that was freed."""
        self._now += nbytes
        self.peak = max(self.peak, self._now)


@dataclass
class StepMemory:
    """What exists only for a part of a training step, in bytes: the most at a time on this process.

    Attributes:
        unsharded: Units that FSDP2 has gathered, their gradients before these are reduced, and the buffers of both.
        scratch: Temporaries of the optimizers' updates.
    """

    unsharded: int = 0
    scratch: int = 0

    @contextmanager
    def update(self) -> Iterator[None]:
        """Count the temporaries of an update."""
        with Temporaries() as temporaries:
            try:
                yield
            finally:
                self.scratch = max(self.scratch, temporaries.peak)
