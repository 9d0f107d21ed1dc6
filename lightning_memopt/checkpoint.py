"""Reading a saved state dict: keys and shapes decide kinds and ranks; what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.block import Block
from lightning_memopt.groups import HYPERPARAMETERS, SCHEDULED, check_group


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
        kept = {key: value for key, value in theirs.items() if key in (*HYPERPARAMETERS, *SCHEDULED)}
        kept = {**mine, **copy.deepcopy(kept)}
        kept["betas"] = tuple(kept["betas"])
        check_group(kept, f"parameter group {position} of the state dict")
        groups.append({key: value for key, value in kept.items() if key != "params"})
    return groups


def loaded_blocks(
    blocks: tuple[Block, ...], saved: Mapping[str, Any]
) -> tuple[tuple[Block, ...], Mapping[str, Tensor]]:
    """Return the blocks of one parameter with the recipes that its saved state shows, and that state.

    Raises:
        ValueError: If the state does not fit the blocks.
    """
    name = blocks[0].name
    if "step" not in saved:
        raise ValueError(f"The state of {name!r} in the state dict has no key 'step': it was saved for something else.")
    for key, value in saved.items():
        if key != "step" and not isinstance(value, Tensor):
            raise ValueError(f"The state of {name!r} in the state dict has {key!r} = {value!r}, which is no tensor.")
    saved = _split(blocks, saved)
    adapted = tuple(_loaded_block(block, saved) for block in blocks)
    known = {"step"} | {block.prefix + key for block in adapted for key in block.keys(saved)}
    leftover = sorted(set(saved) - known)
    if leftover:
        raise ValueError(
            f"The state of {name!r} in the state dict has unknown keys {leftover}: "
            "it was saved for another model or recipe."
        )
    return adapted, saved


def _split(blocks: tuple[Block, ...], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Split the state of a fused parameter that another optimizer, such as torch's AdamW, kept as one."""
    if not blocks[0].prefix or not all(key in ("step", "exp_avg", "exp_avg_sq") for key in saved):
        return saved
    split = {"step": saved["step"]}
    for block in blocks:
        slot = block.layout.slot
        for key in saved:
            if key != "step" and slot is not None and saved[key].shape[slot.dim] >= slot.start + slot.length:
                split[block.prefix + key] = saved[key].narrow(slot.dim, slot.start, slot.length)
    return split


def _loaded_block(block: Block, saved: Mapping[str, Any]) -> Block:
    dtypes = {saved[block.prefix + key].dtype for key in block.keys(saved)}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"The state of {block.name!r} in the state dict mixes dtypes or is no number: {dtypes}.")
    layout = replace(block.layout, state_dtype=dtypes.pop()) if dtypes else block.layout
    block = replace(block, layout=layout)
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
        else value.detach().to(param.device).clone(memory_format=torch.contiguous_format)
        for key, value in saved.items()
    }
