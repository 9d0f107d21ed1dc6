"""Rebind optimizers that were created before their model was sharded."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.sharding.tensors import local_tensor


class KnownParameters:
    """The names that parameters had before they were replaced. Holds weak references only."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], str]] = []

    def learn(self, model: nn.Module) -> None:
        """Record the parameters that a model has now, and drop those that are no longer alive."""
        known = {param for ref, _ in self._known if (param := ref()) is not None}
        self._known = [(ref, name) for ref, name in self._known if ref() is not None]
        for name, param in model.named_parameters(remove_duplicate=False):
            # Sharded parameters are not replaced, and `Module.to` fails on them if weak references exist.
            if param not in known and not is_traceable_wrapper_subclass(param):
                self._known.append((weakref.ref(param), name))

    def names(self) -> dict[Tensor, str]:
        """Return the mapping parameter → name."""
        return {param: name for ref, name in reversed(self._known) if (param := ref()) is not None}

    def replaced(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """Return the mapping old parameter → parameter that has its name now, for those that were replaced."""
        live = dict(model.named_parameters(remove_duplicate=False))
        pairs = {old: live.get(name, old) for old, name in self.names().items()}
        return {old: new for old, new in pairs.items() if old is not new}


def rebind(optimizer: Optimizer, replaced: Mapping[Tensor, Tensor], model: nn.Module, known: KnownParameters) -> None:
    """Replace an optimizer's parameters by those that the model has now, and check the result.

    An optimizer of this package receives the names of the parameters, too.

    Args:
        optimizer: The optimizer. The object, its groups, their hyperparameters and its state are kept.
        replaced: Old parameter → new parameter.
        model: The model.
        known: Names for error messages.

    Raises:
        ValueError: If the optimizer has no parameters, a parameter that is not the model's, or state that cannot be
            sharded. Nothing has changed then.
        NotImplementedError: If a parameter is sharded in a way that an optimizer of this package does not support.
    """
    _check_live(optimizer, replaced, model, known.names())
    _check_shapes(optimizer, replaced, known.names())
    if isinstance(optimizer, MemOpt):
        optimizer.rebind(replaced)
        optimizer.bind(model)
        return
    old = [param for group in optimizer.param_groups for param in group["params"] if param in replaced]
    states = {replaced[param]: _carried(optimizer, param, replaced[param]) for param in old if param in optimizer.state}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(param, param) for param in group["params"]]
    for param in old:
        optimizer.state.pop(param, None)
    optimizer.state.update(states)


def _check_live(
    optimizer: Optimizer, replaced: Mapping[Tensor, Tensor], model: nn.Module, names: Mapping[Tensor, str]
) -> None:
    kind, live = type(optimizer).__name__, set(model.parameters())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        raise ValueError(
            f"The optimizer {kind} has no parameters, so nothing would be trained: create it in "
            "`configure_optimizers`, which runs after `configure_model`, from `self.named_parameters()`."
        )
    dead = [param for param in params if replaced.get(param, param) not in live]
    if dead:
        which = f"{names[dead[0]]!r}" if dead[0] in names else "a parameter without a name"
        raise ValueError(
            f"{len(dead)} of the {len(params)} parameters of the optimizer {kind} are not in "
            f"{type(model).__name__.removeprefix('FSDP')}, such as {which} of shape {tuple(dead[0].shape)}: they would "
            "not be trained. Create the optimizer from the parameters of the model that is trained: under a Trainer, "
            "`self.named_parameters()` in `configure_optimizers`."
        )


def _check_shapes(optimizer: Optimizer, replaced: Mapping[Tensor, Tensor], names: Mapping[Tensor, str]) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            new = replaced.get(param, param)
            if new.shape != param.shape:
                raise ValueError(
                    f"{names[param]!r} had the shape {tuple(param.shape)} when the optimizer "
                    f"{type(optimizer).__name__} was created, and has {tuple(new.shape)} now: create the optimizer in "
                    "`configure_optimizers`, which runs after `configure_model`."
                )


def _carried(optimizer: Optimizer, old: Tensor, new: Tensor) -> dict[str, Any]:
    """Return the state of the old parameter, sharded as the new one."""
    return {key: _part(optimizer, key, value, old, new) for key, value in optimizer.state[old].items()}


@torch.no_grad()
def _part(optimizer: Optimizer, key: str, value: Any, old: Tensor, new: Tensor) -> Any:
    if not isinstance(value, Tensor) or (value.ndim == 0 and old.ndim > 0):
        return value
    if value.shape != old.shape:
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} has state {key!r} of shape {tuple(value.shape)} for a parameter "
            f"of shape {tuple(old.shape)}, which cannot be sharded with it: give the strategy an optimizer that has "
            "not taken steps, and resume with `ckpt_path`."
        )
    value = value.to(local_tensor(new).device)
    if isinstance(new, DTensor) and not isinstance(value, DTensor):
        # Every rank has the whole tensor and takes its part, without communication.
        return distribute_tensor(value, new.device_mesh, new.placements, src_data_rank=None)
    return value


def move_state(optimizer: Optimizer) -> None:
    """Move state to the device of its parameter. Devices differ between parameters if some are offloaded."""
    for param, state in optimizer.state.items():
        for key, value in state.items():
            # torch's optimizers require their counters on the device on which they created them.
            if isinstance(value, Tensor) and key != "step" and value.device != param.device:
                state[key] = value.to(param.device)
