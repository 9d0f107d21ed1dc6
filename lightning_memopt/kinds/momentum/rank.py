"""The option ``rank``, with the same meaning for every kind that has it."""

from __future__ import annotations

from lightning_memopt.sharding.layout import Layout

MIN_FRACTIONAL_RANK = 4


def check_rank(rank: int | float) -> None:
    """Check that ``rank`` is a positive integer or a fraction of the short side.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"`rank` must be an integer or a fraction of the short side, got {rank!r}.")
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(
            f"`rank` must be an integer of at least 1 or a fraction in (0, 1] of the short side, got {rank!r}; "
            "to keep no momentum at all choose the momentum kind 'none'."
        )


def resolve_rank(rank: int | float, layout: Layout) -> int:
    """Return the rank for one block: at most its short side, and at least 4 if given as a fraction."""
    short = layout.short_side
    wanted = rank if isinstance(rank, int) else max(MIN_FRACTIONAL_RANK, int(rank * short))
    return max(1, min(wanted, short))
