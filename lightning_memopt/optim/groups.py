"""Parses and checks what a user passes to an optimizer: parameters, names, hyperparameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.ranges import check_betas, check_number
from lightning_memopt.optim.checkpoint.values import described
from lightning_memopt.optim.options import HYPERPARAMETERS, OF_THE_OPTIMIZER, OTHER_NAMES, TORCHS
from lightning_memopt.plans.recipe import AXES, known_options

MAX_UPDATE = 10.0
NAMES = "param_names"  # torch's key, since 2.6, for the names of a group's parameters
TORCHS_OWN = (*TORCHS, "fused")  # have no effect in a group
_CLOSE = 0.7
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def split_names(params: Any) -> tuple[list[dict[str, Any]], dict[Tensor, str]]:
    """Return groups of parameters without names, and the names that came with the parameters.

    Args:
        params: Parameters, pairs of name and parameter, or group dicts whose ``params`` are either.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If a parameter or name occurs twice, if only some parameters have names, or if there are none.
    """
    if isinstance(params, nn.Module):
        kind = type(params).__name__
        raise TypeError(f"`params` must be parameters, got the module {kind}: pass `model.named_parameters()`.")
    if isinstance(params, Tensor):
        raise TypeError("`params` must be an iterable of parameters, got a single tensor: wrap it in a list.")
    if isinstance(params, Mapping):
        way = "wrap it in a list" if "params" in params else "pass `model.named_parameters()`"
        raise TypeError(f"`params` must be an iterable of parameters or of group dicts, got a dict: {way}.")
    _refuse_set(params)
    entries = list(params)
    if not entries:
        raise ValueError(
            "The optimizer got an empty parameter list. Layers that a LightningModule creates in `configure_model` do "
            "not exist before it runs: create the optimizer in `configure_optimizers`."
        )
    groups = entries if isinstance(entries[0], Mapping) else [{"params": entries}]
    names: dict[Tensor, str] = {}
    return [_group(group, names) for group in groups], names


def split_group(group: Any) -> tuple[dict[str, Any], dict[Tensor, str]]:
    """Return a group without names, and the names that came with its parameters; see :func:`split_names`."""
    names: dict[Tensor, str] = {}
    return _group(group, names), names


def plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with Python numbers instead of numpy's, which a checkpoint cannot hold without pickling."""
    return {key: plain(value) for key, value in group.items()}


def plain(value: Any) -> Any:
    """Convert a numpy number to a Python number, alone or in a tuple or list. Return other values unchanged."""
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(plain(entry) for entry in value)
    return value


def _group(group: Any, names: dict[Tensor, str]) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(
            f"A parameter group must be a dict such as {{'params': model.named_parameters()}}, got {described(group)}."
        )
    _refuse_set(group["params"])
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    given = group.get(NAMES)
    if given is not None:
        if len(given) != len(entries):
            raise ValueError(f"A parameter group has {len(entries)} parameters and {len(given)} names in {NAMES!r}.")
        entries = [entry if _is_pair(entry) else (name, entry) for name, entry in zip(given, entries, strict=True)]
    taken = set(names.values())
    params: dict[Tensor, None] = {}
    for entry in entries:
        name, param = entry if _is_pair(entry) else (None, entry)
        _check_parameter(param, name)
        if param in params:
            raise ValueError(f"The parameter {names.get(param, tuple(param.shape))!r} occurs twice in a group.")
        if name is not None:
            if name in taken:
                raise ValueError(
                    f"The name {name!r} is given to two parameters; names must be unique: take all from the whole "
                    "model, or give each module its own, as in `head.named_parameters('head')`."
                )
            taken.add(name)
            names[param] = name
        params[param] = None
    unnamed = [tuple(param.shape) for param in params if param not in names]
    if names and unnamed:
        raise ValueError(
            f"{len(unnamed)} of the parameters have no name (the first has shape {unnamed[0]}), but others do: pass "
            "all as pairs of name and parameter (`named_parameters()`), or all without names and call "
            "`optimizer.bind(model)`."
        )
    return {**group, "params": list(params)}


def _refuse_set(params: Any) -> None:
    if isinstance(params, set):
        raise TypeError("`params` must have the same order in every run, but a set has no order: use a list.")


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _check_parameter(param: Any, name: str | None) -> None:
    what = f" for {name!r}" if name else ""
    if not isinstance(param, Tensor):
        raise TypeError(f"Expected a parameter{what}, got {described(param)}: pass `model.named_parameters()`.")
    if param.is_complex():
        raise ValueError(f"Complex parameters are not supported, got {param.dtype}{what}; use `torch.view_as_real`.")


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Check the hyperparameters of one group.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range.
    """
    lr = group["lr"]
    check_number("lr", float(lr) if isinstance(lr, Tensor) and lr.numel() == 1 else lr, where)
    check_number("eps", group["eps"], where)
    if group["eps"] == 0:
        raise ValueError(f"In {where}: `eps` must be above 0, got 0: weights whose gradient stays 0 would become NaN.")
    check_number("weight_decay", group["weight_decay"], where)
    if group["max_update"] is not None:
        check_number("max_update", group["max_update"], where)
        if group["max_update"] == 0:
            raise ValueError(
                f"In {where}: `max_update` must be above 0, got 0: nothing would train; None means no bound."
            )
    check_betas(group["betas"], where)
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"In {where}: `maximize` must be True or False, got {group['maximize']!r}.")


def check_keys(group: Mapping[str, Any], where: str) -> None:
    """Refuse keys of a group that are misspelled options. All other keys are the user's own, and are kept.

    A key counts as misspelled if difflib rates its similarity to an option above 0.7. A key such as ``lr_scale``, with
    the whole name of an option among its words, is the user's own.

    Raises:
        ValueError: If a key is misspelled, or an option of the whole optimizer, or not supported.
    """
    if group.get("amsgrad"):
        raise ValueError(f"In {where}: `amsgrad` is not supported, no second moment keeps a maximum.")
    known = [*HYPERPARAMETERS, "recipe", *known_options()]
    for key in group:
        if key in (*known, "params", *TORCHS_OWN):
            continue
        if key in OF_THE_OPTIMIZER or key in AXES:
            raise ValueError(
                f"In {where}: Unknown key {key!r}: only the optimizer as a whole has that option. The kinds of a group "
                "come from its `recipe`."
            )
        if key == "lr_multiplier":
            raise ValueError(
                f"In {where}: Unknown key 'lr_multiplier': give the group its own `lr`, or set the multiplier by role "
                "or name in the optimizer's `overrides`."
            )
        meant = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(str(key).lower(), known, 1, _CLOSE)), None)
        if meant and not re.fullmatch(rf"(.+_)?{meant}(_.+)?", str(key)):
            raise ValueError(
                f"In {where}: Unknown key {key!r}. Did you mean {meant!r}? Available: {', '.join(known)}. A custom key "
                "needs a name that is less similar to these."
            )


def state_dtype(value: Any) -> torch.dtype | None:
    """Return the dtype for the option ``state_dtype``, or None for the dtype of the arithmetic.

    Raises:
        ValueError: If state cannot be kept in it.
    """
    if value is None:
        return None
    found = STATE_DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ValueError(unknown("`state_dtype`", str(value), list(STATE_DTYPES)))
    return found


def unnamed_error(param: Tensor) -> ValueError:
    """Return the error for a parameter without a name."""
    return ValueError(
        f"A parameter of shape {tuple(param.shape)} has no name, but its kinds depend on its role in the model: create "
        "the optimizer from `model.named_parameters()`, or call `optimizer.bind(model)` first. With a Trainer, the "
        "callback `lightning_memopt.BindNames` does that; the command line `lightning_memopt.MemOptCLI` has it."
    )


def named(names: Mapping[Tensor, str], params: Iterable[Tensor]) -> dict[Tensor, str]:
    """Return the name of every parameter. If no names are known at all, name vectors by their position.

    Raises:
        ValueError: If a parameter has no name although others have, or a matrix has none.
    """
    found = {}
    for position, param in enumerate(params):
        if param not in names and (names or param.ndim > 1):
            raise unnamed_error(param)
        found[param] = names.get(param, f"vector_{position}")
    return found


def shown(group: Mapping[str, Any]) -> str:
    """Return the hyperparameters of a group in one line, for ``repr``."""
    return (
        f"recipe={group['recipe']!r}, lr={float(group['lr']):g}, betas={group['betas']}, eps={group['eps']:g}, "
        f"weight_decay={group['weight_decay']:g}, max_update={group['max_update']}, {len(group['params'])} parameters"
    )
