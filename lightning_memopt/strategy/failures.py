"""Which rank failed first: told on the others, which only see that their connections break."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_memopt.strategy.agreement import rank_and_size

PATIENCE = 2.0  # seconds that a rank waits for the report of another
LONGEST = 500  # characters of a report

_numbers = itertools.count()  # all ranks make these objects together, so that they count alike


class FirstFailure:
    """The report of the first rank that fails, in the store of the process group."""

    def __init__(self) -> None:
        self._key = f"lightning_memopt/first_failure/{next(_numbers)}"

    def share(self, error: BaseException) -> None:
        """Report an error to the other ranks; to one that only says that another rank is gone, add that one's report.

        Does nothing where the store does not answer, such as when the process that keeps it has died.
        """
        if rank_and_size()[1] == 1 or isinstance(error, SIGTERMException):
            return
        found: list[str] = []
        # Nothing limits how long a store takes if its host cannot be reached.
        thread = threading.Thread(target=self._exchange, args=(error, found), daemon=True)
        thread.start()
        thread.join(PATIENCE + 1)
        if found:
            error.add_note(f"{found[0]} What this rank raised came of that.")

    def _exchange(self, error: BaseException, found: list[str]) -> None:
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            if not _is_of_backend(error):
                store.compare_set(self._key, "", _report(error))
                return
            end = time.monotonic() + PATIENCE
            while not store.check([self._key]) and time.monotonic() < end:
                time.sleep(0.05)
            if store.check([self._key]):
                found.append(store.get(self._key).decode())


def _is_of_backend(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, is about the connections between ranks."""
    while error is not None:
        # What gloo raises has no class of its own, but the path of its source.
        if isinstance(error, dist.DistError) or "third_party/gloo" in str(error):
            return True
        error = error.__cause__
    return False


def _report(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"Rank {dist.get_rank()} raised {type(error).__name__}{f': {lines[0]}' if lines else ''}."[:LONGEST]
