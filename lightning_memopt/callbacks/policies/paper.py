"""The fixed roles of AdaPM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_memopt.callbacks.policies.base import POLICIES, Problem, once
from lightning_memopt.callbacks.policies.filling import fill_budget, total
from lightning_memopt.callbacks.policies.uniform import uniform

NONE, DENSE = ("embedding", "attention_output"), ("value",)


@POLICIES.register("paper")
@once
def paper(problem: Problem) -> Mapping[str, int]:
    """Give embeddings and attention outputs no momentum, values dense momentum, and all other blocks one rank.

    If dense values leave too few bytes for the others, values get twice their rank.
    """
    ranks = {block.name: 0 for block in problem.blocks}
    some = tuple(block for block in problem.blocks if block.role not in NONE)
    dense = {block.name: block.dense_rank for block in some if block.role in DENSE}
    rest = tuple(block for block in some if block.name not in dense)
    if problem.budget is None:
        return {**ranks, **dense, **uniform(replace(problem, blocks=rest))}
    left = problem.budget - total(problem.blocks, {**ranks, **dense})
    if left >= sum(block.nbytes(problem.min_rank) for block in rest):
        return {**ranks, **dense, **fill_budget(rest, left, problem.min_rank)}
    return {**ranks, **fill_budget(some, problem.budget, problem.min_rank, twice=dense)}
