"""Warns of weights whose role is unknown, where the recipe treats roles differently."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable

from torch import Tensor

from lightning_memopt._registry import listed
from lightning_memopt.optim.block import Block
from lightning_memopt.plans.roles import unsplit
from lightning_memopt.sharding.consensus import rank

UNKNOWN = ("linear", "other")
# Share of the parameters that train from which they are worth a warning.
MANY = 0.1
_BIND = "`optimizer.bind(model)` finds more than names alone do: call it before the first step. Otherwise: "


class RoleWarning(UserWarning):
    """Weights have no known role, or queries and keys no known head size."""


def warn_of_unknown_roles(entries: Iterable[tuple[Tensor, Block]], *, bound: bool) -> None:
    """Warn on the first process of the job about what a recipe would need to know.

    Args:
        entries: All blocks, with their parameters.
        bound: Whether a model has told all that it can.
    """
    blocks = [block for param, block in entries if param.requires_grad]
    if rank() > 0 or not blocks:
        return
    for text in filter(None, (_of_roles(blocks, bound), _of_heads(blocks, bound))):
        warnings.warn(text, RoleWarning, stacklevel=6)


def _of_roles(blocks: list[Block], bound: bool) -> str | None:
    unknown = [block for block in blocks if block.role in UNKNOWN and _by_role(block)]
    share = sum(map(_numel, unknown)) / max(1, sum(map(_numel, blocks)))
    if share <= MANY:
        return None
    unknown.sort(key=_numel, reverse=True)
    recipes = " and ".join(repr(name) for name in dict.fromkeys(block.plan.name for block in unknown))
    first = re.sub(r"(?<=\.)\d+(?=\.)", "*", unknown[0].name)  # all layers
    names = listed([_described(block) for block in unknown])
    return (
        f"{share:.0%} of the parameters that train have no known role in the model: {names}. The recipe {recipes} "
        "gives every role its own kinds, and these weights those of 'linear' or 'other'. "
        f"{'' if bound else _BIND}Choose their kinds with `overrides={{{first!r}: {{'momentum': 'low_rank'}}}}`, or "
        "name their roles with `register_naming_scheme`. `lightning-memopt roles` and `plan_table()` show all roles."
    )


def _described(block: Block) -> str:
    return f"{block.name} ({block.why})" if unsplit(block) else block.name


def _by_role(block: Block) -> bool:
    """Return whether the block has kinds because of its role, in a plan that treats matrices by role."""
    recipes = {recipe for role, recipe in block.plan.roles.items() if role not in ("vector", "lora")}
    return len(recipes) > 1 and not block.plan.overridden(block.name, block.role)


def _of_heads(blocks: list[Block], bound: bool) -> str | None:
    unknown = [
        block.name
        for block in blocks
        if (unsplit(block) or (block.role in ("query", "key") and block.layout.head_dim is None))
        and getattr(block.recipe.second_moment, "outputs_per_number", None) == 1
    ]
    if not unknown:
        return None
    return (
        "The size of a head is unknown for queries and keys with a blockwise second moment, so every output gets a "
        f"number of its own: {listed(unknown)}. {'Pass' if bound else 'Call `optimizer.bind(model)`, or pass'} "
        "`head_dim`."
    )


def _numel(block: Block) -> int:
    return math.prod(block.layout.shape)
