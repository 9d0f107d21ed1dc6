"""Ranks where they keep the most of momentum's energy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush

from lightning_memopt.callbacks.policies.base import POLICIES, Problem
from lightning_memopt.callbacks.policies.filling import common, total
from lightning_memopt.callbacks.policies.spectra import Spectra, known
from lightning_memopt.callbacks.policies.uniform import uniform

# Directions with a smaller share of a block's energy are rounding errors of float32.
NEGLIGIBLE = 1e-6


@POLICIES.register("energy")
def energy(problem: Problem) -> Mapping[str, int]:
    """Add ranks one at a time to the block whose next direction has the most energy per byte."""
    blocks = problem.blocks
    if not known(blocks):
        return uniform(problem)
    spectra = Spectra(blocks)
    ranks = common(blocks, problem.min_rank, problem.min_rank)
    left = math.inf if problem.budget is None else problem.budget - total(blocks, ranks)
    missing = math.inf if problem.budget is not None else problem.quality - spectra.kept(ranks)
    queue: list[tuple[float, int, float, int]] = []

    def offer(index: int) -> None:
        """Queue the next direction of a block, if there is one: the best first, ties in the model's order."""
        block, rank = blocks[index], ranks[blocks[index].name]
        if rank < block.dense_rank and spectra.gains[block.name][rank] > NEGLIGIBLE:
            gain = spectra.gains[block.name][rank] * spectra.weight[block.name]
            cost = block.nbytes(rank + 1) - block.nbytes(rank)
            heappush(queue, (-gain / cost, index, gain, cost))

    for index in range(len(blocks)):
        offer(index)
    while queue and missing > 0:
        _, index, gain, cost = heappop(queue)
        # If a block's next direction does not fit, the block is done: later directions do not cost less.
        if cost <= left:
            ranks[blocks[index].name] += 1
            left -= cost
            missing -= gain
            offer(index)
    return ranks
