"""Reading a saved state dict: keys and shapes decide kinds and ranks; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.block import Block
from lightning_memopt.groups import HYPERPARAMETERS

# Besides our own hyperparameters, what lr schedulers leave in a group.
_SCHEDULED = ("initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name")


def loaded_groups(saved: Sequence[Mapping[str, Any]], ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return today's groups with the saved hyperparameters, after checking that they belong together.

    A group without a recipe is one of ``torch.optim.AdamW`` and counts as ``adamw``.

    Raises:
        ValueError: If the numbers of groups or of parameters differ, or the recipes.
    """
    if len(saved) != len(ours):
        raise ValueError(
            f"The state dict has {len(saved)} parameter groups, the optimizer {len(ours)}: "
            "it was saved for another model, or with other groups."
        )
    groups = []
    for position, (theirs, mine) in enumerate(zip(saved, ours, strict=True)):
        if len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"Parameter group {position} of the state dict has {len(theirs['params'])} parameters, that of "
                f"the optimizer {len(mine['params'])}: it was saved for another model."
            )
        recipe = theirs.get("recipe", "adamw")
        if recipe != mine["recipe"]:
            raise ValueError(
                f"Parameter group {position} of the state dict was saved with recipe {recipe!r}, the optimizer "
                f"has {mine['recipe']!r}: create it with recipe={recipe!r}."
            )
        kept = {key: value for key, value in theirs.items() if key in (*HYPERPARAMETERS, *_SCHEDULED)}
        kept["betas"] = tuple(kept.get("betas", mine["betas"]))
        groups.append({**mine, **kept})
    return groups


def loaded_blocks(blocks: tuple[Block, ...], saved: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of one parameter with the recipes that its saved state shows.

    Raises:
        ValueError: If the state does not fit the blocks.
    """
    adapted = tuple(_loaded_block(block, saved) for block in blocks)
    known = {"step"} | {block.prefix + key for block in adapted for key in block.keys(saved)}
    leftover = sorted(set(saved) - known)
    if leftover or "step" not in saved:
        what = f"has unknown keys {leftover}" if leftover else "has no key 'step'"
        raise ValueError(
            f"The state of {blocks[0].name!r} in the state dict {what}: it was saved for another model or recipe."
        )
    return adapted


def _loaded_block(block: Block, saved: Mapping[str, Any]) -> Block:
    try:
        return replace(block, recipe=block.infer(saved))
    except ValueError as error:
        raise ValueError(
            f"The state dict does not fit the block {block.name!r} ({block.recipe.momentum.name} momentum, "
            f"{block.recipe.second_moment.name} second moment): {error}. It was saved for another model or recipe."
        ) from error


def placed(saved: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """Return copies of saved tensors beside their parameter, dtypes kept; step counters stay on the CPU in float32."""
    return {
        key: torch.as_tensor(value, dtype=torch.float32).detach().cpu().clone()
        if key == "step"
        else value.detach().to(device=param.device, copy=True)
        for key, value in saved.items()
    }
