"""Gradient release under a Trainer: what cannot work is refused before training starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

from lightning_memopt.optim.memopt import MemOpt

_LEAVE_OUT = "or leave `gradient_release` out."


def release_gradients(module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Let the optimizer of a sharded model release gradients.

    Raises:
        TypeError: If the optimizer is not of this package.
        ValueError: If there are several optimizers.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"`gradient_release` needs one optimizer, got {len(optimizers)}: a backward pass for one of them would "
            f"update the parameters of the others. Put the parameters into groups of one optimizer, {_LEAVE_OUT}"
        )
    (optimizer,) = optimizers
    if not isinstance(optimizer, MemOpt):
        raise TypeError(
            f"`gradient_release` needs an optimizer of lightning_memopt, got {type(optimizer).__name__}: the recipe "
            "'adamw' makes the updates of torch.optim.AdamW."
        )
    optimizer.release_gradients(module)


def end_release(optimizers: Sequence[Optimizer]) -> None:
    """Remove the hooks."""
    for optimizer in optimizers:
        if isinstance(optimizer, MemOpt) and (handle := optimizer.gradient_release) is not None:
            handle.remove()


def refuse_settings(trainer: Trainer, *, cpu_offload: bool, replicas: int) -> None:
    """Refuse settings that change gradients between the backward pass and the step, or with which nothing is freed.

    Raises:
        ValueError: If there are any.
    """
    if replicas > 1:
        raise ValueError(
            f"`gradient_release` frees nothing with `replicate_size={replicas}`: FSDP2 keeps what replicas add up "
            f"until the end of the backward pass. Choose one of the two, {_LEAVE_OUT}"
        )
    if cpu_offload and TorchVersion(torch.__version__) < "2.13":
        raise ValueError(
            f"`cpu_offload` with `gradient_release` needs torch 2.13, got {torch.__version__}: before, FSDP2 calls "
            f"hooks while it still copies the gradients to the CPU. Choose one of the two, {_LEAVE_OUT}"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"`gradient_clip_val={trainer.gradient_clip_val}` needs all gradients before the first update, and "
            "`gradient_release` frees them in the backward pass. `clip_update=1.0` of the optimizer bounds the update "
            f"of each block instead: leave clipping out, {_LEAVE_OUT}"
        )
    schedules = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    counts = [trainer.accumulate_grad_batches, *(count for each in schedules for count in each.scheduling.values())]
    if max(counts) > 1:
        raise ValueError(
            f"`accumulate_grad_batches={max(counts)}` adds up gradients over several backward passes, and "
            f"`gradient_release` applies them in each: use larger batches with `activation_checkpointing`, {_LEAVE_OUT}"
        )
