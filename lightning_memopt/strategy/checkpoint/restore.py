"""Check optimizer states and weights that were read, and write them only after all checks have passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from lightning_memopt.optim.checkpoint.names import warn_of_positions
from lightning_memopt.optim.checkpoint.resume import facts, tell
from lightning_memopt.optim.checkpoint.values import Share, Values, check_kind, check_structure
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.sharding.tensors import fill_
from lightning_memopt.strategy.checkpoint.compatibility import check_state
from lightning_memopt.strategy.checkpoint.save import CURRENT, WEIGHTS
from lightning_memopt.strategy.checkpoint.states import cut, names_of, parameter_names

Adapting = Callable[[dict[str, Any]], AbstractContextManager[Any]]


def parts_of(checkpoint: Any, weights: str, states: str) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """Return the weights and the optimizer states of a checkpoint in one file.

    Args:
        checkpoint: The checkpoint that was read.
        weights: The key of the weights.
        states: The key of the optimizer states.

    Raises:
        TypeError: If the checkpoint or a part of it has the wrong type.
        ValueError: If it has no weights.
    """
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise TypeError(f"The checkpoint must be a dict with the key {weights!r}, got {kind}.")
    if weights not in checkpoint:
        keys = ", ".join(repr(key) for key in list(checkpoint)[:5]) or "nothing"
        raise ValueError(
            f"The checkpoint has no key {weights!r}, it has {keys}: it was not saved by Lightning. To start training "
            "from bare weights, load them into the LightningModule and leave out `ckpt_path`."
        )
    found, optimizers = checkpoint[weights], checkpoint.get(states, [])
    for key, value, fits in (
        (weights, found, isinstance(found, Mapping)),
        (states, optimizers, isinstance(optimizers, list | tuple)),
    ):
        if not fits:
            got = type(value).__name__
            raise TypeError(f"The checkpoint has a value of type {got} under {key!r}: it was not saved by Lightning.")
    optimizers = [state for state in optimizers if state != {}]  # a run without an optimizer saves an empty state
    for number, state in enumerate(optimizers):
        check_structure(state, f"state of optimizer {number} in the checkpoint")
    return found, optimizers


@dataclass(frozen=True)
class Target:
    """Weights in a checkpoint, and the module that takes them.

    Attributes:
        saved: The saved weights by name, or tensors of their shapes.
        module: The module.
        ours: Its state dict.
        expected: The state dict that must have the same names and shapes as the saved one.
    """

    saved: Mapping[str, Any]
    module: nn.Module
    ours: dict[str, Any]
    expected: dict[str, Any]


def targets_of(
    weights: Mapping[str, Any], current: Mapping[str, Any] | None, model: nn.Module, averaged: nn.Module | None
) -> dict[str, Target]:
    """Return which module takes which weights of a checkpoint, by the key of the weights.

    Args:
        weights: The weights under Lightning's key for them.
        current: The weights that train, if the others are averaged.
        model: The model that trains.
        averaged: The module for averaged weights, if there is one.
    """
    ours: dict[str, Any] = get_model_state_dict(model)
    if averaged is None or not current:
        return {WEIGHTS: Target(weights, model, ours, ours)}
    return {
        WEIGHTS: Target(weights, averaged, get_model_state_dict(averaged), ours),
        CURRENT: Target(current, model, ours, ours),
    }


def prepare_optimizer(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    share: Share,
    *,
    named: bool,
    whole: bool,
) -> Callable[[], None]:
    """Check the state of one optimizer and return a function that loads it.

    Args:
        state: A state dict by position, in the order of the optimizer's parameters.
        optimizer: The optimizer.
        model: The model that it trains.
        share: This rank's position and the number of ranks that share the check of tensors that all of them have.
        named: Whether names decided the order.
        whole: Whether tensors are full tensors, not this rank's local parts.

    Raises:
        ValueError: If the state does not fit, or holds invalid values.
    """
    if isinstance(optimizer, MemOpt):
        load = optimizer.prepare_load(state, share=share, ordered=True)
    else:
        values = Values(share)
        check_state(state, optimizer, list(chain(*names_of(optimizer, model))), values)
        values.check()
        load = _loader(state, optimizer, whole)

    def restore() -> None:
        if not named:
            warn_of_positions(state)
        load()

    return restore


def _loader(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, whole: bool) -> Callable[[], None]:
    def load() -> None:
        before = facts(optimizer.param_groups)
        optimizer.load_state_dict(cut(state, optimizer) if whole else dict(state))
        steps = [float(entries["step"]) for entries in state["state"].values() if "step" in entries]
        tell(type(optimizer).__name__, before, facts(optimizer.param_groups), step=int(max(steps, default=0)))

    return load


def check_values(
    weights: Mapping[str, Any], ours: Mapping[str, Any], model: nn.Module, share: Share, path: Any
) -> None:
    """Refuse sparse and meta tensors, parameters with NaN, and trained parameters with infinite elements.

    The values of buffers are not checked.

    Args:
        weights: The saved weights by name.
        ours: The model's weights by name.
        model: The model.
        share: This rank's position and the number of ranks that share the check of tensors that all of them have.
        path: The checkpoint, for the message.

    Raises:
        ValueError: If a weight is refused; the message names the first.
    """
    values, params = Values(share), parameter_names(model)
    for name, value in weights.items():
        if isinstance(value, Tensor) and isinstance(ours.get(name), Tensor):
            what = f"The saved weight {name!r} in {str(path)!r}"
            check_kind(value, what)
            if name in params:
                values.add(what, value, infinite=not params[name].requires_grad)
    values.check()


@torch.no_grad()
def write_weights(weights: Mapping[str, Any], ours: dict[str, Any], model: nn.Module) -> None:
    """Write weights into the model: full tensors, or DTensors placed as the model's.

    Args:
        weights: The saved weights by name. Those that the model does not have are ignored.
        ours: The model's state dict, with the model's own tensors.
        model: The model.
    """
    for name in ours.keys() & weights.keys():
        if isinstance(ours[name], Tensor):
            fill_(ours[name], weights[name])
        else:
            ours[name] = weights[name]
    # The tensors are written already. This call runs hooks and loads extra state.
    mine = {name: ours[name] for name in ours if name in weights}
    set_model_state_dict(model, mine, options=StateDictOptions(strict=False))
