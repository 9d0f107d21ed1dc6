"""Loads a state dict into an optimizer. Everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memopt.optim.binding import Binding, params_of
from lightning_memopt.optim.block import initial_state
from lightning_memopt.optim.checkpoint.names import arranged, places, saved_names, warn_of_positions
from lightning_memopt.optim.checkpoint.resume import facts, tell, tell_of_bits_apart, tell_of_dropped_bits
from lightning_memopt.optim.checkpoint.saved_state import (
    allocated,
    examine,
    loaded,
    loaded_groups,
    of_betas,
    require_known_state,
)
from lightning_memopt.optim.checkpoint.values import Share, Values, check_structure
from lightning_memopt.optim.gradients import follow
from lightning_memopt.optim.weights import dropped_bits
from lightning_memopt.sharding.tensors import arithmetic_dtype


@torch.no_grad()
def prepare_load(
    optimizer: Optimizer,
    binding: Binding,
    state_dict: Mapping[str, Any],
    *,
    share: Share,
    ordered: bool,
    hooks: Iterable[Callable[[Optimizer], None]],
) -> Callable[[], None]:
    """Check all of a state dict and return a function that loads it; see :meth:`MemOpt.prepare_load`.

    Args:
        optimizer: The optimizer.
        binding: Its blocks.
        state_dict: The state dict.
        share: As in :meth:`MemOpt.prepare_load`.
        ordered: As in :meth:`MemOpt.prepare_load`.
        hooks: Called with the optimizer after its state is loaded.
    """
    check_structure(state_dict)
    require_known_state(state_dict, type(optimizer).__name__)
    binding.require_names(optimizer)
    found = None if ordered else _places(optimizer, binding, state_dict)
    by_torch = _is_ordered_by_torch(state_dict)
    if found is not None:
        state_dict = arranged(state_dict, found)
    groups = loaded_groups(state_dict["param_groups"], optimizer.param_groups)
    for param in params_of(optimizer):
        block = binding.blocks[param][0]
        if param.dtype != block.dtype and arithmetic_dtype(param) == block.layout.dtype:
            follow(param, optimizer, binding)  # whose weights have other bits now
    saved = _saved_state(optimizer, binding, state_dict)
    values = Values(share)
    for param, entries in saved.items():
        if entries:
            examine(binding.blocks[param], entries, values)
    values.check()

    def load() -> None:
        if found is None and not (ordered or by_torch):
            warn_of_positions(state_dict)
        _load(optimizer, binding, state_dict["param_groups"], groups, saved, hooks)

    return load


def allocate_state_dict(optimizer: Optimizer, binding: Binding, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of zeros like ``saved``; see :meth:`MemOpt.allocate_state_dict`."""
    binding.require_names(optimizer)
    loaded_groups(saved["param_groups"], optimizer.param_groups)
    found = _saved_state(optimizer, binding, saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    states = {
        index: allocated(param, binding.blocks[param], found[param])
        for index, param in zip(indices, params_of(optimizer), strict=True)
        if found[param]
    }
    return {"state": states, "param_groups": saved["param_groups"]}


@torch.no_grad()
def _load(
    optimizer: Optimizer,
    binding: Binding,
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Tensor, Mapping[str, Any]],
    hooks: Iterable[Callable[[Optimizer], None]],
) -> None:
    """Install groups and state that have been checked."""
    before, was_converted = _facts(optimizer, binding), False
    dropped = [
        (bits, param.dtype == torch.bfloat16)
        for param, entries in saved.items()
        if entries and (bits := dropped_bits(entries, binding.blocks[param][0].bits)) is not None
    ]
    blocks, states = {}, {}
    for group, theirs in zip(optimizer.param_groups, saved_groups, strict=True):
        convert = theirs.get("recipe", "adamw") != group["recipe"]
        for param in group["params"]:
            if saved[param]:
                entries = of_betas(saved[param], theirs["betas"], group["betas"]) if convert else saved[param]
                blocks[param], states[param] = loaded(
                    binding.blocks[param], entries, convert=convert, betas=group["betas"]
                )
                was_converted |= convert
            elif param.requires_grad:
                states[param] = initial_state(binding.blocks[param])
    for ours, values in zip(optimizer.param_groups, groups, strict=True):
        ours.update(values)
    binding.reformatted.update({block.name: block.recipe for entries in blocks.values() for block in entries})
    binding.blocks.update(blocks)
    optimizer.state.clear()
    optimizer.state.update(states)
    for hook in hooks:
        hook(optimizer)
    steps = [int(state["step"].item()) for state in states.values()]
    after = _facts(optimizer, binding)
    tell(type(optimizer).__name__, before, after, step=max(steps, default=0), converted=was_converted)
    tell_of_dropped_bits(type(optimizer).__name__, [bits for bits, half in dropped if half])
    tell_of_bits_apart(type(optimizer).__name__, [bits for bits, half in dropped if not half])


def _facts(optimizer: Optimizer, binding: Binding) -> Any:
    return facts(optimizer.param_groups, (block for *_, block in binding.entries(optimizer)))


def _places(
    optimizer: Optimizer, binding: Binding, state_dict: Mapping[str, Any]
) -> list[tuple[int, list[int]]] | None:
    """Return the place of every parameter's saved state, by name, or None to go by position."""
    theirs, ours = saved_names(state_dict), binding.parameter_names(optimizer)
    if theirs is None or ours is None:
        return None
    try:
        return places(theirs, ours, "state dict")
    except ValueError:
        if _is_ordered_by_torch(state_dict):
            return None
        raise


def _is_ordered_by_torch(state_dict: Mapping[str, Any]) -> bool:
    """Return whether torch's set_optimizer_state_dict has sorted everything into our order, by its own names."""
    return any(isinstance(index, str) for group in state_dict["param_groups"] for index in group["params"])


def _saved_state(
    optimizer: Optimizer, binding: Binding, state_dict: Mapping[str, Any]
) -> dict[Tensor, Mapping[str, Any]]:
    """Return the saved state of every parameter. It is empty if none was saved and none is required."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    known = set(indices)
    unknown_indices = [index for index in state_dict["state"] if index not in known]
    if unknown_indices:
        raise ValueError(f"The state dict has state for parameters {unknown_indices[:5]} that no group lists.")
    ours = any("recipe" in group for group in state_dict["param_groups"])
    found = {}
    for index, param in zip(indices, params_of(optimizer), strict=True):
        found[param] = state_dict["state"].get(index) or {}
        if not found[param] and param.requires_grad and ours and any(state_dict["state"].values()):
            raise ValueError(
                f"The state dict has no state for {binding.blocks[param][0].name!r}, which was frozen when the state "
                "dict was saved. Freeze it (requires_grad_(False)), load, then unfreeze it."
            )
    return found
