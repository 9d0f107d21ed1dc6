"""Finds the parameters that a step can change: those whose gradients all ranks can use."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memopt._registry import listed
from lightning_memopt.kernels.check import usable as has_kernels
from lightning_memopt.optim.binding import Binding, params_of
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.checkpoint.saved_state import relocated
from lightning_memopt.optim.first_step import check_before_first_step
from lightning_memopt.optim.guards import Judged, verdict
from lightning_memopt.optim.weights import LOW_BITS
from lightning_memopt.sharding.tensors import aligned, arithmetic_dtype, is_aligned, local_tensor

Active = list[tuple[dict[str, Any], Tensor]]


def usable(
    optimizer: Optimizer, binding: Binding, trusted: set[Tensor], params: Sequence[Tensor]
) -> tuple[Active, list[str], list[str]]:
    """Return those of the parameters with a gradient, and the names of unusable gradients and weights.

    Args:
        optimizer: The optimizer.
        binding: Its blocks.
        params: Parameters of the optimizer. All ranks pass the same ones.
        trusted: Parameters whose weights need no check.

    Raises:
        ValueError: If names are not known, or a gradient is sparse or complex.
        RuntimeError: If ranks disagree about which parameters have a gradient, or another rank raised. Also if kernels
            are asked for and not available.
    """
    active, refusal = [], None
    try:
        active = _active(optimizer, binding, set(params))
        if active and not trusted:  # before the first step
            check_before_first_step(optimizer, binding)
    except Exception as error:  # of any type: the other ranks must know
        refusal = error
    judged = [
        Judged(
            binding.names.get(param, binding.blocks[param][0].name),
            param,
            binding.blocks[param][0].layout,
            fresh=param not in trusted,
        )
        for param in params
        if param in binding.blocks
    ]
    bad, broken = verdict(judged, refusal)
    if not all(is_aligned(param.grad, param) for _, param in active):  # type: ignore[arg-type]
        for _, param in active:
            param.grad = aligned(param.grad, param)  # type: ignore[arg-type]
        bad, broken = verdict(judged)
    return active, bad, broken


def refuse(bad: Sequence[str], broken: Sequence[str], *, released: bool = False) -> None:
    """Raise if there are unusable gradients or weights.

    Args:
        bad: Names of unusable gradients.
        broken: Names of unusable weights.
        released: Whether these are those of one layer in the backward pass.

    Raises:
        FloatingPointError: The message names them.
    """
    unchanged, clip = "Weights and state are unchanged.", "clip gradients"
    if released:
        unchanged = "Their layer is unchanged; those before it in the backward pass have taken the step."
        clip = "set `clip_update`"
    if broken:
        raise FloatingPointError(
            f"Weights with non-finite elements before the first step in: {listed(broken)}. {unchanged} Check how these "
            "weights are initialized or loaded."
        )
    if bad:
        raise FloatingPointError(
            f"Gradients with non-finite or overflowing elements in: {listed(bad)}. {unchanged} Lower the learning "
            f"rate, {clip}, or skip such steps with nonfinite='skip'."
        )


def _active(optimizer: Optimizer, binding: Binding, params: set[Tensor]) -> Active:
    """Check and return those of the parameters with a gradient."""
    active = [
        (group, param)
        for group in optimizer.param_groups
        for param in group["params"]
        if param in params and param.grad is not None
    ]
    if active or any(local_tensor(param) is not param for param in params_of(optimizer)):
        binding.require_names(optimizer)  # on all ranks, including those without gradients
    for _, param in active:
        block = binding.blocks[param][0]
        name, layout = block.name, block.layout
        if param.grad.is_sparse or param.grad.layout is not torch.strided:
            raise ValueError(f"The gradient of {name!r} is sparse; create the layer with sparse=False.")
        if param.grad.is_complex():
            raise ValueError(f"The gradient of {name!r} is complex ({param.grad.dtype}), which is not supported.")
        if param.device != layout.device or param.dtype != block.dtype:
            follow(param, optimizer, binding)
    for device in {param.device for _, param in active if binding.fused or any(map(_mixes, binding.blocks[param]))}:
        has_kernels(device, binding.fused)  # raises or warns before anything changes
    return active


def _mixes(block: Block) -> bool:
    """Return whether a kind mixes elements. If none does, torch's own fused functions may be all that a step needs."""
    return not (block.recipe.momentum.elementwise and block.recipe.second_moment.elementwise)


def follow(param: Tensor, optimizer: Optimizer, binding: Binding) -> None:
    """Adapt the state of a parameter that has another device or dtype since the optimizer was created.

    Raises:
        ValueError: If the dtype of its arithmetic changed as well, after steps in the old one.
    """
    blocks, state = binding.blocks[param], optimizer.state.get(param, {})
    dtype = arithmetic_dtype(param)
    if dtype != blocks[0].layout.dtype and state and float(state["step"]) > 0:
        raise ValueError(
            f"{blocks[0].name!r} is {param.dtype} now, but has taken steps in {blocks[0].layout.dtype} arithmetic: "
            "create a new optimizer after changing a model's dtype."
        )
    if LOW_BITS in state and param.dtype != torch.bfloat16 and float(state["step"]) > 0:
        warnings.warn(
            f"Weights that were bfloat16 are {param.dtype} now, and lose the bits that `master_weight_bits` kept "
            "beside them. To keep these, load the weights that `full_weights()` returns before the change.",
            stacklevel=2,
        )
    changes: dict[str, Any] = {"device": param.device, "dtype": dtype}
    if dtype != blocks[0].layout.dtype:  # otherwise keep the current one, which may come from a checkpoint
        changes["state_dtype"] = binding.state_dtype or dtype
    binding.blocks[param] = tuple(
        replace(block, layout=replace(block.layout, **changes), dtype=param.dtype) for block in blocks
    )
    optimizer.state[param] = relocated(binding.blocks[param], state)
