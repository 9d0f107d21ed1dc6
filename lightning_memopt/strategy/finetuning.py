"""Restore the groups that Lightning's finetuning callbacks added, before optimizer states are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

_by_value = BaseFinetuning.filter_on_optimizer


def let_finetuning_compare_sharded_parameters(trainer: Trainer) -> None:
    """Make finetuning callbacks compare sharded parameters by identity.

    Lightning compares values. This fails for parameters that are sharded along different dimensions, and treats two
    biases of zeros as the same parameter. Parameters that are not sharded are compared as before.
    """
    if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        BaseFinetuning.filter_on_optimizer = staticmethod(_not_in)  # type: ignore[method-assign]


def _not_in(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    params = list(params)
    if not any(isinstance(param, DTensor) for param in params):
        return _by_value(optimizer, params)
    known = {param for group in optimizer.param_groups for param in group["params"]}
    new = [param for param in params if param not in known]
    if len(new) < len(params):
        rank_zero_warn(
            f"{len(params) - len(new)} of the unfrozen parameters are in the optimizer already, and stay in their "
            "group. Create the optimizer only from parameters with `requires_grad`."
        )
    return new


@contextmanager
def groups_restored(trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Let finetuning callbacks restore the optimizers' groups, and undo this if the body of the ``with`` block fails.

    The callbacks restore groups in ``on_fit_start``, but Lightning loads their state only after a sharded strategy has
    loaded the checkpoint. This function also sets ``requires_grad`` of the parameters that the callbacks had unfrozen;
    the callbacks do not.

    Args:
        trainer: The trainer, with its optimizers.
        module: The model.
        checkpoint: The checkpoint. Only its ``callbacks`` entry is read.
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
            child.track_running_stats = value  # BaseFinetuning freezes both together
