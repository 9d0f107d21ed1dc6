"""The number of ranks, and checks that all ranks are about to do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    If they do, this takes one collective of 16 bytes per group.

    Args:
        what: What is decided, for the message.
        decide: Makes the decision; may raise.
        lines: Returns the lines by which decisions are compared.
        groups: The process groups that connect the ranks, such as those of all dimensions of a mesh. Empty if this
            rank is on its own.
        device: A device from which the groups can send.

    Raises:
        Exception: Any exception that `decide` raised on this rank.
        RuntimeError: On the other ranks, if one raised, with its number and its error. On all ranks, if they decided
            otherwise; the message names the first difference.
    """
    error: Exception | None = None
    found: list[str] = []
    try:
        decision = decide()
        found = list(lines(decision))
    except Exception as caught:  # of any type: the other ranks must know
        error = caught
    everyone = _if_different(_Found(rank(), found, "" if error is None else _named(error)), groups, device)
    if error is not None:
        raise error
    failed = [entry for entry in everyone if entry.error]
    if failed:
        raise RuntimeError(
            f"Rank {failed[0].rank} could not decide about {what}: {failed[0].error} Nothing has changed."
        )
    if everyone:
        raise RuntimeError(
            f"{_difference(what, everyone)} Nothing has changed. Base decisions on numbers that all ranks share."
        )
    return decision


@dataclass(frozen=True)
class _Found:
    """What one rank has decided, in lines, or the error that kept it from it."""

    rank: int
    lines: list[str]
    error: str


def _named(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _if_different(mine: _Found, groups: Sequence[Any], device: torch.device) -> list[_Found]:
    """Return what all ranks have found, by rank; nothing if it is the same."""
    if not groups:
        return []
    digest = hashlib.blake2b("\n".join([mine.error, *mine.lines]).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    if largest == -smallest:
        return []
    found = {mine.rank: mine}
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group=group)
        found = {number: entry for part in gathered for number, entry in part.items()}
    return [found[number] for number in sorted(found)]


def _difference(what: str, found: Sequence[_Found]) -> str:
    """Return a sentence about the first line that differs between the first rank and another one."""
    first = found[0]
    other = next(entry for entry in found if entry.lines != first.lines)
    ours, its = next(pair for pair in zip_longest(first.lines, other.lines, fillvalue="nothing") if pair[0] != pair[1])
    return f"Ranks disagree about {what}: rank {first.rank} has {ours!r}, rank {other.rank} has {its!r}."
