"""Momentum where gradients oscillate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_memopt.callbacks.policies.base import POLICIES, Candidate, Problem
from lightning_memopt.callbacks.policies.spectra import known
from lightning_memopt.callbacks.policies.uniform import uniform

# Oscillations below ON and above OFF decide; between them a block stays as it is, or noise would switch it every time.
ON, OFF = -0.03, -0.01


@POLICIES.register("benefit")
def benefit(problem: Problem) -> Mapping[str, int]:
    """Switch momentum on where gradients swing back and forth, off where they do not, with one rank for all."""
    if not known(problem.blocks):
        return uniform(problem)
    on = tuple(block for block in problem.blocks if _is_on(block))
    # No momentum at all is the worst allocation there is. Where no block stands out, as late in training, all get some.
    ranks = uniform(replace(problem, blocks=on or problem.blocks))
    return {block.name: ranks.get(block.name, 0) for block in problem.blocks}


def _is_on(block: Candidate) -> bool:
    oscillation = block.signals.oscillation if block.signals else 0.0
    if ON <= oscillation <= OFF:
        return block.rank > 0
    return oscillation < ON
