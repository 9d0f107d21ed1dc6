"""Warns where little or nothing is saved: of weights whose role is unknown, and of kinds that are AdamW's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from lightning_memopt._registry import listed
from lightning_memopt.optim.block import Block, all_layers, numel
from lightning_memopt.plans.effect import compresses, compresses_any
from lightning_memopt.plans.recipe import AXES, Recipe
from lightning_memopt.plans.roles import unsplit
from lightning_memopt.sharding.consensus import rank

UNKNOWN = ("linear", "other")
# What a weight of unknown part would most likely be in a model whose names are known.
KNOWN = "mlp"
# Share of the parameters that train from which unknown roles are worth a warning, whatever is saved.
MANY = 0.1
# Share of what is saved where all roles are known, below which fewer unknown ones are worth a warning, too.
HALF = 0.5
# Share of AdamW's state that nobody would miss.
SLIGHT = 0.02


class RoleWarning(UserWarning):
    """Weights have no known role, queries and keys no known head size, or the recipe saves nothing."""


def warn_of_unknown_roles(training: Sequence[Block], *, bound: bool) -> None:
    """Warn on the first process of the job about what a recipe would need to know.

    Args:
        training: The blocks that train.
        bound: Whether a model has told all that it can.
    """
    if rank() > 0 or not training:
        return
    texts = [text for found in (_of_roles, _of_heads) for text in found(training, bound)]
    for text in texts or _of_nothing_saved(training):
        warnings.warn(text, RoleWarning, stacklevel=8)


def _of_roles(blocks: Sequence[Block], bound: bool) -> Iterator[str]:
    unknown = sorted((block for block in blocks if _undecided(block)), key=numel, reverse=True)
    total = sum(map(numel, blocks))
    share = sum(map(numel, unknown)) / max(1, total)
    now = sum(_saved(block, block.recipe) for block in blocks) / max(1, 2 * total)
    known = {id(block): block.plan.recipe(block.name, KNOWN).resolve(block.layout) for block in unknown}
    then = sum(_saved(block, known.get(id(block), block.recipe)) for block in blocks) / max(1, 2 * total)
    little = then > SLIGHT and now < HALF * then
    if not unknown or (share <= MANY and not little):
        return
    recipes = " and ".join(repr(name) for name in dict.fromkeys(block.plan.name for block in unknown))
    effect = f"saves {max(0, now):.0%} of AdamW's state here; with known roles it would be {then:.0%}"
    other = "gives these weights the kinds of 'linear' or 'other', as it gives every role its own"
    first = _pattern(unknown, blocks)
    bind = "" if bound else "Call `optimizer.bind(model)` before the first step, which finds more than names tell. "
    yield (
        f"{share:.0%} of the parameters that train have no known role in the model "
        f"({listed([_described(block) for block in unknown], 3)}): the recipe {recipes} {effect if little else other}. "
        f"{bind}Choose their kinds with `overrides={{{first!r}: {_change(unknown[0], known[id(unknown[0])])}}}`, or "
        "name their roles with `register_naming_scheme`. `lightning-memopt roles` and `plan_table()` show all roles."
    )


def _undecided(block: Block) -> bool:
    """Return whether a block has kinds because of its unknown role, in a plan that treats matrices by role."""
    recipes = {recipe for role, recipe in block.plan.roles.items() if role not in ("vector", "lora")}
    return block.role in UNKNOWN and len(recipes) > 1 and not block.plan.overridden(block.name, block.role)


def _saved(block: Block, recipe: Recipe) -> int:
    """Return how many numbers fewer than AdamW a recipe keeps for a block."""
    shapes = recipe.momentum.shapes(block.layout) | recipe.second_moment.shapes(block.layout)
    return 2 * numel(block) - sum(map(math.prod, shapes.values()))


def _pattern(unknown: Sequence[Block], blocks: Sequence[Block]) -> str:
    """Return the pattern for the largest unknown weight in all layers, or its name where that would match others."""
    pattern, own = all_layers(unknown[0].name), {block.name for block in unknown}
    others = [block.name for block in blocks if block.name not in own and block.role != "vector"]
    return unknown[0].name if any(fnmatchcase(name, pattern) for name in others) else pattern


def _change(block: Block, known: Recipe) -> dict[str, str]:
    """Return an override that gives a block the kinds of a known role, or the dense momentum if it has them."""
    names = {axis: (getattr(block.recipe, axis).name, getattr(known, axis).name) for axis in AXES}
    return {axis: new for axis, (old, new) in names.items() if old != new} or {"momentum": "dense"}


def _described(block: Block) -> str:
    return f"{block.name} ({block.why})" if unsplit(block) else block.name


def _of_nothing_saved(blocks: Sequence[Block]) -> Iterator[str]:
    """Report a recipe that compresses, but none of the matrices that train."""
    matrices = [block for block in blocks if not block.layout.vector and block.role != "vector"]
    plans = {id(block.plan): block.plan for block in matrices}
    able = {key for key, plan in plans.items() if compresses_any(plan)}
    mine = [block for block in matrices if id(block.plan) in able]
    if not mine or any(map(_is_kept_small, matrices)):
        return
    roles = listed(sorted({block.role for block in mine}))
    names = " and ".join(repr(name) for name in dict.fromkeys(block.plan.name for block in mine))
    yield (
        f"The recipe {names} saves nothing of AdamW's state here, since it keeps dense averages of {roles}, and no "
        "other matrices train. `recipe='adapm_lean'` compresses every matrix; `overrides` choose kinds by role."
    )


def _is_kept_small(block: Block) -> bool:
    """Return whether a block has other kinds than AdamW's, or has these because somebody chose them."""
    return compresses(block.recipe) or block.plan.overridden(block.name, block.role)


def _of_heads(blocks: Iterable[Block], bound: bool) -> Iterator[str]:
    unknown = [
        block.name
        for block in blocks
        if (unsplit(block) or (block.role in ("query", "key") and block.layout.head_dim is None))
        and getattr(block.recipe.second_moment, "outputs_per_number", None) == 1
    ]
    if unknown:
        yield (
            "The size of a head is unknown for queries and keys with a blockwise second moment, so every output gets a "
            f"number of its own: {listed(unknown)}. {'Pass' if bound else 'Call `optimizer.bind(model)`, or pass'} "
            "`head_dim`."
        )
