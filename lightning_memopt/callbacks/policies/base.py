"""The input and output of a policy, which returns a rank for every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_memopt._registry import Registry
from lightning_memopt.optim.signals import BlockSignals


@dataclass(frozen=True)
class Candidate:
    """A block whose momentum can be changed.

    Momentum of rank r takes r · (m + n) numbers per matrix. From :attr:`dense_rank` on, this is at least as much as
    dense momentum takes, so that rank stands for dense momentum. Rank 0 means no momentum.

    Attributes:
        name: The block's name.
        role: Its role.
        count: Number of stacked matrices.
        m: Rows of each matrix.
        n: Columns of each matrix.
        rank: Its current rank: 0 for no momentum, `dense_rank` for dense.
        itemsize: Bytes per number.
        signals: Statistics of its gradients; None before the first step.
    """

    name: str
    role: str
    count: int
    m: int
    n: int
    rank: int
    itemsize: int = 4
    signals: BlockSignals | None = None

    @property
    def short(self) -> int:
        """The smaller of m and n."""
        return min(self.m, self.n)

    @property
    def dense_rank(self) -> int:
        """The smallest rank that takes at least as many bytes as dense momentum. It stands for dense momentum."""
        return -(-self.m * self.n // (self.m + self.n))

    def nbytes(self, rank: int) -> int:
        """Return the bytes of momentum of a given rank, over all processes."""
        return self.count * self.itemsize * min(rank * (self.m + self.n), self.m * self.n)


@dataclass(frozen=True)
class Problem:
    """The input of a policy.

    Attributes:
        blocks: The blocks whose momentum can be changed, in the model's order.
        budget: Maximum bytes of their momentum; None asks for the smallest allocation that keeps `quality`.
        quality: The share of momentum's energy to keep, or another measure of the policy. Only used without a budget.
        min_rank: The smallest rank other than 0.
        progress: Completed fraction of the time until the allocation freezes, from 0 to 1; None if unknown.
    """

    blocks: tuple[Candidate, ...]
    budget: int | None
    quality: float = 0.5
    min_rank: int = 1
    progress: float | None = None


# Returns the rank of every block by name: 0, or a rank from `min_rank` to the block's `dense_rank`.
Policy = Callable[[Problem], Mapping[str, int]]
POLICIES: Registry[Policy] = Registry("policy")
_ONCE: list[Policy] = []


def once(policy: Policy) -> Policy:
    """Mark a policy whose division of a budget depends on neither signals nor progress."""
    _ONCE.append(policy)
    return policy


def divides_once(policy: Policy | None) -> bool:
    """Return whether a policy's division of a budget depends on neither signals nor progress; not known for None."""
    return any(policy is each for each in _ONCE)


def decides_once(policy: Policy | None, budget: int | None) -> bool:
    """Return whether a policy divides the budget before the first step, and changes nothing later."""
    return budget is not None and divides_once(policy)


def answer(policy: Policy, problem: Problem) -> Mapping[str, int]:
    """Return the result of a policy after validation.

    Raises:
        ValueError: If it does not give every block a valid rank.
    """
    ranks = policy(problem)
    for block in problem.blocks:
        rank = ranks.get(block.name) if isinstance(ranks, Mapping) else ranks
        whole = isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank <= block.dense_rank
        if not whole or not isinstance(ranks, Mapping):
            raise ValueError(
                f"The policy {getattr(policy, '__name__', policy)!r} returned {rank!r} for {block.name!r}: it must map "
                f"the name of every block to an integer, here from 0 to {block.dense_rank}."
            )
    return ranks
