"""Parse the budget of momentum, and check that it is large enough."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_memopt.callbacks.policies.base import Candidate, Problem
from lightning_memopt.memory.sizes import format_bytes, parse_bytes

# A smaller number without a unit is more likely a share or a number of MiB.
SMALLEST = 1000
_ALLOWED = (
    "a share of AdamW's momentum as a float in (0, 1] or a string such as '5%', or bytes as an integer of at least "
    f"{SMALLEST} or a string such as '512MiB'"
)


def parse_budget(budget: float | int | str | None, momentum_of_adamw: int) -> int | None:
    """Return a budget in bytes; None for None.

    Raises:
        TypeError: If it is neither a number nor a string.
        ValueError: If it is out of range, cannot be parsed, or a small number without a unit.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, float | int | str):
        raise TypeError(f"`budget` must be {_ALLOWED}, got {budget!r}.")
    if isinstance(budget, str):
        return _of_text(budget, momentum_of_adamw)
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise _refusal(budget)
        return int(budget * momentum_of_adamw)
    return _without_unit(budget, budget)


def smallest(blocks: Iterable[Candidate], min_rank: int) -> int:
    """Return the bytes of momentum if every block has the smallest rank."""
    return sum(block.nbytes(min_rank) for block in blocks)


def check_budget(problem: Problem, fixed: int) -> None:
    """Check that the budget is large enough for the smallest allocation.

    Args:
        problem: The blocks and their budget.
        fixed: Bytes of momentum that cannot be changed. The user's budget includes them.

    Raises:
        ValueError: If it is too small. The message counts all momentum, as the user's budget does.
    """
    # This holds for policies that switch momentum off, too: if they would switch off all blocks, all keep some.
    least = smallest(problem.blocks, problem.min_rank)
    if problem.budget is not None and least > problem.budget:
        raise ValueError(
            f"`budget` is {_exact(problem.budget + fixed)}, but rank {problem.min_rank} for every matrix and the "
            f"momentum that cannot be changed ({format_bytes(fixed)}) take {_exact(least + fixed)}; give at least "
            "that, or lower `min_rank`."
        )


def _of_text(budget: str, momentum_of_adamw: int) -> int:
    percent = budget.strip().removesuffix("%")
    try:
        if percent != budget.strip():
            return parse_budget(float(percent) / 100, momentum_of_adamw) or 0
        size = parse_bytes(budget)
    except ValueError:
        raise _refusal(budget) from None
    if budget.strip().isdecimal():
        return _without_unit(size, budget)
    if not budget.strip()[-1].isalpha():  # a share is a float, or has its sign
        raise _refusal(budget)
    return _positive(size, budget)


def _without_unit(size: int, budget: object) -> int:
    if 0 < size < SMALLEST:
        share = f", '{size}%' of AdamW's momentum" if size <= 100 else ""
        share += ", 1.0 for all of it" * (size == 1)
        raise ValueError(f"`budget` {budget!r} has no unit: write '{size}B' for bytes{share}, or '{size}MiB'.")
    return _positive(size, budget)


def _positive(size: int, budget: object) -> int:
    if size < 1:
        raise _refusal(budget)
    return size


def _refusal(budget: object) -> ValueError:
    return ValueError(f"`budget` must be {_ALLOWED}, got {budget!r}.")


def _exact(size: int) -> str:
    # A rounded size, copied from the message as the new budget, could be refused again.
    return f"{size} bytes ({format_bytes(size)})"
