"""What a policy is asked, and what it answers: a rank for every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_memopt._registry import Registry
from lightning_memopt.optim.signals import BlockSignals


@dataclass(frozen=True)
class Candidate:
    """A block whose momentum can be changed.

    Momentum of rank r takes r · (m + n) numbers per matrix. From :attr:`dense_rank` on that is no less than dense
    momentum takes, and dense momentum it is; rank 0 is none.

    Attributes:
        name: The block's name.
        role: Its role.
        count: Number of matrices that are stacked in it.
        m: Rows of each.
        n: Columns of each.
        rank: Its rank now: 0 for no momentum, `dense_rank` for dense.
        itemsize: Bytes per number.
        signals: What its gradients have shown; None before the first step.
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
        """The smallest rank that takes no less memory than dense momentum; it stands for dense."""
        return -(-self.m * self.n // (self.m + self.n))

    def nbytes(self, rank: int) -> int:
        """Return the bytes of momentum of a rank, over all ranks of the process group."""
        return self.count * self.itemsize * min(rank * (self.m + self.n), self.m * self.n)


@dataclass(frozen=True)
class Problem:
    """What a policy decides on.

    Attributes:
        blocks: The blocks whose momentum can be changed, in the model's order.
        budget: Bytes that they may have together, or None: the smallest allocation of the wanted quality.
        quality: Where there is no budget, the share of momentum's energy that is to be kept.
        min_rank: The smallest rank that is not 0.
        progress: How much of the time until the allocation freezes is over, from 0 to 1; None where that is not known.
    """

    blocks: tuple[Candidate, ...]
    budget: int | None
    quality: float = 0.5
    min_rank: int = 1
    progress: float | None = None


# Returns the rank of every block, by name: 0, or from `min_rank` to the block's `dense_rank`.
Policy = Callable[[Problem], Mapping[str, int]]
POLICIES: Registry[Policy] = Registry("policy")


def answer(policy: Policy, problem: Problem) -> Mapping[str, int]:
    """Return what a policy wants, checked.

    Raises:
        ValueError: If it does not give every block a rank that the block can have.
    """
    ranks = policy(problem)
    for block in problem.blocks:
        rank = ranks.get(block.name) if isinstance(ranks, Mapping) else ranks
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= block.dense_rank:
            raise ValueError(
                f"The policy {getattr(policy, '__name__', policy)!r} answered {rank!r} for {block.name!r}: it must map "
                f"the name of every block to an integer, here from 0 to {block.dense_rank}."
            )
    return ranks
