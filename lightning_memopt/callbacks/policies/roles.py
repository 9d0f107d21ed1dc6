"""Momentum for the roles that lose most without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_memopt.callbacks.policies.base import POLICIES, Problem, once
from lightning_memopt.callbacks.policies.uniform import uniform

SPARED = ("embedding", "query", "key", "head")


@POLICIES.register("roles")
@once
def roles(problem: Problem) -> Mapping[str, int]:
    """Give embeddings, queries, keys and the head no momentum, and all other blocks one rank.

    On small language models, these four do without it (docs/methods.md). A model of nothing else gets it everywhere.
    """
    rest = tuple(block for block in problem.blocks if block.role not in SPARED)
    if not rest:
        return uniform(problem)
    return {**{block.name: 0 for block in problem.blocks}, **uniform(replace(problem, blocks=rest))}
