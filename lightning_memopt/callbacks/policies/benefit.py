"""Momentum where gradients oscillate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_memopt.callbacks.policies.base import POLICIES, Candidate, Problem
from lightning_memopt.callbacks.policies.filling import at_hand, total
from lightning_memopt.callbacks.policies.spectra import known
from lightning_memopt.callbacks.policies.uniform import uniform

# Only oscillations below ON or above OFF decide. Between them a block does not change, or noise would switch it.
ON, OFF = -0.03, -0.01
# If a smaller fraction of the blocks oscillates, nothing changes. Nearly all gradients drift during warm-up of the
# learning rate, and oscillation vanishes late in training. Neither shows that a block needs no momentum.
ENOUGH = 0.25


@POLICIES.register("benefit")
def benefit(problem: Problem) -> Mapping[str, int]:
    """Switch momentum on if a block's gradients oscillate, and off if they do not, with one rank for all blocks."""
    if not known(problem.blocks):
        return uniform(problem)
    if sum(_oscillation(block) < ON for block in problem.blocks) < ENOUGH * len(problem.blocks):
        ranks = at_hand(problem)
        fits = problem.budget is None or total(problem.blocks, ranks) <= problem.budget
        return ranks if fits else uniform(problem)
    on = uniform(replace(problem, blocks=tuple(block for block in problem.blocks if _is_on(block))))
    return {block.name: on.get(block.name, 0) for block in problem.blocks}


def _oscillation(block: Candidate) -> float:
    return block.signals.oscillation if block.signals else 0.0


def _is_on(block: Candidate) -> bool:
    oscillation = _oscillation(block)
    if ON <= oscillation <= OFF:
        return block.rank > 0
    return oscillation < ON
