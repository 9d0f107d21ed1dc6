"""Collectives for kinds. Kinds ``yield`` requests, and :func:`run_tasks` answers them for all blocks together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memopt.sharding.layout import Cut, Layout

# Bytes per collective. Larger payloads are split over several collectives, which bounds the buffers.
MAX_PAYLOAD = 64 << 20

# torch 2.13 renamed this function and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """A request to sum a value over the ranks that share dimension ``over`` of the block.

    Attributes:
        value: The sum over this rank's part of that dimension.
        layout: The block's layout. If ``over`` is not sharded, the value is returned unchanged.
        over: ``-2`` for the rows, ``-1`` for the columns, ``-3`` for the stack.
        leads: Whether sums in float64 over the same ranks follow from the answer, so that it should come first.
    """

    value: Tensor
    layout: Layout
    over: int
    leads: bool = False


@dataclass(frozen=True)
class Gather:
    """A request to gather a tensor, such as a block's state or gradient before its update.

    Attributes:
        value: This rank's piece.
        cut: How the whole tensor is cut.
        nbytes: Bytes of the whole tensor, the same on all ranks that share it.
    """

    value: Tensor
    cut: Cut
    nbytes: int


Flight = tuple[Any, torch.dtype, torch.device]


class Pending:
    """A requested sum, and its answer after the collective."""

    def __init__(self, asked: Sum, group: Any) -> None:
        """Store the request. ``group`` is the process group that divides the dimension."""
        self.value, self.group, self.answered = asked.value, group, False
        self.layout, self.leads = asked.layout, asked.leads

    @property
    def flight(self) -> Flight:
        """The key that sums must share to use the same collective."""
        return self.group, self.value.dtype, self.value.device


Requests = tuple[Pending, ...]
Task = Generator[Requests, None, Any]


def request(*sums: Sum) -> Generator[Requests, None, tuple[Tensor, ...]]:
    """Request several sums together. Returns without suspending if none of them is sharded.

    A task yields the sums that it waits for, and resumes when some of them are answered. The caller must not hold a
    full-size tensor during a request, because all blocks wait here at the same time.
    """
    groups = [entry.layout.group(entry.over) for entry in sums]
    asked = [Pending(entry, group) if group is not None else None for entry, group in zip(sums, groups, strict=True)]
    values = [None if pending else entry.value for entry, pending in zip(sums, asked, strict=True)]
    del sums
    while waiting := tuple(pending for pending in asked if pending is not None and not pending.answered):
        yield waiting
    return tuple(pending.value if pending else value for pending, value in zip(asked, values, strict=True))  # type: ignore[misc]


def interleave(*tasks: Task) -> Generator[Requests, None, tuple[Any, ...]]:
    """Run several tasks side by side so that their requests share collectives. Return their results in order."""
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


def finished(task: Task) -> Any:
    """Return the result of a task that requests no sharded sum."""
    try:
        next(task)
    except StopIteration as stop:
        return stop.value
    raise AssertionError


def run_tasks(tasks: Iterable[Task]) -> None:
    """Run the tasks of all blocks, with as few collectives as their requests allow.

    A task that requests no sharded sum completes before the next one starts. So a single process works block by block
    and holds the temporaries of one block only.
    """
    waiting: list[tuple[Task, Requests]] = []
    for task in tasks:
        _advance(task, waiting)
    turns = Turns()
    while waiting:
        asked = [requests for _, requests in waiting]
        flight = turns.next(asked)
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


class Turns:
    """Whose sums go next: process groups take turns, in the order of the mesh, and float64 goes before float32.

    Sums of different groups or dtypes cannot share a collective. With A and B as the groups, one of which divides rows
    and the other one columns, the turns are A32 B64 B32 A64, and again. Whatever a kind asks is a part of the first
    seven: low rank B64 B32 A64 A32, a new subspace A32 B64 B32 A64 A32, or either with A and B exchanged. So blocks of
    all kinds together need at most three collectives of A and four of B, and those of norms of a direction, which
    follow. All ranks of a group have parameters on the same meshes: the turns of one group depend on what is asked of
    the others.
    """

    def __init__(self) -> None:
        self._lanes: list[tuple[Any, torch.device]] = []
        self._turn: int | None = None

    def next(self, asked: list[Requests]) -> Flight:
        """Return the group, dtype and device of the next collective, and end its turn."""
        flights = {}
        for pending in (pending for requests in asked for pending in requests):
            flights[self._turn_of(pending)] = pending.flight
        if self._turn is None:
            # The first turn is only worth a collective if a block waits for nothing that comes later, or if what comes
            # later depends on it.
            first = [
                pending
                for requests in asked
                for pending in requests
                if pending.leads or all(_is_narrow(each.flight) for each in requests)
            ]
            self._turn = 1 if any(self._turn_of(pending) == 1 for pending in first) else 2
        begin, count = self._turn, 2 * len(self._lanes)
        turn = min(flights, key=lambda turn: (turn - begin) % count)
        self._turn = turn + 1
        return flights[turn]

    def _turn_of(self, pending: Pending) -> int:
        lane = (pending.group, pending.value.device)
        if lane not in self._lanes:
            lanes = [(group, pending.value.device) for group in pending.layout.matrix_groups()]
            self._lanes += [each for each in dict.fromkeys((*lanes, lane)) if each not in self._lanes]
        return 2 * self._lanes.index(lane) + _is_narrow(pending.flight)


def _is_narrow(flight: Flight) -> bool:
    return flight[1].itemsize < torch.float64.itemsize


def _sum(flight: Sequence[Pending]) -> None:
    """Answer sums of one group and dtype. Every rank has the same ones in the same order, even with empty shards."""
    for batch in packed(flight, lambda pending: pending.value.nbytes):
        flat = torch.cat([pending.value.reshape(-1) for pending in batch])
        for part in flat.split(MAX_PAYLOAD // flat.element_size()):
            dist.all_reduce(part, group=batch[0].group)
        parts = flat.split([pending.value.numel() for pending in batch])
        for pending, part in zip(batch, parts, strict=True):
            pending.value, pending.answered = part.view_as(pending.value), True


def gather(wanted: Sequence[Gather]) -> list[Tensor]:
    """Return the whole tensors, with one collective per group and device unless the payload is too large."""
    whole: list[Any] = [None] * len(wanted)
    flights = [(entry.cut.group, entry.value.device) for entry in wanted]
    for flight in dict.fromkeys(flights):
        mine = [position for position, entry in enumerate(flights) if entry == flight]
        for batch in packed(mine, lambda position: wanted[position].nbytes):
            for position, tensor in zip(batch, _gather([wanted[position] for position in batch]), strict=True):
                whole[position] = tensor
    return whole


def _gather(wanted: list[Gather]) -> list[Tensor]:
    """Gather tensors of one group and any dtype, as bytes. Every piece is padded to the longest one."""
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
    return [_assembled(entry, part) for entry, part in zip(wanted, received.split(spans, dim=1), strict=True)]


def _assembled(entry: Gather, received: Tensor) -> Tensor:
    """Return the whole tensor from the bytes of every rank: ``[ranks, bytes]``.

    Pieces of one length are copied together. One by one, they would take thousands of operations on many ranks.
    """
    dim, value = entry.cut.dim, entry.value
    whole = value.new_empty((*value.shape[:dim], sum(entry.cut.sizes), *value.shape[dim + 1 :]))
    rank = start = 0
    for size, alike in itertools.groupby(entry.cut.sizes):
        count = len(list(alike))
        target = whole.narrow(dim, start, count * size).unflatten(dim, (count, size)).movedim(dim, 0)
        sent = received[rank : rank + count, : target.nbytes // count].view(value.dtype)
        target.copy_(sent.view(target.shape))
        rank, start = rank + count, start + count * size
    return whole


def _padded(entry: Gather) -> torch.Size:
    """Return the shape of the longest piece."""
    longest = max(entry.cut.sizes)
    return torch.Size(longest if dim == entry.cut.dim else size for dim, size in enumerate(entry.value.shape))


def _aligned(nbytes: int) -> int:
    """Round a size up to an offset at which a tensor of any dtype may start."""
    return -(-nbytes // 8) * 8


def packed(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Split a sequence into runs of at most ``MAX_PAYLOAD`` bytes. A larger item is a run by itself."""
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
