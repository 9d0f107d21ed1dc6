"""Warns of what has no effect on the weights of a model: roles, overrides, ranks, sizes of heads, naming schemes.

And of one change that loses more than it says: a momentum in place of one that has a second moment of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

from lightning_memopt._registry import listed
from lightning_memopt.optim.block import Block, numel
from lightning_memopt.plans.effect import PlanWarning
from lightning_memopt.plans.plan import Plan, applies
from lightning_memopt.plans.roles import NAMING_SCHEMES
from lightning_memopt.sharding.consensus import rank

# Share of the weights with a rank below which it does not matter that it is more than they can have.
FEW = 0.1


def warn_of_no_effect(
    training: Sequence[Block], frozen: Sequence[Block], plans: Iterable[Plan], *, head_dim: int | None
) -> None:
    """Warn on the first process of the job.

    Args:
        training: The blocks that train.
        frozen: All other blocks.
        plans: Their plans.
        head_dim: What the user has given as the outputs per attention head.
    """
    if rank() > 0 or not training:
        return
    blocks = [*training, *frozen]
    texts = [text for plan in plans for text in (*_roles(plan, blocks), *_overrides(plan, training, frozen))]
    texts += [*_ranks(training), *_undivided(training), *_heads(blocks, head_dim), *_schemes(blocks)]
    for text in texts:
        warnings.warn(text, PlanWarning, stacklevel=8)


def _roles(plan: Plan, blocks: Sequence[Block]) -> Iterator[str]:
    """Report roles that a recipe file names and no block has."""
    known = {block.role for block in blocks}
    missing = [role for role in plan.named_roles if role not in known]
    if missing:
        yield (
            f"The recipe {plan.name!r} has kinds for {listed(missing)}, but no weight with that role. Roles here: "
            f"{', '.join(sorted(known))}. `lightning-memopt roles` and `plan_table()` show the role of every weight."
        )


def _overrides(plan: Plan, training: Sequence[Block], frozen: Sequence[Block]) -> Iterator[str]:
    """Report overrides of blocks none of which trains."""
    for pattern in plan.overrides:
        if any(applies(pattern, block.name, block.role) for block in training):
            continue
        names = [block.name for block in frozen if applies(pattern, block.name, block.role)]
        if names:
            adapters = " Adapters have the role 'lora'." if any(block.role == "lora" for block in training) else ""
            yield (
                f"The override {pattern!r} has no effect: no weight that it matches trains ({listed(names, 3)})."
                f"{adapters} Leave it out, or unfreeze them (requires_grad_(True))."
            )


def _ranks(training: Sequence[Block]) -> Iterator[str]:
    """Report ranks that are larger than a block's short side, unless it is that of a few small blocks."""
    asked: dict[int, list[Block]] = {}
    for block in training:
        wanted = getattr(block.plan.recipe(block.name, block.role).momentum, "rank", None)
        if isinstance(wanted, int):
            asked.setdefault(wanted, []).append(block)
    for wanted, those in asked.items():
        blocks = [
            block for block in those if wanted > block.layout.short_side == getattr(block.recipe.momentum, "rank", None)
        ]
        # Heads of two classes, and embeddings of two token types, are a part of many models.
        if sum(map(numel, blocks)) <= FEW * sum(map(numel, those)):
            continue
        names = listed([f"{block.name} ({block.layout.short_side})" for block in blocks], 3)
        yield (
            f"`rank` {wanted} is more than {len(blocks)} block{'s' * (len(blocks) > 1)} can have, whose rank is their "
            f"short side: {names}. Such momentum takes more than a dense one: choose a smaller `rank`, or "
            "{'momentum': 'dense'} for them in `overrides`."
        )


def _undivided(training: Sequence[Block]) -> Iterator[str]:
    """Report blocks without a second moment where the recipe has one inside of its momentum."""
    found: dict[tuple[str, str], list[Block]] = {}
    for block in training:
        momentum, second_moment = block.kinds
        if second_moment.normalizes or momentum.averages_squares or block.rates.lr_multiplier != 1:
            continue
        for recipe in block.plan.roles.values():
            if recipe.momentum.averages_squares:
                found.setdefault((momentum.name, recipe.momentum.name), []).append(block)
                break
    for (name, theirs), blocks in found.items():
        names = listed([block.name for block in blocks], 3)
        yield (
            f"The momentum {name!r} has no second moment in {names}: the recipe's {theirs!r} has one of its own, and "
            "'none' beside it. Such weights move by plain gradients at Adam's learning rate. Add one where you choose "
            f"{name!r}, such as {{'second_moment': 'factored'}}, or set an `lr_multiplier` for them in `overrides`."
        )


def _heads(blocks: Sequence[Block], head_dim: int | None) -> Iterator[str]:
    """Report a ``head_dim`` that neither a second moment nor a fused weight needs."""
    used = any(
        block.layout.slot is not None
        or (block.layout.head_dim is not None and block.recipe.second_moment.name == "blockwise")
        for block in blocks
    )
    if head_dim is not None and not used:
        yield (
            f"`head_dim` {head_dim} has no effect here: only queries and keys with the second moment 'blockwise', and "
            "fused weights that hold them, are divided into heads. Leave it out."
        )


def _schemes(blocks: Sequence[Block]) -> Iterator[str]:
    """Report naming schemes none of whose rules fits a name."""
    names = {block.name.partition(":")[0] for block in blocks}
    for scheme in map(NAMING_SCHEMES.get, NAMING_SCHEMES.names()):
        if not any(re.search(rule.pattern, name) for rule in scheme.rules for name in names):
            yield (
                f"The naming scheme {scheme.name!r} matches no weight here. Its first pattern is "
                f"{scheme.rules[0].pattern!r}; names here: {listed(sorted(names), 3)}."
            )
