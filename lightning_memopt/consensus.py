"""How many ranks there are, and that all are about to do the same, checked before any of them does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Return the number of processes in the job: 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Return whether this is the process that speaks for the job."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def require_same(what: str, lines: Sequence[str], groups: Sequence[Any], device: torch.device) -> None:
    """Check that all ranks have the same lines; one collective of 16 bytes per group where they have.

    Args:
        what: What the lines are, for the message.
        lines: What is compared.
        groups: The process groups that connect the ranks, such as those of all dimensions of a mesh.
        device: A device that the groups can send from.

    Raises:
        RuntimeError: If they differ, on all ranks; the message names the first difference.
    """
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    if largest == -smallest:
        return
    found = [(dist.get_rank(), list(lines))]
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group=group)
        found = [entry for part in gathered for entry in part]
    raise RuntimeError(f"{_difference(what, found)} Nothing has changed. Decide from numbers that all ranks share.")


def _difference(what: str, found: list[tuple[int, list[str]]]) -> str:
    """Return a sentence on the first line that differs between the first rank and another."""
    first, mine = min(found)
    other, theirs = next(entry for entry in sorted(found) if entry[1] != mine)
    ours, its = next(pair for pair in zip_longest(mine, theirs, fillvalue="nothing") if pair[0] != pair[1])
    return f"Ranks disagree about {what}: rank {first} has {ours!r}, rank {other} has {its!r}."
