"""Select the blocks that change now: a few at a time, no trifles, and never beyond the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_memopt.callbacks.policies.base import Candidate, Problem

# A change by less than this fraction of the larger rank is a trifle: it does not justify rebuilding momentum.
TRIFLE = 0.25


@dataclass(frozen=True)
class _Move:
    block: Candidate
    rank: int

    @property
    def cost(self) -> int:
        """Bytes that the move adds; negative if it frees bytes."""
        return self.block.nbytes(self.rank) - self.block.nbytes(self.block.rank)

    @property
    def is_trifle(self) -> bool:
        old, new = self.block.rank, self.rank
        if {old, new} & {0, self.block.dense_rank}:
            return False
        return abs(new - old) < TRIFLE * max(old, new)


def moves(problem: Problem, target: Mapping[str, int], max_moves: int) -> dict[str, int]:
    """Return the blocks that change now with their new ranks, in the order in which to apply the changes.

    At no point in this order do the blocks exceed the budget. If they exceed it already, they never take more than
    before. Every change is towards ``target``. So a constant target is reached, except for trifles, and then no block
    changes.

    Args:
        problem: The blocks with their current ranks, and the budget.
        target: The target rank of every block.
        max_moves: Maximum number of blocks to change, unless the budget requires more.
    """
    shrinks, growths = _shrinks(problem, target), _growths(problem, target)
    taken = sum(block.nbytes(block.rank) for block in problem.blocks)
    free = math.inf if problem.budget is None else problem.budget - taken
    forced = _count(shrinks, -free)
    # Include trifles that free bytes for growths. Otherwise a block could wait forever for momentum while all others
    # have slightly more than their target.
    needed = _count(shrinks, sum(move.cost for move in growths[:max_moves]) - free)
    wanted = max(needed, sum(not move.is_trifle for move in shrinks))
    half = max(1, max_moves // 2) if needed else 0
    chosen = shrinks[: min(wanted, max(forced, half, max_moves - len(growths)))]
    free -= sum(move.cost for move in chosen)
    for growth in growths:
        move = _limited(growth, free, problem.min_rank)
        if len(chosen) < max_moves and move is not None:
            chosen.append(move)
            free -= move.cost
    return {move.block.name: move.rank for move in chosen}


def restless(history: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the blocks whose rank has reversed direction twice. They no longer change, so every allocation settles.

    Args:
        history: The history of :class:`~lightning_memopt.AdaptiveMomentum`.
    """
    turns: Counter[str] = Counter()
    direction: dict[str, bool] = {}
    for entry in history:
        for name, (old, new) in entry["moves"].items():
            turns[name] += direction.get(name, new > old) != (new > old)
            direction[name] = new > old
    return {name for name, count in turns.items() if count > 1}


def _shrinks(problem: Problem, target: Mapping[str, int]) -> list[_Move]:
    """Return all shrinks, sorted by freed bytes, with trifles last."""
    found = [_Move(block, target[block.name]) for block in problem.blocks if target[block.name] < block.rank]
    return sorted(found, key=lambda move: (move.is_trifle, move.cost))


def _growths(problem: Problem, target: Mapping[str, int]) -> list[_Move]:
    """Return the growths except trifles: those from rank 0 first, then by relative growth, largest first."""
    found = [_Move(block, target[block.name]) for block in problem.blocks if target[block.name] > block.rank]
    proportion = {move.block.name: move.rank / move.block.rank if move.block.rank else math.inf for move in found}
    return sorted((move for move in found if not move.is_trifle), key=lambda move: -proportion[move.block.name])


def _count(shrinks: list[_Move], nbytes: float) -> int:
    """Return how many of the shrinks are needed to free ``nbytes``; all if they free less."""
    for count, move in enumerate(shrinks):
        if nbytes <= 0:
            return count
        nbytes += move.cost
    return len(shrinks)


def _limited(growth: _Move, free: float, min_rank: int) -> _Move | None:
    """Limit a growth to the free bytes. Return None if the result is a trifle or below the smallest rank."""
    if growth.cost <= free:
        return growth
    block = growth.block
    per_rank = block.count * block.itemsize * (block.m + block.n)
    cut = _Move(block, int((block.nbytes(block.rank) + free) // per_rank))
    return cut if cut.rank >= max(block.rank + 1, min_rank) and not cut.is_trifle else None
