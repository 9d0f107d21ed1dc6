"""Numbers from other ranks: kinds ``yield`` requests, :func:`drive` answers them for all blocks at once."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memopt.layout import Layout


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


Requests = tuple[Sum, ...]
Task = Generator[Requests, tuple[Tensor, ...], Any]


def request(*sums: Sum) -> Generator[Requests, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Ask for several sums in one round; nothing is suspended where nothing is sharded.

    No full-size tensor may be alive in the caller when it asks: all blocks wait here together.
    """
    if not any(entry.layout.groups(entry.over) for entry in sums):
        return tuple(entry.value for entry in sums)
    return (yield sums)


def together(*tasks: Task) -> Generator[Requests, tuple[Tensor, ...], tuple[Any, ...]]:
    """Run several tasks side by side, so that their requests share rounds; return their results in order."""
    results: list[Any] = [None] * len(tasks)
    waiting: dict[int, Requests] = {}

    def advance(position: int, reply: tuple[Tensor, ...] | None) -> None:
        try:
            waiting[position] = tasks[position].send(reply)  # type: ignore[arg-type]
        except StopIteration as stop:
            results[position] = stop.value
            waiting.pop(position, None)

    for position in range(len(tasks)):
        advance(position, None)
    while waiting:
        round_ = list(waiting.items())
        reply = yield tuple(entry for _, requests in round_ for entry in requests)
        start = 0
        for position, requests in round_:
            advance(position, reply[start : start + len(requests)])
            start += len(requests)
    return tuple(results)


def drive(tasks: Iterable[Task]) -> None:
    """Run the tasks of all blocks to their end, in lockstep rounds with one flat collective per group and dtype.

    A task that never asks for a sharded number runs through before the next one starts: a single process works
    block by block and holds the temporaries of one block only.
    """
    waiting: list[tuple[Task, Requests]] = []
    for task in tasks:
        _advance(task, None, waiting)
    while waiting:
        replies = _exchange([entry for _, requests in waiting for entry in requests])
        previous, waiting, start = waiting, [], 0
        for task, requests in previous:
            _advance(task, tuple(replies[start : start + len(requests)]), waiting)
            start += len(requests)


def _advance(task: Task, reply: tuple[Tensor, ...] | None, waiting: list[tuple[Task, Requests]]) -> None:
    with suppress(StopIteration):
        waiting.append((task, task.send(reply)))  # type: ignore[arg-type]


def _exchange(sums: list[Sum]) -> list[Tensor]:
    """Answer the requests of one round; every rank asks the same in the same order, empty shards included."""
    answers = [entry.value for entry in sums]
    flights: dict[tuple[Any, torch.dtype], list[int]] = {}
    for position, entry in enumerate(sums):
        for group in entry.layout.groups(entry.over):
            flights.setdefault((group, entry.value.dtype), []).append(position)
    for (group, _), positions in flights.items():
        flat = torch.cat([answers[position].reshape(-1) for position in positions])
        dist.all_reduce(flat, group=group)
        parts = flat.split([answers[position].numel() for position in positions])
        for position, part in zip(positions, parts, strict=True):
            answers[position] = part.view_as(answers[position])
    return answers
