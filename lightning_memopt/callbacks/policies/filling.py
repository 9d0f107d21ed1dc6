"""Give blocks a common rank: the largest that fits a budget, or the smallest that keeps a share of the energy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping

from lightning_memopt.callbacks.policies.base import Candidate, Problem
from lightning_memopt.callbacks.policies.spectra import Spectra


def within(block: Candidate, rank: int, min_rank: int) -> int:
    """Return ``rank``, clamped to the block's valid ranks other than 0."""
    return min(max(rank, min_rank), block.dense_rank)


def total(blocks: Iterable[Candidate], ranks: Mapping[str, int]) -> int:
    """Return the bytes of the blocks' momentum with these ranks."""
    return sum(block.nbytes(ranks[block.name]) for block in blocks)


def common(
    blocks: Iterable[Candidate], rank: int, min_rank: int, *, twice: Collection[str] = frozenset()
) -> dict[str, int]:
    """Give all blocks one rank, and the blocks named in ``twice`` twice that rank."""
    return {block.name: within(block, rank * (1 + (block.name in twice)), min_rank) for block in blocks}


def at_hand(problem: Problem) -> dict[str, int]:
    """Return the current ranks of the blocks."""
    return {block.name: within(block, block.rank, problem.min_rank) if block.rank else 0 for block in problem.blocks}


def fill_budget(
    blocks: tuple[Candidate, ...], budget: int, min_rank: int, *, twice: Collection[str] = frozenset()
) -> dict[str, int]:
    """Give blocks the largest common rank that fits. Then add one rank to blocks in order, while bytes are left."""
    highest = range(1, _top(blocks) + 1)
    rank = bisect_left(
        highest, True, key=lambda rank: total(blocks, common(blocks, rank, min_rank, twice=twice)) > budget
    )
    ranks = common(blocks, rank, min_rank, twice=twice)
    left = budget - total(blocks, ranks)
    for block in blocks:
        more = min(ranks[block.name] + 1, block.dense_rank)
        cost = block.nbytes(more) - block.nbytes(ranks[block.name])
        if cost <= left:
            ranks[block.name] = more
            left -= cost
    return ranks


def fill_quality(blocks: tuple[Candidate, ...], quality: float, min_rank: int) -> dict[str, int]:
    """Give blocks the smallest common rank that keeps the share ``quality`` of momentum's energy."""
    spectra = Spectra(blocks)
    lower = range(1, _top(blocks))
    rank = bisect_left(lower, True, key=lambda rank: spectra.kept(common(blocks, rank, min_rank)) >= quality)
    return common(blocks, rank + 1, min_rank)


def _top(blocks: Iterable[Candidate]) -> int:
    return max((block.dense_rank for block in blocks), default=0)
