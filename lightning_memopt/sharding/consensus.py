"""The number of ranks, and checks that all ranks are about to do the same."""

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
    """Return the number of processes in the job, or 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process in the job."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def largest(values: Tensor, layout: Layout) -> Tensor:
    """Replace every value by its maximum over the ranks of the layout's mesh. Works in place.

    Takes one collective, or one per mesh dimension if the mesh is only a part of the job.
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
    """Return this rank's decision after checking that all ranks decide the same.

    Args:
        what: As in :func:`require_same`.
        decide: Makes the decision; may raise.
        lines: Returns the lines by which decisions are compared.
        groups: As in :func:`require_same`. Empty if this rank is on its own.
        device: As in :func:`require_same`.

    Raises:
        Exception: Any exception that `decide` raised on this rank.
        RuntimeError: If another rank raised or decided otherwise.
    """
    error = None
    try:
        decision = decide()
        found = list(lines(decision))
    except Exception as caught:  # of any type: the other ranks must know
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
    """Check that all ranks have the same lines. If they do, this takes one collective of 16 bytes per group.

    Args:
        what: The subject of the lines, for the message.
        lines: The lines to compare.
        groups: The process groups that connect the ranks, such as those of all dimensions of a mesh.
        device: A device from which the groups can send.

    Raises:
        RuntimeError: On all ranks, if the lines differ. The message names the first difference.
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
    raise RuntimeError(
        f"{_difference(what, found)} Nothing has changed. Base decisions on numbers that all ranks share."
    )


def _difference(what: str, found: list[tuple[int, list[str]]]) -> str:
    """Return a sentence about the first line that differs between the first rank and another one."""
    first, mine = min(found)
    other, theirs = next(entry for entry in sorted(found) if entry[1] != mine)
    ours, its = next(pair for pair in zip_longest(mine, theirs, fillvalue="nothing") if pair[0] != pair[1])
    return f"Ranks disagree about {what}: rank {first} has {ours!r}, rank {other} has {its!r}."
