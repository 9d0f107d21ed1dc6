"""Reads a saved state dict. Its keys and shapes decide kinds and ranks; what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.ranges import check_betas
from lightning_memopt.optim.block import OF_PARAMETERS, Block, initial_state
from lightning_memopt.optim.checkpoint.values import Values, check_kind, check_step, state_of
from lightning_memopt.optim.conversion import converted, weight_of
from lightning_memopt.optim.groups import NAMES, TORCHS_OWN, check_group, plain, plain_group
from lightning_memopt.optim.weights import LOW_BITS, LOW_DTYPES, carried_bits
from lightning_memopt.plans.roles import ROLES
from lightning_memopt.sharding.state import like_param
from lightning_memopt.sharding.tensors import full_tensor

Blocks = tuple[Block, ...]
# The state that torch's AdamW keeps for every parameter.
ADAMW_KEYS = frozenset(("step", "exp_avg", "exp_avg_sq"))


def require_known_state(saved: Mapping[str, Any], optimizer: str) -> None:
    """Check that a state dict comes from this package or from torch's AdamW.

    Args:
        saved: The state dict; only its keys are used.
        optimizer: The name of the optimizer's class, for the message.

    Raises:
        ValueError: If it lacks state that every recipe can continue from.
    """
    groups = saved["param_groups"]
    if any("recipe" in group for group in groups):
        return  # recipes and keys are compared individually later
    missing = [key for key in ("betas", "eps") if any(key not in group for group in groups)]
    entries = [entry for entry in saved["state"].values() if entry]
    missing = missing or sorted({key for entry in entries for key in ADAMW_KEYS - entry.keys()})
    if missing:
        raise cannot_go_on(saved, optimizer, missing)


def cannot_go_on(saved: Mapping[str, Any], optimizer: str, missing: Sequence[str]) -> ValueError:
    """Return the error for a state dict that another kind of optimizer saved."""
    groups = saved["param_groups"]
    recipes = dict.fromkeys(group["recipe"] for group in groups if "recipe" in group)
    keys = dict.fromkeys(key for group in groups for key in group if key not in ("params", NAMES))
    by = f"recipe {' and '.join(map(repr, recipes))}" if recipes else f"an optimizer with the options {', '.join(keys)}"
    what = f"lacks {', '.join(map(repr, missing))}" if missing else "is compressed"
    return ValueError(
        f"{optimizer} cannot resume from this checkpoint: its optimizer state {what}. It was saved by {by}. Nothing "
        "was loaded. Use the optimizer of the run that saved it, or start from the weights only: load them into the "
        "model without the optimizer's state (with a Trainer, without `ckpt_path`)."
    )


def loaded_groups(saved: Sequence[Mapping[str, Any]], ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the current groups with the saved hyperparameters, after checking that they match.

    A group without a recipe comes from ``torch.optim.AdamW`` and counts as ``adamw``. Every recipe can continue from
    ``adamw``, but keeps its own betas, since they belong to the recipe. The user's own keys are restored.

    Raises:
        ValueError: If the number of groups, the number of parameters, or the recipes differ.
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
        if recipe not in (mine["recipe"], "adamw"):
            raise ValueError(
                f"Parameter group {position} of the state dict was saved with recipe {recipe!r}, the optimizer has "
                f"{mine['recipe']!r}. Nothing was loaded. Create the optimizer with `MemOpt(recipe={recipe!r})` or the "
                f"class of that recipe (on a command line: --optimizer=lightning_memopt.MemOpt "
                f"--optimizer.recipe={recipe}), or start from the weights only."
            )
        left_out = {"params", "recipe", NAMES, *(() if "recipe" in theirs else TORCHS_OWN)}
        kept = {key: value for key, value in theirs.items() if key not in left_out}
        check_betas(numbers(theirs["betas"]), f"parameter group {position} of the state dict")
        kept = plain_group({**mine, **copy.deepcopy(kept)})
        betas = mine["betas"] if recipe != mine["recipe"] else kept["betas"]
        kept["betas"] = tuple(betas) if isinstance(betas, list | tuple) else betas
        check_group(kept, f"parameter group {position} of the state dict")
        groups.append({key: value for key, value in kept.items() if key != "params"})
    return groups


def numbers(betas: Any) -> Any:
    """Return decay rates that may be tensors as numbers. What is no pair stays, to be refused."""
    if not isinstance(betas, list | tuple):
        return betas
    return tuple(beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else plain(beta) for beta in betas)


def loaded(
    blocks: Blocks, saved: Mapping[str, Any], *, convert: bool, betas: tuple[float, float] = (0.0, 0.0)
) -> tuple[Blocks, dict[str, Tensor]]:
    """Return the blocks of one parameter as its saved state implies them, and that state placed like the parameter.

    Args:
        blocks: The current blocks.
        saved: Key → tensor. Tensors are whole, or DTensors of any placement.
        convert: Whether to keep the recipes of the current blocks and convert the saved state to them.
        betas: Of the saved averages, needed to convert them to other kinds.

    Raises:
        ValueError: If the state does not fit the blocks.
    """
    theirs, saved = inferred(blocks, saved)
    state = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).detach().cpu().reshape(()).clone()}
    for old, new in zip(theirs, blocks, strict=True):
        state.update(converted(old, new if convert else old, saved, betas=betas))
    state.update(carried_bits(saved, blocks[0].layout, blocks[0].bits))
    return blocks if convert else theirs, state


def of_betas(saved: Mapping[str, Any], theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return AdamW's averages as they would be after the same steps with other betas.

    An average that starts from zero has a weight of 1 − βᵗ, which bias correction makes up for. With β₂ = 1, squares
    are added up. Without this, the next steps would be too large by the root of what is missing, up to √t times.
    State that is already compressed stays as it is.
    """
    step = float(saved["step"])
    if not step:
        return dict(saved)
    saved_weights, wanted = ([weight_of(beta, step) for beta in numbers(betas)] for betas in (theirs, ours))
    factors = {
        key: mine / other for key, mine, other in zip(("exp_avg", "exp_avg_sq"), wanted, saved_weights, strict=True)
    }
    found = {key: factors.get(key.rpartition(".")[2], 1.0) for key in saved}
    return {key: value if found[key] == 1 else value * found[key] for key, value in saved.items()}


def relocated(blocks: Blocks, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a parameter after it moved. Before the first step, state is initialized again.

    Initializing again also gives real state to parameters that were on the meta device.
    """
    if not state or float(state["step"]) == 0:
        return initial_state(blocks) if state else {}
    return loaded(blocks, state, convert=True)[1]


def examine(blocks: Blocks, saved: Mapping[str, Any], values: Values) -> None:
    """Check that :func:`loaded` can load a parameter's state. Add its tensors to ``values`` without reading them.

    Raises:
        ValueError: If the state does not fit the blocks, or does not hold numbers.
    """
    name = blocks[0].name if not blocks[0].prefix else blocks[0].name.rpartition(":")[0]
    tensors = {key: value for key, value in saved.items() if key != "step" and isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        check_kind(tensor, state_of(name, key))
    shapes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    theirs, _ = inferred(blocks, {**saved, **shapes})
    check_step(saved["step"], name)
    squares = {prefix + key for block in theirs for key in block.squares for prefix in (block.prefix, "")}
    for key, tensor in tensors.items():
        values.add(state_of(name, key), tensor, negative=key not in squares)


def inferred(blocks: Blocks, saved: Mapping[str, Any]) -> tuple[Blocks, Mapping[str, Tensor]]:
    """Return the blocks of one parameter with the recipes that its saved state implies, and the state split by block.

    Raises:
        ValueError: If the state does not fit the blocks.
    """
    name = blocks[0].name
    if "step" not in saved:
        raise ValueError(f"The state of {name!r} in the state dict has no key 'step': it was saved for something else.")
    for key, value in saved.items():
        if key != "step" and not isinstance(value, Tensor):
            raise ValueError(f"The state of {name!r} in the state dict has {key!r} = {value!r}, which is not a tensor.")
    _check_bits(blocks, saved)
    saved = _split(blocks, saved)
    adapted = tuple(_loaded_block(block, saved) for block in blocks)
    known = OF_PARAMETERS | {block.prefix + key for block in adapted for key in block.keys(saved)}
    leftover = sorted(set(saved) - known)
    if leftover:
        why = _why_left_over(blocks, leftover)
        raise ValueError(f"The state of {name!r} in the state dict has unknown keys {leftover}: {why}")
    return adapted, saved


def _check_bits(blocks: Blocks, saved: Mapping[str, Any]) -> None:
    """Raise if the extra bits of weights do not fit the parameter."""
    if LOW_BITS not in saved:
        return
    bits, expected = saved[LOW_BITS], blocks[0].layout.param_shape
    if bits.dtype not in LOW_DTYPES.values() or tuple(bits.shape) != expected:
        raise ValueError(
            f"The state of {blocks[0].name!r} in the state dict has {LOW_BITS!r} of shape {tuple(bits.shape)} and "
            f"{bits.dtype}, expected {expected} and int8 or int16: it was saved for another model."
        )


def _why_left_over(blocks: Blocks, keys: Sequence[str]) -> str:
    """Return why saved state has keys that fit no block: a weight may be split on one side only."""
    roles = sorted({key.partition(".")[0] for key in keys if "." in key} & set(ROLES))
    if roles and not blocks[0].prefix:
        return (
            f"this weight was split into {' and '.join(roles)} where it was saved, and is whole here "
            f"({blocks[0].why}): call `optimizer.bind(model)` before loading."
        )
    if blocks[0].prefix and not any("." in key for key in keys):
        return (
            f"this weight is split into {', '.join(block.role for block in blocks)} here, and was whole where it was "
            "saved: by an earlier version, or without `bind(model)`. Load the weights without the optimizer's state, "
            "or keep it whole with `register_naming_scheme`."
        )
    return "it was saved for another model or recipe."


def allocated(param: Tensor, blocks: Blocks, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return zeros for this rank's part of a parameter's saved state, with the saved dtypes and global shapes."""
    state = {"step": torch.zeros((), dtype=torch.float32)}
    adapted, split = inferred(blocks, saved)
    if set(split) == set(saved):
        for block in adapted:
            state.update(block.init())
        if LOW_BITS in saved:
            state[LOW_BITS] = like_param(blocks[0].layout, saved[LOW_BITS].dtype)
        return state
    for key in saved:  # fused state, from an optimizer without blocks
        if key != "step":
            state[key] = torch.zeros_like(param, dtype=saved[key].dtype, requires_grad=False)
    return state


def _split(blocks: Blocks, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Split the fused state of a parameter into blocks, if another optimizer such as torch's AdamW saved it."""
    if not blocks[0].prefix or not ADAMW_KEYS.issuperset(saved):
        return saved
    split = {"step": saved["step"]}
    for key in sorted(set(saved) - {"step"}):
        expected = blocks[0].layout.param_shape
        if tuple(saved[key].shape) != expected:
            name = blocks[0].name.rpartition(":")[0]
            raise ValueError(
                f"The state of {name!r} in the state dict has {key!r} of shape {tuple(saved[key].shape)}, the "
                f"parameter has {expected}: it was saved for another model."
            )
        value = full_tensor(saved[key])
        for block in blocks:
            slot = block.layout.slot
            assert slot is not None
            split[block.prefix + key] = slot.view(value).reshape(block.layout.shape)
    return split


def _loaded_block(block: Block, saved: Mapping[str, Any]) -> Block:
    dtypes = {saved[block.prefix + key].dtype for key in block.keys(saved)}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"The state of {block.name!r} in the state dict mixes dtypes or is not floating-point: {dtypes}."
        )
    layout = replace(block.layout, state_dtype=dtypes.pop()) if dtypes else block.layout
    block = replace(block, layout=layout)
    try:
        return replace(block, recipe=block.infer(saved))
    except ValueError as error:
        raise ValueError(
            f"The state dict does not fit the block {block.name!r} ({block.recipe.momentum.name} momentum, "
            f"{block.recipe.second_moment.name} second moment): {error}. It was saved for another model or recipe."
        ) from error
