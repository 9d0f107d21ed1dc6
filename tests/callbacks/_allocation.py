"""Random allocation problems."""

from __future__ import annotations

import random

from lightning_memopt.callbacks.budget import smallest
from lightning_memopt.callbacks.policies import Candidate, Problem
from lightning_memopt.optim.signals import BlockSignals
from lightning_memopt.plans.roles import ROLES


def taken(blocks, ranks):
    return sum(block.nbytes(ranks[block.name]) for block in blocks)


def problem(rng: random.Random, *, limited: bool, signals: bool) -> Problem:
    """Return a problem with any kind of block: stacks, tiny ones, dense, none; the budget is not always kept to."""
    min_rank = rng.choice((1, 1, 2, 4))
    blocks = tuple(candidate(rng, index, min_rank, signals) for index in range(rng.randint(1, 12)))
    least, most = smallest(blocks, min_rank), smallest(blocks, 10**6)
    budget = int(least + (most - least) * rng.random() ** 2) if limited else None
    return Problem(blocks, budget, rng.uniform(0.1, 1.0), min_rank, rng.random())


def candidate(rng: random.Random, index: int, min_rank: int, signals: bool) -> Candidate:
    role = rng.choice([role for role in ROLES if role != "vector"])
    m, n = (rng.choice((1, 2, 3, 8, 24, 64, 100)) for _ in range(2))
    block = Candidate(f"b{index}", role, rng.choice((1, 1, 4)), m, n, 0, rng.choice((2, 4)))
    rank = rng.choice((0, block.dense_rank, rng.randint(min(min_rank, block.dense_rank), block.dense_rank)))
    return Candidate(
        block.name, role, block.count, m, n, rank, block.itemsize, _signals(rng, block, rank) if signals else None
    )


def _signals(rng: random.Random, block: Candidate, rank: int) -> BlockSignals:
    values = sorted((rng.expovariate(1.0) * rng.choice((0, 1, 1)) for _ in range(rank)), reverse=True)
    spectrum = tuple(values) if 0 < rank < block.dense_rank else ()
    scale = 10.0 ** rng.randint(-20, 5)
    residual = rng.choice((0.0, rng.random(), 10 * rng.random()))
    energy = sum(spectrum) * rng.choice((1.0, 0.9)) + residual
    adam = rng.uniform(-0.2, 1.0), rng.choice((0.0, rng.uniform(0.01, 1.2))), rng.choice((1 / 19, 1.0))
    shown = tuple(scale * value for value in spectrum)
    return BlockSignals(rng.uniform(-0.1, 0.1), scale, energy * scale, shown, *adam)
