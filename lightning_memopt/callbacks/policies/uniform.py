"""The same rank for every block."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_memopt.callbacks.policies.base import POLICIES, Problem, once
from lightning_memopt.callbacks.policies.filling import at_hand, fill_budget, fill_quality
from lightning_memopt.callbacks.policies.spectra import known


@POLICIES.register("uniform")
@once
def uniform(problem: Problem) -> Mapping[str, int]:
    """Give every block the same rank, at most its own maximum."""
    if problem.budget is not None:
        return fill_budget(problem.blocks, problem.budget, problem.min_rank)
    if not known(problem.blocks):
        return at_hand(problem)
    return fill_quality(problem.blocks, problem.quality, problem.min_rank)
