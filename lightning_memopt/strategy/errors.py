"""Explain torch's errors about sharded weights, and report to all ranks which of them failed first."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_memopt.strategy.agreement import rank_and_size

_MIXED, _FREED = "got mixed torch.Tensor and DTensor", "its data is not allocated yet"


def explain(error: BaseException, model: nn.Module | None) -> None:
    """Add a note to torch's error about a sharded weight or gradient that says how to gather it."""
    if model is None or not isinstance(error, RuntimeError):
        return
    if _MIXED in str(error):
        units = ", ".join(repr(name) for name in outermost_units(model))
        error.add_note(
            f"The weights of {type(model).__name__} are sharded, and gathered only while the `forward` of a unit runs; "
            f"its outermost units are {units}. Call these instead of their submodules or weights, or register another "
            "method that gathers them: torch.distributed.fsdp.register_fsdp_forward_method(unit, 'method') in "
            "`on_fit_start`. `lightning_memopt.full_state_dict` returns full weights."
        )
    elif _FREED in str(error):
        error.add_note(
            "Weights and gradients are sharded: use `lightning_memopt.grad_norm(module)` instead of Lightning's "
            "`grad_norm`, and `lightning_memopt.full_state_dict(module)` for full weights."
        )


def outermost_units(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the names of the sharded modules that are not inside another sharded module."""
    for name, child in model.named_children():
        if isinstance(child, FSDPModule):
            yield prefix + name
        else:
            yield from outermost_units(child, f"{prefix}{name}.")


PATIENCE = 5.0  # seconds that a rank waits for another rank's report
LONGEST = 500  # characters in a report

_numbers = itertools.count()  # all ranks create these objects together, so their counts agree


class FirstFailure:
    """The report of the first rank that fails, kept in the store of the process group."""

    def __init__(self) -> None:
        self._key = f"lightning_memopt/first_failure/{next(_numbers)}"

    def share(self, error: BaseException) -> None:
        """Report an error to the other ranks. If the error only says that another rank is gone, add that rank's report.

        Has no effect if the store does not answer, for example because the process that hosts it has died.
        """
        if rank_and_size()[1] == 1 or isinstance(error, SIGTERMException):
            return
        found: list[str] = []
        # A store has no time limit if its host cannot be reached.
        thread = threading.Thread(target=self._exchange, args=(error, found), daemon=True)
        thread.start()
        thread.join(PATIENCE + 1)
        if found:
            error.add_note(f"{found[0]} The error on this rank is a consequence.")

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
    """Return whether an error, or one of its causes, is about the connections between ranks."""
    while error is not None:
        # gloo's errors have no class of their own, but their message holds the path of gloo's source.
        if isinstance(error, dist.DistError) or "third_party/gloo" in str(error):
            return True
        error = error.__cause__
    return False


def _report(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"Rank {dist.get_rank()} raised {type(error).__name__}{f': {lines[0]}' if lines else ''}."[:LONGEST]
