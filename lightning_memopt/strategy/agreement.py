"""Raise errors of one rank on all ranks, so that no rank waits in a collective for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """Return this process's rank in the group and the size of the group; 0 and 1 without process groups."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def on_all(action: Callable[[], T], group: Any = None) -> list[T]:
    """Run a function on every rank and return the results of all ranks, in order of rank, on every rank.

    Args:
        action: The function. Its result must be picklable.
        group: The process group; None for all ranks.

    Raises:
        Exception: The error that a rank raised, on all ranks. A note names the rank.
    """
    rank, size = rank_and_size(group)
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        error = caught
    outcomes: list[Any] = [None] * size
    if size > 1:
        # torch sends the objects from the device of the group's backend, and selects that device itself.
        dist.all_gather_object(outcomes, (result, _portable(error)), group=group)
    if error is not None:
        raise error
    for other, (_, failure) in enumerate(outcomes if size > 1 else []):
        if failure is not None:
            failure.add_note(f"This happened on rank {other}.")
            raise failure
    return [value for value, _ in outcomes] if size > 1 else [result]  # type: ignore[list-item]


def on_first(action: Callable[[], T], group: Any = None) -> T:
    """Run a function on the first rank and return its result on every rank.

    Raises:
        Exception: The error that the function raised, on all ranks.
    """
    rank, _ = rank_and_size(group)
    return on_all(lambda: action() if rank == 0 else None, group)[0]  # type: ignore[return-value]


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an exception that is picklable, without its traceback."""
    if error is None or type(error).__module__ in ("builtins", "_pickle"):
        return error
    return RuntimeError(describe(error))


def describe(error: BaseException) -> str:
    """Return a one-line description of an error, with the ranks it occurred on if torch's checkpointing names them."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"{describe(cause)} (rank {rank})" for rank, (cause, _) in sorted(error.failures.items()))
    return f"{type(error).__name__}: {error}"
