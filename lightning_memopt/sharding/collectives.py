"""Numbers from other ranks: kinds ``yield`` requests, :func:`run_tasks` answers them for all blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memopt.sharding.layout import Cut, Layout

# Payload of one collective, in bytes. More is sent in several, so that the buffers stay bounded.
MAX_PAYLOAD = 64 << 20

# torch 2.13 renamed it and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """The request "add this up over the ranks that share dimension ``over`` of the block".

    Attributes:
        value: What this rank summed over its own part of that dimension.
        layout: The block's layout; where it does not shard ``over``, the value comes back as it is.
        over: ``-2`` for the rows, ``-1`` for the columns, ``-3`` for the stack.
    """

    value: Tensor
    layout: Layout
    over: int


@dataclass(frozen=True)
class Gather:
    """The request "put the ranks' pieces together"; what a block's state and gradient are prepared with.

    Attributes:
        value: This rank's piece.
        cut: How the whole is cut.
        nbytes: Bytes of the whole, over all ranks that share it: the same on all of them.
    """

    value: Tensor
    cut: Cut
    nbytes: int


Flight = tuple[Any, torch.dtype, torch.device]


class Pending:
    """A sum that has been asked for, and its answer once there is one."""

    def __init__(self, asked: Sum, group: Any) -> None:
        """Ask; ``group`` is the one process group over which the dimension is divided."""
        self.value, self.group, self.answered = asked.value, group, False

    @property
    def flight(self) -> Flight:
        """Return what has to be equal for sums to share a collective."""
        return self.group, self.value.dtype, self.value.device


Requests = tuple[Pending, ...]
Task = Generator[Requests, None, Any]


def request(*sums: Sum) -> Generator[Requests, None, tuple[Tensor, ...]]:
    """Ask for several sums at once; nothing is suspended where nothing is sharded.

    A task yields what it waits for and is resumed when some of it is answered. No full-size tensor may be alive in the
    caller when it asks: all blocks wait here together.
    """
    groups = [entry.layout.group(entry.over) for entry in sums]
    asked = [Pending(entry, group) if group is not None else None for entry, group in zip(sums, groups, strict=True)]
    values = [None if pending else entry.value for entry, pending in zip(sums, asked, strict=True)]
    del sums
    while waiting := tuple(pending for pending in asked if pending is not None and not pending.answered):
        yield waiting
    return tuple(pending.value if pending else value for pending, value in zip(asked, values, strict=True))  # type: ignore[misc]


def interleave(*tasks: Task) -> Generator[Requests, None, tuple[Any, ...]]:
    """Run several tasks side by side, so that their requests share collectives; return their results in order."""
    results: list[Any] = [None] * len(tasks)
    waiting: dict[int, Requests] = {}

    def advance(position: int) -> None:
        waiting.pop(position, None)
        try:
            waiting[position] = next(tasks[position])
        except StopIteration as stop:
            results[position] = stop.value

    for position in range(len(tasks)):
        advance(position)
    while waiting:
        yield tuple(pending for position in sorted(waiting) for pending in waiting[position])
        for position in sorted(waiting):
            if any(pending.answered for pending in waiting[position]):
                advance(position)
    return tuple(results)


def run_tasks(tasks: Iterable[Task]) -> None:
    """Run the tasks of all blocks to their end, with as few collectives as their requests allow.

    A task that never asks for a sharded number runs through before the next one starts: a single process works
    block by block and holds the temporaries of one block only.
    """
    waiting: list[tuple[Task, Requests]] = []
    for task in tasks:
        _advance(task, waiting)
    while waiting:
        asked = [requests for _, requests in waiting]
        flight = _next_flight(asked)
        _sum([pending for requests in asked for pending in requests if pending.flight == flight])
        previous, waiting = waiting, []
        for task, requests in previous:
            if any(pending.answered for pending in requests):
                _advance(task, waiting)
            else:
                waiting.append((task, requests))


def _advance(task: Task, waiting: list[tuple[Task, Requests]]) -> None:
    requests = next(task, None)
    if requests is not None:
        waiting.append((task, requests))


def _next_flight(asked: list[Requests]) -> Flight:
    """Return which collective comes next.

    Sums of different dtypes cannot share one. The kinds' requests come in the order "float32, float64, float32" or in
    a part of it: float32 goes first only if a task waits for nothing else, so that all blocks together need no more
    collectives than that.
    """
    flights = dict.fromkeys(pending.flight for requests in asked for pending in requests)
    stuck = {requests[0].flight for requests in asked if len({pending.flight for pending in requests}) == 1}
    small_first = sorted((flight for flight in flights if flight in stuck), key=lambda flight: flight[1].itemsize)
    return small_first[0] if small_first else max(flights, key=lambda flight: flight[1].itemsize)


def _sum(flight: Sequence[Pending]) -> None:
    """Answer sums over one group, of one dtype; every rank has the same in the same order, empty shards included."""
    for some in packed(flight, lambda pending: pending.value.nbytes):
        flat = torch.cat([pending.value.reshape(-1) for pending in some])
        for part in flat.split(MAX_PAYLOAD // flat.element_size()):
            dist.all_reduce(part, group=some[0].group)
        parts = flat.split([pending.value.numel() for pending in some])
        for pending, part in zip(some, parts, strict=True):
            pending.value, pending.answered = part.view_as(pending.value), True


def gather(wanted: Sequence[Gather]) -> list[Tensor]:
    """Return the whole of every tensor, with one collective per group and device while the payload is bounded."""
    whole: list[Any] = [None] * len(wanted)
    flights = [(entry.cut.group, entry.value.device) for entry in wanted]
    for flight in dict.fromkeys(flights):
        mine = [position for position, entry in enumerate(flights) if entry == flight]
        for some in packed(mine, lambda position: wanted[position].nbytes):
            for position, tensor in zip(some, _gather([wanted[position] for position in some]), strict=True):
                whole[position] = tensor
    return whole


def _gather(wanted: list[Gather]) -> list[Tensor]:
    """Gather tensors of one group, of any dtype: bytes, every piece as long as the longest."""
    first = wanted[0]
    count = len(first.cut.sizes)
    shapes = [_padded(entry) for entry in wanted]
    spans = [_aligned(shape.numel() * entry.value.element_size()) for shape, entry in zip(shapes, wanted, strict=True)]
    device = first.value.device
    sent = torch.zeros(sum(spans), dtype=torch.uint8, device=device)
    for entry, part in zip(wanted, sent.split(spans), strict=True):
        part[: entry.value.nbytes].copy_(entry.value.contiguous().view(-1).view(torch.uint8))
    received = torch.empty((count, sent.numel()), dtype=torch.uint8, device=device)
    for mine, theirs in zip(sent.split(MAX_PAYLOAD // count), received.split(MAX_PAYLOAD // count, dim=1), strict=True):
        buffer = torch.empty(theirs.shape, dtype=torch.uint8, device=device)
        _all_gather(buffer.view(-1), mine, group=first.cut.group)
        theirs.copy_(buffer)
    found, start = [], 0
    for entry, span in zip(wanted, spans, strict=True):
        pieces = []
        for rank, size in enumerate(entry.cut.sizes):
            shape = [size if dim == entry.cut.dim else length for dim, length in enumerate(entry.value.shape)]
            used = torch.Size(shape).numel() * entry.value.element_size()
            pieces.append(received[rank, start : start + used].view(entry.value.dtype).view(shape))
        found.append(torch.cat(pieces, dim=entry.cut.dim))
        start += span
    return found


def _padded(entry: Gather) -> torch.Size:
    """Return the shape of the longest piece."""
    longest = max(entry.cut.sizes)
    return torch.Size(longest if dim == entry.cut.dim else size for dim, size in enumerate(entry.value.shape))


def _aligned(nbytes: int) -> int:
    """Return a size at which a tensor of any dtype may start after this one."""
    return -(-nbytes // 8) * 8


def packed(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut a sequence into runs of at most ``MAX_PAYLOAD`` bytes; an item of more is a run of its own."""
    run: list[T] = []
    total = 0
    for item in items:
        size = nbytes(item)
        if run and total + size > MAX_PAYLOAD:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run
