"""Optimizer states by parameter name or by position, as full tensors or as this rank's local parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_memopt.optim.checkpoint.names import arranged, places, saved_names
from lightning_memopt.optim.groups import plain_group
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.sharding.collectives import MAX_PAYLOAD, Gather, gather, packed
from lightning_memopt.sharding.layout import Cut, pieces
from lightning_memopt.sharding.tensors import fill_

# torch.compile and activation checkpointing add these to names; `get_model_state_dict` strips the same.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name. A tied parameter has several names; checkpoints use the first."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves gathered parameters
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): param
        for name, param in model.named_parameters(remove_duplicate=False)
    }


def first_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the names of the parameters in checkpoints."""
    names: dict[Tensor, str] = {}
    for name, param in parameter_names(model).items():
        names.setdefault(param, name)
    return names


def by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state dict with parameter names instead of positions.

    State that does not exist yet is not created. torch's own function takes a step on zero gradients to create it.

    Raises:
        ValueError: If a parameter is not in the model.
    """
    ordered = names_of(optimizer, model)
    saved = optimizer.state_dict()
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    named = dict(zip(ids, itertools.chain(*ordered), strict=True))
    return {
        "state": {named[index]: dict(entries) for index, entries in saved["state"].items() if entries},
        "param_groups": [
            {**plain_group(group), "params": [named[i] for i in group["params"]]} for group in saved["param_groups"]
        ],
    }


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names in the model of each group's parameters.

    Raises:
        ValueError: If a parameter is not in the model.
    """
    names = first_names(model)
    for position, param in enumerate(_params(optimizer)):
        if param not in names:
            raise ValueError(
                f"Parameter {position} of {type(optimizer).__name__}, of shape {tuple(param.shape)}, is not a "
                f"parameter of {type(model).__name__}: its state cannot be saved under a name."
            )
    return [[names[param] for param in group["params"]] for group in optimizer.param_groups]


def by_position(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Any], bool]:
    """Return a state dict in the format and order of ``optimizer.state_dict()``, and whether names decided the order.

    Raises:
        ValueError: If groups or their parameters differ; the message names the first parameter.
    """
    names, kind = saved_names(saved), type(optimizer).__name__
    if names is None:
        found = _places_by_count(saved["param_groups"], optimizer)
    else:
        found = _places_by_name(names, optimizer, model)
    ordered = arranged(saved, found)
    numbers = itertools.count()
    positions = {index: next(numbers) for group in ordered["param_groups"] for index in group["params"]}
    unknown = next((index for index in saved["state"] if index not in positions), None)
    if unknown is not None:
        raise ValueError(f"The checkpoint has state of {kind} for parameter {unknown!r}, which no group lists.")
    return {
        "state": {positions[index]: entries for index, entries in saved["state"].items()},
        "param_groups": [
            {**group, "params": [positions[index] for index in group["params"]]} for group in ordered["param_groups"]
        ],
    }, names is not None


def _places_by_name(
    names: list[list[str]], optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[tuple[int, list[int]]]:
    params, first = parameter_names(model), first_names(model)
    kind = type(optimizer).__name__
    theirs = [[first[params[name]] if name in params else name for name in group] for group in names]
    ours = [[first[param] for param in group["params"]] for group in optimizer.param_groups]
    try:
        return places(theirs, ours, "checkpoint", kind)
    except ValueError:
        own = optimizer.parameter_names() if isinstance(optimizer, MemOpt) else None
        if own is None or own == ours:
            raise
        return places(names, own, "checkpoint", kind)  # the names passed to the optimizer, on one device


def _places_by_count(
    groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer
) -> list[tuple[int, list[int]]]:
    sizes = [len(group["params"]) for group in groups]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != ours:
        raise ValueError(
            f"The checkpoint has parameter groups of {sizes} parameters for {type(optimizer).__name__}, the optimizer "
            f"has groups of {ours}: create it with the groups of the run that saved it."
        )
    return [(number, list(range(size))) for number, size in enumerate(sizes)]


def allocated(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Replace the meta tensors of a state dict by position with real ones, placed as the optimizer needs them now.

    An optimizer of this package defines the placement of its state. For other optimizers, state with the shape of its
    parameter is placed as the parameter is, and all other state is whole on every rank.
    """
    if isinstance(optimizer, MemOpt):
        return optimizer.allocate_state_dict(saved)
    state = _with_params(saved, optimizer, _allocate)
    return {"state": state, "param_groups": saved["param_groups"]}


def cut(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard the full tensors of a state dict by position, so that the optimizer can load it.

    An optimizer of this package shards full tensors itself when it loads them.
    """
    if isinstance(optimizer, MemOpt):
        return dict(saved)
    return {"state": _with_params(saved, optimizer, _cut), "param_groups": saved["param_groups"]}


def gathered(values: Sequence[Any], keep: bool) -> list[Any]:
    """Return values with full tensors on the CPU in the place of tensors, or None for each if not ``keep``.

    All ranks of a mesh must call this function with the same values in the same order. One collective gathers small
    tensors of at most 64 MiB together; a larger tensor is gathered by itself.
    """
    found: list[Any] = [None] * len(values)
    cuts = {position: cut for position, value in enumerate(values) if (cut := _cut_of(value)) is not None}
    for batch in packed(cuts, lambda position: _size(values[position])):
        wholes = gather(
            [
                Gather(_sendable(values[position]).to_local(), cuts[position], _size(values[position]))
                for position in batch
            ]
        )
        if keep:
            for position, whole in zip(batch, wholes, strict=True):
                found[position] = whole.cpu()
    for position, value in enumerate(values):
        if position not in cuts:
            found[position] = _whole(value, keep)
    return found


def _cut_of(value: Any) -> Cut | None:
    """Return how a small tensor is cut along one dimension of its mesh; None for all other values."""
    if not isinstance(value, DTensor):
        return None
    shards = [position for position, placement in enumerate(value.placements) if not placement.is_replicate()]
    # The bytes of larger elements would not be aligned.
    if len(shards) != 1 or value.element_size() > 8 or _size(value) > MAX_PAYLOAD:
        return None
    mesh, placement = value.device_mesh, value.placements[shards[0]]
    if type(placement) is not Shard or type(value.to_local()) is not Tensor or mesh.size(shards[0]) == 1:
        return None
    sizes = tuple(pieces(value.shape[placement.dim], mesh.size(shards[0])))
    return Cut(placement.dim, sizes, mesh.get_local_rank(shards[0]), mesh.get_group(shards[0]))


def _size(value: Tensor) -> int:
    """Return the bytes of the whole tensor."""
    return value.numel() * value.element_size()


def _sendable(value: Any) -> Any:
    """Return a tensor on the device of its mesh. The process group cannot send offloaded tensors from the CPU."""
    value = value.detach()
    kind = value.device_mesh.device_type
    return value if value.device.type == kind else value.to(kind)


def _whole(value: Any, keep: bool) -> Any:
    if not isinstance(value, Tensor):
        return value if keep else None
    value = _sendable(value).full_tensor() if isinstance(value, DTensor) else value.detach()
    if not keep:
        return None
    value = value.cpu()
    # A view would write its whole storage to the file.
    return value.clone() if value.untyped_storage().nbytes() != value.nbytes else value


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _with_params(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, change: Any) -> dict[Any, Any]:
    """Apply a function of a state tensor and its parameter to all state. Parameters are matched by position."""
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    params: dict[Any, Tensor] = dict(zip(ids, _params(optimizer), strict=False))  # `load_state_dict` checks the number
    return {
        index: {
            key: change(value, params[index]) if isinstance(value, Tensor) else value for key, value in entry.items()
        }
        for index, entry in saved["state"].items()
        if index in params
    }


def _allocate(value: Tensor, param: Tensor) -> Tensor:
    if value.shape == param.shape and value.ndim:
        return torch.empty_like(param, dtype=value.dtype, requires_grad=False)
    return torch.empty(value.shape, dtype=value.dtype)


def _cut(value: Tensor, param: Tensor) -> Tensor:
    if value.shape != param.shape or not value.ndim:
        return value
    mine = _allocate(value, param)
    fill_(mine, value)
    return mine
