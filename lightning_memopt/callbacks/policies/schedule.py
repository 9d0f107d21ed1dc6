"""Less momentum as training proceeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_memopt.callbacks.policies.base import POLICIES, Problem
from lightning_memopt.callbacks.policies.uniform import uniform

# The fraction left at the end of training: the oscillation that momentum damps occurs early in training.
FINAL = 0.5


@POLICIES.register("schedule")
def schedule(problem: Problem) -> Mapping[str, int]:
    """Give every block the same rank, with a budget (or quality) that falls linearly to half of its initial value.

    Raises:
        ValueError: If the length of training is unknown.
    """
    if problem.progress is None:
        raise ValueError("The policy 'schedule' needs the length of training: set `max_steps` or `max_epochs`.")
    share = 1 - (1 - FINAL) * problem.progress
    budget = None if problem.budget is None else int(share * problem.budget)
    return uniform(replace(problem, budget=budget, quality=share * problem.quality))
