"""Check that an optimizer can resume from a saved state, before the state is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from lightning_memopt.optim.checkpoint.resume import notify
from lightning_memopt.optim.checkpoint.saved_state import ADAMW_KEYS, cannot_go_on, require_known_state
from lightning_memopt.optim.checkpoint.values import Values, check_kind, check_step, state_of
from lightning_memopt.optim.memopt import MemOpt

Optimizers = Sequence[torch.optim.Optimizer]

# State keys that torch's optimizers read without checking that they exist.
_NEEDED: dict[type[optim.Optimizer], frozenset[str]] = {
    optim.Adam: ADAMW_KEYS,  # AdamW is a subclass
    optim.NAdam: ADAMW_KEYS | {"mu_product"},
    optim.RAdam: ADAMW_KEYS,
    optim.Adamax: frozenset(("step", "exp_avg", "exp_inf")),
    optim.RMSprop: frozenset(("step", "square_avg")),
    optim.Adagrad: frozenset(("step", "sum")),
    optim.Adadelta: frozenset(("step", "square_avg", "acc_delta")),
    optim.Rprop: frozenset(("step", "prev", "step_size")),
    optim.ASGD: frozenset(("step", "eta", "mu", "ax")),
}


# State of torch's optimizers that is never negative.
_FACTORS = frozenset(("row_var", "col_var"))  # Adafactor's: one number per row or column
_SQUARES = _FACTORS | {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "variance"}


def check_state(saved: Mapping[str, Any], optimizer: optim.Optimizer, names: Sequence[str], values: Values) -> None:
    """Check the counters and shapes of state for an optimizer of another package, and add its tensors to ``values``.

    Args:
        saved: A state dict by position, in the order of the optimizer's parameters.
        optimizer: The optimizer that will load it.
        names: The names of its parameters, in order.
        values: Collects the tensors. Their values are not checked here.

    Raises:
        ValueError: If a shape does not match the parameter, or a counter is not a valid count.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    torchs = type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, optim.LBFGS)
    for position, entries in saved["state"].items():
        param, name = params[position], names[position]
        has = optimizer.state.get(param, {})
        for key, value in entries.items():
            if key == "step" and torchs:
                check_step(value, name)
            elif isinstance(value, Tensor):
                what = state_of(name, key)
                check_kind(value, what)
                expected = has[key].shape if isinstance(has.get(key), Tensor) else param.shape if torchs else None
                _check_shape(what, value.shape, expected, factor=key in _FACTORS)
                values.add(what, value, negative=not (torchs and key in _SQUARES), infinite=not torchs)


def _check_shape(what: str, found: torch.Size, expected: torch.Size | None, *, factor: bool) -> None:
    """Refuse a shape other than () and the expected one. A factor may have size 1 in any dimension."""
    if expected is None or found == expected or not found:
        return
    if not factor or len(found) != len(expected) or any(n not in (1, m) for n, m in zip(found, expected, strict=True)):
        raise ValueError(
            f"{what} has shape {tuple(found)}, expected {tuple(expected)}: it was saved for another parameter. Nothing "
            "was loaded. Create the optimizer as in the run that saved it."
        )


def check_family(saved: Mapping[str, Any], optimizer: optim.Optimizer) -> None:
    """Refuse state of another kind of optimizer, which would fail in the first step.

    Args:
        saved: A state dict. Only its keys and recipes are read.
        optimizer: The optimizer that will load it.

    Raises:
        ValueError: If groups or states lack keys that the optimizer reads. Nothing has changed then.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, MemOpt):
        require_known_state(saved, name)
        return
    lacks = _torch_lacks(saved, optimizer)
    if lacks or any(group.get("recipe", "adamw") != "adamw" for group in saved["param_groups"]):
        raise cannot_go_on(saved, name, lacks)


def _torch_lacks(saved: Mapping[str, Any], optimizer: optim.Optimizer) -> list[str]:
    """Return the missing keys that the optimizer reads: those of groups, then those of states."""
    groups = [{**group, "params": []} for group in saved["param_groups"]]
    probe = object.__new__(type(optimizer))
    vars(probe).update({**vars(optimizer), "defaults": dict(optimizer.defaults)})
    probe.__setstate__({"state": {}, "param_groups": groups})  # fills in keys that older versions did not save
    needed = frozenset[str]().union(*(keys for kind, keys in _NEEDED.items() if isinstance(optimizer, kind)))
    missing = [key for key in optimizer.defaults if any(key not in group for group in groups)]
    return missing or sorted({key for entry in saved["state"].values() if entry for key in needed - entry.keys()})


def check_counts(saved: Sequence[Mapping[str, Any]], optimizers: Optimizers | None) -> None:
    """Check the number of optimizer states. Warn if there are states but no optimizers.

    Raises:
        KeyError: If there are no states.
        ValueError: If the numbers of states and optimizers differ.
    """
    if optimizers is not None and not optimizers and saved:
        notify(
            f"The checkpoint has the states of {len(saved)} optimizers, but `configure_optimizers` returned None: they "
            "are not loaded, and the next checkpoint will not contain them."
        )
    if optimizers and not saved:
        raise KeyError(
            "Trying to restore optimizer state but checkpoint contains only the model. This is probably due to "
            "`ModelCheckpoint.save_weights_only` being set to `True`; to start training from these weights, load them "
            "into the model."
        )
    if optimizers and len(saved) != len(optimizers):
        raise ValueError(
            f"The checkpoint has the states of {len(saved)} optimizers, but there are {len(optimizers)}: create the "
            "optimizers of the run that saved it."
        )


def check_weights(saved: Mapping[str, Any], ours: Mapping[str, Any], strict: bool, *, fitting: bool) -> None:
    """Refuse weights whose names, shapes or sorts of numbers do not match the model's. Values are not read."""
    problems = []
    if strict:
        problems += [f"missing in the checkpoint: {name!r}" for name in ours if name not in saved]
        problems += [f"not in the model: {name!r}" for name in saved if name not in ours]
    for name, value in ours.items():
        if name not in saved:
            continue
        there, here = (tuple(entry.shape) if isinstance(entry, Tensor) else None for entry in (saved[name], value))
        if there != here:
            problems.append(f"{name!r} has shape {there} in the checkpoint and {here} in the model")
        elif isinstance(value, Tensor) and not same_sort(saved[name].dtype, value.dtype):
            problems.append(f"{name!r} has dtype {saved[name].dtype} in the checkpoint and {value.dtype} in the model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        way_out = (
            "Training can resume only with the model of the run that saved it; `strict_loading = False` applies to "
            "`validate`, `test` and `predict`. To start training from these weights, load them into the "
            "LightningModule and leave out `ckpt_path`."
            if fitting
            else (
                "To load only the weights whose names match, set `strict_loading = False` on the LightningModule; "
                "their shapes must match as well."
            )
        )
        raise RuntimeError(
            f"The checkpoint does not fit the model: {'; '.join(problems[:5])}{more}. Nothing was loaded. {way_out}"
        )


def same_sort(saved: torch.dtype, ours: torch.dtype) -> bool:
    """Return whether both dtypes hold the same sort of numbers: real, complex or integer."""
    return (saved.is_complex, saved.is_floating_point) == (ours.is_complex, ours.is_floating_point)
