"""Which blocks change now: few at a time, none for a trifle, never beyond the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_memopt.callbacks.policies.base import Candidate, Problem

# A change of rank by a smaller part of the larger rank is not worth rebuilding a block's momentum.
TRIFLE = 0.25


@dataclass(frozen=True)
class _Move:
    block: Candidate
    rank: int

    @property
    def cost(self) -> int:
        """Bytes that it takes; negative if it frees some."""
        return self.block.nbytes(self.rank) - self.block.nbytes(self.block.rank)

    @property
    def is_trifle(self) -> bool:
        old, new = self.block.rank, self.rank
        if {old, new} & {0, self.block.dense_rank}:
            return False
        return abs(new - old) < TRIFLE * max(old, new)


def moves(problem: Problem, target: Mapping[str, int], max_moves: int) -> dict[str, int]:
    """Return the blocks that change now with their new ranks, in the order in which to change them.

    At no point of that order the blocks take more than the budget, or, where they do so already, more than before.
    Every change goes towards ``target``, so that a target which stays is reached but for trifles, and then nothing
    moves any more.

    Args:
        problem: The blocks as they are, and the budget.
        target: The rank that every block should have.
        max_moves: The most blocks to change, unless the budget asks for more.
    """
    shrinks, growths = _shrinks(problem, target), _growths(problem, target)
    taken = sum(block.nbytes(block.rank) for block in problem.blocks)
    free = math.inf if problem.budget is None else problem.budget - taken
    forced = _count(shrinks, -free)
    # Trifles that make room for what grows are not left out: otherwise a block could wait for ever to get momentum,
    # while all others have a little more than they should.
    needed = _count(shrinks, sum(move.cost for move in growths[:max_moves]) - free)
    wanted = max(needed, sum(not move.is_trifle for move in shrinks))
    half = max(1, max_moves // 2) if needed else 0
    chosen = shrinks[: min(wanted, max(forced, half, max_moves - len(growths)))]
    free -= sum(move.cost for move in chosen)
    for growth in growths:
        move = _cut(growth, free, problem.min_rank)
        if len(chosen) < max_moves and move is not None:
            chosen.append(move)
            free -= move.cost
    return {move.block.name: move.rank for move in chosen}


def restless(history: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the blocks whose rank has turned back twice: they stay as they are, so that every allocation settles.

    Args:
        history: That of :class:`~lightning_memopt.AdaptiveMomentum`.
    """
    turns: Counter[str] = Counter()
    direction: dict[str, bool] = {}
    for entry in history:
        for name, (old, new) in entry["moves"].items():
            turns[name] += direction.get(name, new > old) != (new > old)
            direction[name] = new > old
    return {name for name, count in turns.items() if count > 1}


def _shrinks(problem: Problem, target: Mapping[str, int]) -> list[_Move]:
    """Return all shrinks, those that free most first, trifles last."""
    found = [_Move(block, target[block.name]) for block in problem.blocks if target[block.name] < block.rank]
    return sorted(found, key=lambda move: (move.is_trifle, move.cost))


def _growths(problem: Problem, target: Mapping[str, int]) -> list[_Move]:
    """Return the growths that are no trifles, those from nothing first, then the largest in proportion."""
    found = [_Move(block, target[block.name]) for block in problem.blocks if target[block.name] > block.rank]
    proportion = {move.block.name: move.rank / move.block.rank if move.block.rank else math.inf for move in found}
    return sorted((move for move in found if not move.is_trifle), key=lambda move: -proportion[move.block.name])


def _count(shrinks: list[_Move], nbytes: float) -> int:
    """Return how many of the shrinks it takes to free so many bytes; all if they free less."""
    for count, move in enumerate(shrinks):
        if nbytes <= 0:
            return count
        nbytes += move.cost
    return len(shrinks)


def _cut(growth: _Move, free: float, min_rank: int) -> _Move | None:
    """Return as much of a growth as fits into the free bytes; None if that is a trifle, or less than the least rank."""
    if growth.cost <= free:
        return growth
    block = growth.block
    per_rank = block.count * block.itemsize * (block.m + block.n)
    cut = _Move(block, int((block.nbytes(block.rank) + free) // per_rank))
    return cut if cut.rank >= max(block.rank + 1, min_rank) and not cut.is_trifle else None
