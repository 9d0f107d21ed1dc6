"""The lines that AdaptiveMomentum prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_memopt.callbacks.policies import Policy
from lightning_memopt.callbacks.policies.base import decides_once
from lightning_memopt.memory.sizes import format_bytes

SHOWN_MOVES = 4


def share_of_adamw(size: int, adamw: int) -> str:
    """Return a number of bytes with its share of AdamW's momentum."""
    return f"{format_bytes(size)} of momentum, {size / max(1, adamw):.1%} of AdamW's"


def policy_name(policy: Policy) -> str:
    """Return the name of a policy."""
    return getattr(policy, "__name__", repr(policy))


def aim(policy: Policy, budget: int | None, quality: float, blocks: int) -> str:
    """Return what the callback does at the start, in words."""
    name = f"AdaptiveMomentum, policy {policy_name(policy)}"
    if budget is None:
        return f"{name}, no budget: looks for the smallest ranks of {blocks} blocks with a quality of {quality:.0%}"
    return f"{name}: divides a budget of {format_bytes(budget)} among {blocks} blocks now"


def later(
    policy: Policy | None, budget: int | None, *, every: int, start: int, end: float, freezes: bool, max_moves: int
) -> str:
    """Return what the callback does after the start, in words.

    Args:
        policy: The policy; None if a subclass decides.
        budget: The budget in bytes, if there is one.
        every: Steps between two decisions.
        start: Step of the first decision.
        end: Step at which the allocation freezes or training ends; infinity if it is unknown.
        freezes: Whether the allocation freezes then.
        max_moves: Maximum number of blocks that change in one decision.
    """
    if decides_once(policy, budget):
        return "changes nothing later"
    if end < start or (freezes and end == start):
        last = "the allocation freezes" if freezes else "training ends"
        due = f"the first decision is due at step {start}"
        return f"changes nothing later: {last} at step {math.ceil(end)}, and {due}; {_way_out(freezes)}"
    until = f"step {math.ceil(end)}" if end < math.inf else "the end of training"
    return f"may change up to {max_moves} blocks every {every} steps, from step {start} until {until}"


def changes(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the changes of the last decision, in words; empty if there are none."""
    before, entry = history[-2:]

    def named(rank: int, name: str, dense: Sequence[str]) -> str:
        return "none" if rank == 0 else "dense" if name in dense else str(rank)

    moved = [
        f"{name} {named(old, name, before['dense'])} → {named(new, name, entry['dense'])}"
        for name, (old, new) in entry["moves"].items()
    ]
    more = f" and {len(moved) - SHOWN_MOVES} more" if len(moved) > SHOWN_MOVES else ""
    return f"{', '.join(moved[:SHOWN_MOVES])}{more}"


def closing(history: Sequence[Mapping[str, Any]], missed: str = "") -> str:
    """Return the number of decisions and changes, in words.

    Args:
        history: The history of :class:`~lightning_memopt.AdaptiveMomentum`.
        missed: Why no decision was taken, although some was to come.
    """
    decisions = [entry for entry in history if entry["step"] > 0]
    if not decisions and missed:
        return f"no decision was taken, {missed}"
    count = sum(len(entry["moves"]) for entry in decisions)
    late = sum(len(entry["moves"]) for entry in decisions[len(decisions) // 2 :])
    moved = f"{count} move{'s' * (count != 1)}, {late} of them in the later half" if count else "no moves"
    return f"{len(decisions)} decision{'s' * (len(decisions) != 1)}, {moved}"


def too_early(start: int, frozen: bool) -> str:
    """Return why no decision was taken, and the way out, in words."""
    return f"since the first was due at step {start}; {_way_out(frozen)}"


def _way_out(frozen: bool) -> str:
    return "lower `every_n_steps` or `start`" + ", or raise `freeze_after`" * frozen
