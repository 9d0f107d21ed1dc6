"""What AdaptiveMomentum decides: how much momentum each block of an optimizer gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_memopt.callbacks import adaptive_report as report
from lightning_memopt.callbacks.allocation import (
    Changes,
    adamw_momentum_bytes,
    candidate,
    change_to,
    fixed_bytes,
    matrix_bytes,
    momentum_bytes,
    trained_matrices,
)
from lightning_memopt.callbacks.budget import check_budget, parse_budget
from lightning_memopt.callbacks.moves import moves, restless
from lightning_memopt.callbacks.policies import Candidate, Policy, Problem, uniform
from lightning_memopt.callbacks.policies.base import answer, divides_once
from lightning_memopt.memory.sizes import format_bytes
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.signals import BlockSignals

Signals = Mapping[str, BlockSignals]


def lines(changes: Mapping[str, Any]) -> list[str]:
    """Return a line for each change.

    Raises:
        TypeError: If they are no mapping.
    """
    if not isinstance(changes, Mapping):
        raise TypeError(
            "propose() must return a mapping from names of blocks to changes, such as {'head.weight': {'rank': 8}}, or "
            f"an empty one, got {changes!r}."
        )
    return [f"{name}: {change}" for name, change in changes.items()]


@dataclass(frozen=True)
class Allocator:
    """Decides how much momentum each block of an optimizer gets, and changes the optimizer. It knows no steps.

    Attributes:
        optimizer: The optimizer to adapt.
        compressed: The momentum kind for ranks between none and dense.
        policy: The policy.
        budget: The budget as the user gave it.
        quality: As in :class:`~lightning_memopt.AdaptiveMomentum`, like the rest.
        min_rank: The smallest rank of a block that has momentum.
        max_moves: Maximum number of blocks that change in one decision.
        dropped: How to treat momentum that does not fit into a smaller rank.
    """

    optimizer: MemOpt
    compressed: str
    policy: Policy
    budget: int | float | str | None
    quality: float
    min_rank: int
    max_moves: int
    dropped: str

    # ------------------------------------------------------------------ deciding

    def moves(self, signals: Signals, history: Sequence[Mapping[str, Any]], progress: float | None) -> Changes:
        """Return the few changes that bring blocks nearer to the policy's target.

        Args:
            signals: Statistics of the gradients, by block name.
            history: The decisions so far.
            progress: As in :class:`~lightning_memopt.callbacks.policies.base.Problem`.
        """
        problem = self._problem(signals, restless(history), progress)
        return self._changes(moves(problem, answer(self.policy, problem), self.max_moves))

    def division(self, signals: Signals, progress: float | None) -> Changes:
        """Return the changes from the current allocation to the policy's target, for all blocks.

        Args:
            signals: As for :meth:`moves`; empty before the first step.
            progress: As for :meth:`moves`.

        Raises:
            ValueError: If the budget is too small, or the policy needs the length of training and it is unknown.
        """
        problem = self._problem(signals, (), progress)
        check_budget(problem, fixed_bytes(self.optimizer))
        target = self._target(problem)
        # A recipe may give small blocks a rank that takes more bytes than dense momentum. Such a rank counts as dense.
        sizes = matrix_bytes(self.optimizer)
        differing = [
            block
            for block in problem.blocks
            if target[block.name] != block.rank or sizes[block.name] > block.nbytes(block.rank)
        ]
        differing.sort(key=lambda block: block.nbytes(target[block.name]) - block.nbytes(block.rank))
        return self._changes({block.name: target[block.name] for block in differing})

    def _target(self, problem: Problem) -> Mapping[str, int]:
        """Return the policy's target. Blocks that begin to train among others get the rank of an even division.

        A policy that goes by signals would give such a block next to nothing, for as long as it knows nothing of it.
        """
        seen = tuple(block for block in problem.blocks if block.signals is not None)
        if len(seen) in (0, len(problem.blocks)) or divides_once(self.policy):
            return answer(self.policy, problem)
        even = uniform(problem)
        fresh = {block.name: even[block.name] for block in problem.blocks if block.signals is None}
        left = (
            None
            if problem.budget is None
            else problem.budget
            - sum(block.nbytes(fresh[block.name]) for block in problem.blocks if block.name in fresh)
        )
        return {**fresh, **answer(self.policy, replace(problem, blocks=seen, budget=left))}

    def _problem(self, signals: Signals, pinned: Collection[str], progress: float | None) -> Problem:
        """Return the policy's input: all blocks that are not pinned, and the budget that the pinned ones leave."""
        blocks = self._candidates(signals)
        fixed = fixed_bytes(self.optimizer) + sum(b.nbytes(b.rank) for b in blocks if b.name in pinned)
        budget = self.budget_bytes()
        return Problem(
            blocks=tuple(block for block in blocks if block.name not in pinned),
            budget=None if budget is None else budget - fixed,
            quality=self.quality,
            min_rank=self.min_rank,
            progress=progress,
        )

    def _changes(self, ranks: Mapping[str, int]) -> Changes:
        blocks = {block.name: block for block in self._candidates({})}
        return {name: change_to(blocks[name], rank, self.compressed) for name, rank in ranks.items()}

    # ------------------------------------------------------------------ changing

    def carry_out(self, changes: Mapping[str, Any], signals: Signals, step: int) -> dict[str, Any]:
        """Apply the changes, and return the entry of the history.

        Raises:
            ValueError: If they exceed the budget. Nothing has changed then.
        """
        blocks = self._candidates(signals)
        if changes:
            size, budget = self.nbytes(changes), self.budget_bytes()
            if budget is not None and size > budget:
                raise ValueError(
                    f"The policy, or propose(), requested changes that need {format_bytes(size)} of momentum, but the "
                    f"budget is {format_bytes(budget)}. Nothing has changed. Return smaller ranks, or raise `budget`."
                )
            self.optimizer.reformat(changes, dropped=self.dropped)
        after = {block.name: block.rank for block in self._candidates({})}
        seen = [(block, block.signals) for block in blocks if block.signals is not None]
        return {
            "step": step,
            "moves": {
                block.name: [block.rank, after[block.name]] for block in blocks if block.rank != after[block.name]
            },
            "ranks": after,
            "dense": [
                block.name for block in trained_matrices(self.optimizer) if block.recipe.momentum.name == "dense"
            ],
            "momentum_bytes": self.nbytes(),
            "oscillation": {block.name: shown.oscillation for block, shown in seen},
            "residual": {
                block.name: 0.0 if block.rank >= block.dense_rank else shown.residual(block.rank)
                for block, shown in seen
            },
        }

    # ------------------------------------------------------------------ facts

    def trained(self) -> set[str]:
        """Return the names of the blocks whose momentum can be changed."""
        return {block.name for block in trained_matrices(self.optimizer)}

    def nbytes(self, changes: Mapping[str, Any] | None = None) -> int:
        """Return the bytes of momentum of all blocks, over all ranks, after changes."""
        return momentum_bytes(self.optimizer, changes or {})

    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, if there is one."""
        return self._parsed(self.budget)

    def exceeds_budget(self) -> bool:
        """Return whether the momentum takes more than the budget."""
        budget = self.budget_bytes()
        return budget is not None and self.nbytes() > budget

    def is_budget(self, other: int | float | str | None) -> bool:
        """Return whether another budget is as large as this one."""
        return self._parsed(other) == self.budget_bytes()

    def _parsed(self, budget: int | float | str | None) -> int | None:
        return parse_budget(budget, adamw_momentum_bytes(self.optimizer))

    def size(self) -> str:
        """Return the bytes of momentum, in words."""
        return report.share_of_adamw(self.nbytes(), adamw_momentum_bytes(self.optimizer))

    def _candidates(self, signals: Signals) -> tuple[Candidate, ...]:
        return tuple(candidate(block, signals) for block in trained_matrices(self.optimizer))
