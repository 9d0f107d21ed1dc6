"""Shard the averaged weights of Lightning's callbacks ``WeightAveraging`` and ``EMAWeightAveraging``.

Lightning copies the model before the strategy shards it, so every rank would hold the average of all of it. Here the
strategy makes the average from the sharded model, and the callbacks go on as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.strategy.agreement import rank_and_size
from lightning_memopt.strategy.checkpoint.save import AVERAGING_STATE, CURRENT, WEIGHTS
from lightning_memopt.strategy.checkpoint.states import WRAPPERS, gathered
from lightning_memopt.strategy.model.shard import sharded_modules

# The class of averaging callbacks. Lightning before 2.6 lacks it.
AVERAGING: tuple[Any, ...] = (callbacks.WeightAveraging,) if hasattr(callbacks, "WeightAveraging") else ()
_with_shards: WeakSet[Trainer] = WeakSet()


class ShardedAverage(AveragedModel):
    """The average of a sharded model, sharded in the same way."""

    def __init__(
        self, model: nn.Module, dtypes: Mapping[str, torch.dtype], device: Any, *, use_buffers: bool, **options: Any
    ) -> None:
        """Start with the weights of the model.

        Args:
            model: The sharded model.
            dtypes: The dtypes that its tensors had when it was created, by name. With ``bf16-true``, an average in the
                dtype of the weights would lose most of every update.
            device: The device of the average; None for that of each tensor.
            use_buffers: Whether buffers are averaged, or copied.
            **options: The averaging function. It sees this rank's part of each tensor.
        """
        super().__init__(nn.Module(), device, use_buffers=use_buffers, **options)
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        born = {tensor: dtypes[name] for name, tensor in named if name in dtypes}
        self.module = _twin(model, born, device, {})

    @override
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        _reshard(model)
        module = self.module
        self.module = _local(module)
        try:
            super().update_parameters(_local(model))
        finally:
            self.module = module


def _twin(module: nn.Module, dtypes: Mapping[Tensor, torch.dtype], device: Any, known: dict[Any, Any]) -> nn.Module:
    """Return a module with copies of all tensors under the names of checkpoints, and no ``forward``."""
    while inner := next((child for key, child in module._modules.items() if key in WRAPPERS), None):
        module = inner
    if module in known:
        return known[module]
    twin = known[module] = nn.Module()

    def copy(tensor: Tensor) -> Tensor:
        if tensor not in known:
            value = tensor.detach().clone().to(device=device or tensor.device, dtype=dtypes.get(tensor))
            known[tensor] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
        return known[tensor]

    tables: Any = ((twin._parameters, module._parameters), (twin._buffers, module._buffers))
    for ours, theirs in tables:
        ours.update({key: None if tensor is None else copy(tensor) for key, tensor in theirs.items()})
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else _twin(child, dtypes, device, known)
    return twin


def _local(module: nn.Module) -> nn.Module:
    """Return a module with this rank's parts of all tensors, which share memory with them, in the same order."""
    held = nn.Module()
    for number, param in enumerate(module.parameters()):
        held.register_parameter(f"parameter_{number}", nn.Parameter(local_tensor(param.detach()), False))
    for number, buffer in enumerate(module.buffers()):
        held.register_buffer(f"buffer_{number}", local_tensor(buffer))
    return held


def _reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass has gathered, and show the sharded ones again."""
    for module in sharded_modules(model):
        module.reshard()


# ---------------------------------------------------------------------- callbacks


def averaging(trainer: Trainer) -> Iterator[Any]:
    """Yield the averaging callbacks of a trainer."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING):
            yield callback


def let_averaging_wait(trainer: Trainer) -> None:
    """Keep the averaging callbacks of a trainer from copying the model before it is sharded."""
    if any(averaging(trainer)):
        _with_shards.add(trainer)
        for cls in AVERAGING:
            cls.setup, cls._swap_models = _setup, _swap


def make_averages(trainer: Trainer, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the averaging callbacks of a trainer their average of a sharded model.

    Args:
        trainer: The trainer.
        model: The sharded model.
        dtypes: The dtypes that its tensors had before, by name.
    """
    for callback in averaging(trainer):
        callback._average_model = ShardedAverage(
            model, dtypes, callback._device, use_buffers=callback._use_buffers, **callback._kwargs
        )


def averaged_module(trainer: Trainer) -> nn.Module | None:
    """Return the module that holds the average of the first averaging callback; None without one."""
    averages = (callback._average_model for callback in averaging(trainer))
    return next((average.module for average in averages if isinstance(average, ShardedAverage)), None)


def tensor_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of all parameters and buffers by name."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.dtype for name, tensor in named}


_of_lightning = {name: getattr(cls, name) for cls in AVERAGING for name in ("setup", "_swap_models")}


def _setup(self: Any, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    if trainer not in _with_shards:
        _of_lightning["setup"](self, trainer, pl_module, stage)


def _swap(self: Any, pl_module: LightningModule) -> None:
    _reshard(pl_module)  # with `reshard_after_forward=False`, validation leaves gathered weights
    _of_lightning["_swap_models"](self, pl_module)


# ---------------------------------------------------------------------- checkpoints


def completed(checkpoint: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return a checkpoint whose averaged weights are as complete as those that train.

    Args:
        checkpoint: Lightning's checkpoint. If a callback has put averaged weights into it, they are sharded.
        whole: Whether to gather them on the first rank.
    """
    if CURRENT not in checkpoint:
        return checkpoint
    average = checkpoint[WEIGHTS]
    if whole:
        first = rank_and_size()[0] == 0
        values = gathered(list(average.values()), first)
        average = dict(zip(average, values, strict=True)) if first else {}
    # Extra state of modules is not averaged.
    return {**checkpoint, WEIGHTS: {**checkpoint[CURRENT], **average}}


def shown_to_callbacks(rest: dict[str, Any], model: nn.Module, averaged: nn.Module) -> dict[str, Any]:
    """Return the rest of a checkpoint with the weights that averaging callbacks load, which are loaded already.

    Args:
        rest: The checkpoint without weights.
        model: The model that trains.
        averaged: The module of its average.
    """
    if AVERAGING_STATE not in rest:
        return {**rest, WEIGHTS: model.state_dict()}
    return {**rest, WEIGHTS: averaged.state_dict(), CURRENT: model.state_dict()}
