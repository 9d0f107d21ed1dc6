"""How many ranks there are, and that all are about to do the same, checked before any of them does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memopt.sharding.layout import Layout

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes in the job: 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process in the job."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def largest(values: Tensor, layout: Layout) -> Tensor:
    """Return, for every value, the largest that a rank of the layout's mesh has; in place.

    One collective, or one per dimension of a mesh that is only a part of the job.
    """
    groups = layout.mesh_groups()
    if len(groups) > 1 and layout.mesh.size() == world_size():
        groups = [dist.group.WORLD]
    for group in groups:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def decided_alike(
    what: str,
    decide: Callable[[], T],
    lines: Callable[[T], Sequence[str]],
    groups: Sequence[Any],
    device: torch.device,
) -> T:
    """Return what this rank decides, once it is known that all ranks decide the same.

    Args:
        what: As in :func:`require_same`.
        decide: Decides, and may raise.
        lines: What a decision is compared by.
        groups: As in :func:`require_same`; none where there is nobody to agree with.
        device: As in :func:`require_same`.

    Raises:
        Exception: Whatever `decide` raised on this rank.
        RuntimeError: If another rank raised or decided otherwise.
    """
    error = None
    try:
        decision = decide()
        found = list(lines(decision))
    except Exception as caught:  # whatever it is, other ranks must hear of it
        error, found = caught, [f"{type(caught).__name__}: {caught}"]
    if groups:
        try:
            require_same(what, found, groups, device)
        except RuntimeError:
            if error is None:
                raise
    if error is not None:
        raise error
    return decision


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
