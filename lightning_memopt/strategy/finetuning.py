"""Groups that Lightning's finetuning callbacks have added, made again before optimizer states are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def groups_restored(trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Let finetuning callbacks restore the optimizers' groups; if what follows fails, undo it.

    They do so in ``on_fit_start``, from a state that Lightning gives callbacks only after a sharded strategy has loaded
    the checkpoint. What they had unfrozen trains again, which the callbacks themselves leave out.

    Args:
        trainer: The trainer, with its optimizers.
        module: The model.
        checkpoint: The checkpoint, at least its callbacks.
    """
    states = checkpoint.get("callbacks") or {}
    callbacks = [c for c in trainer.callbacks if isinstance(c, BaseFinetuning)]  # type: ignore[attr-defined]
    before = [optimizer.param_groups for optimizer in trainer.optimizers]
    known = _params(trainer)
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(copy.deepcopy(states[callback.state_key]))
            callback.on_fit_start(trainer, module)
    unfrozen = [param for param in _params(trainer) - known if not param.requires_grad]
    _train(module, unfrozen, True)
    try:
        yield
    except BaseException:
        _train(module, unfrozen, False)
        for optimizer, groups in zip(trainer.optimizers, before, strict=True):
            optimizer.param_groups = groups
        raise


def _params(trainer: Trainer) -> set[Tensor]:
    return {param for opt in trainer.optimizers for group in opt.param_groups for param in group["params"]}


def _train(module: nn.Module, params: list[Tensor], value: bool) -> None:
    chosen = set(params)
    for child in module.modules():
        mine = [param for param in child.parameters(recurse=False) if param in chosen]
        for param in mine:
            param.requires_grad_(value)
        if mine and isinstance(child, _BatchNorm):
            child.track_running_stats = value  # frozen together by BaseFinetuning
