"""Parsing and checking of what a user hands to an optimizer: parameters, names, hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import unknown
from lightning_memopt.plan import known_options
from lightning_memopt.ranges import check_betas, check_number

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize", "max_update")
MAX_UPDATE = 10.0
# Added to every group by torch; of no use here, and unknown to a fresh optimizer's checkpoint.
TORCHS_OWN = ("param_names", "differentiable")
# Written by lr schedulers and by Lightning's callbacks.
SCHEDULED = ("initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name")
FOREIGN_KEYS = (*SCHEDULED, *TORCHS_OWN)
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def split_names(params: Any) -> tuple[list[dict[str, Any]], dict[Tensor, str]]:
    """Return parameter groups of bare parameters, and the names that came with them.

    Args:
        params: Parameters, pairs of name and parameter, or group dicts whose ``params`` are either.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If a parameter or a name occurs twice, if only some have names, or if there are none.
    """
    if isinstance(params, Tensor):
        raise TypeError("`params` must be an iterable of parameters, got a single tensor: wrap it in a list.")
    if isinstance(params, Mapping):
        raise TypeError("`params` must be an iterable of parameters or of group dicts, got a dict: wrap it in a list.")
    _refuse_set(params)
    entries = list(params)
    if not entries:
        raise ValueError(
            "The optimizer got an empty parameter list. Layers that a LightningModule makes in `configure_model` "
            "do not exist before that: create the optimizer in `configure_optimizers`."
        )
    groups = entries if isinstance(entries[0], Mapping) else [{"params": entries}]
    names: dict[Tensor, str] = {}
    return [_group(group, names) for group in groups], names


def _group(group: Any, names: dict[Tensor, str]) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"A parameter group must be a dict with the key 'params', got {group!r}.")
    _refuse_set(group["params"])
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    taken = set(names.values())
    params: dict[Tensor, None] = {}
    for entry in entries:
        name, param = entry if _is_pair(entry) else (None, entry)
        _check_parameter(param, name)
        if param in params:
            raise ValueError(f"The parameter {names.get(param, tuple(param.shape))!r} occurs twice in a group.")
        if name is not None:
            if name in taken:
                raise ValueError(f"The name {name!r} is given to two parameters; names must be unique.")
            taken.add(name)
            names[param] = name
        params[param] = None
    unnamed = [tuple(param.shape) for param in params if param not in names]
    if names and unnamed:
        raise ValueError(
            f"{len(unnamed)} of the parameters have no name, the first of shape {unnamed[0]}, but others have: give "
            "all as pairs of name and parameter (`named_parameters()`), or none and call `optimizer.bind(model)`."
        )
    return {**group, "params": list(params)}


def _refuse_set(params: Any) -> None:
    if isinstance(params, set):
        raise TypeError("`params` must be in an order that is the same in every run; a set has none: use a list.")


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _check_parameter(param: Any, name: str | None) -> None:
    what = f" for {name!r}" if name else ""
    if not isinstance(param, Tensor):
        raise TypeError(f"Expected a parameter{what}, got {type(param).__name__}: {param!r}.")
    if param.is_complex():
        raise ValueError(f"Complex parameters are not supported, got {param.dtype}{what}; use `torch.view_as_real`.")


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Check the hyperparameters of one group.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or a key is unknown.
    """
    known = ["params", "recipe", *HYPERPARAMETERS, *FOREIGN_KEYS, *known_options()]
    for key in group:
        if key not in known:
            raise ValueError(f"In {where}: {unknown('key', key, known)}")
    lr = group["lr"]
    check_number("lr", float(lr) if isinstance(lr, Tensor) and lr.numel() == 1 else lr, where)
    check_number("eps", group["eps"], where)
    if group["eps"] == 0:
        raise ValueError(f"In {where}: `eps` must be above 0, got 0: weights whose gradient stays 0 would become NaN.")
    check_number("weight_decay", group["weight_decay"], where)
    if group["max_update"] is not None:
        check_number("max_update", group["max_update"], where)
        if group["max_update"] == 0:
            raise ValueError(f"In {where}: `max_update` must be above 0, got 0: nothing would train; None is no bound.")
    check_betas(group["betas"], where)
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"In {where}: `maximize` must be True or False, got {group['maximize']!r}.")


def state_dtype(value: Any) -> torch.dtype | None:
    """Return the dtype that the option ``state_dtype`` names; None stands for that of the arithmetic.

    Raises:
        ValueError: If it is not a dtype that state can be kept in.
    """
    if value is None:
        return None
    found = STATE_DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ValueError(unknown("`state_dtype`", str(value), list(STATE_DTYPES)))
    return found


def unnamed_error(param: Tensor) -> ValueError:
    """Return the error about a parameter without a name."""
    return ValueError(
        f"A parameter of shape {tuple(param.shape)} has no name, and what it gets depends on its role in the model: "
        "create the optimizer from `model.named_parameters()`, or call `optimizer.bind(model)` before the first step."
    )


def named(names: Mapping[Tensor, str], params: Iterable[Tensor]) -> dict[Tensor, str]:
    """Return the name of every parameter; where no names are known at all, vectors are called by their position.

    Raises:
        ValueError: If a parameter has no name though others have, or a matrix has none.
    """
    found = {}
    for position, param in enumerate(params):
        if param not in names and (names or param.ndim > 1):
            raise unnamed_error(param)
        found[param] = names.get(param, f"vector_{position}")
    return found


def check_head_dim(value: Any) -> None:
    """Check the option ``head_dim``.

    Raises:
        ValueError: If it is neither None nor a positive integer.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"`head_dim` must be an integer of at least 1 (outputs per attention head), got {value!r}.")
