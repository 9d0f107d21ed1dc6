"""A learning rate schedule that takes its length from the trainer."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class WarmupCosine(Callback):
    """Raise every group's learning rate linearly, then lower it along a cosine until the end of the run.

    A callback instead of an ``lr_scheduler`` takes its length from the trainer (``max_steps`` or ``max_epochs``), so
    the two cannot disagree. The factor depends only on the step, so resumed runs continue it.

    Args:
        warmup_steps: Number of steps until the full learning rate.
        final: Learning rate at the end, as a fraction of the full one.
    """

    def __init__(self, warmup_steps: int = 30, final: float = 0.1) -> None:
        if warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must not be negative, got {warmup_steps}.")
        if not 0 <= final <= 1:
            raise ValueError(f"`final` must be between 0 and 1, got {final}.")
        self.warmup_steps, self.final = warmup_steps, final

    def factor(self, step: int, total: float) -> float:
        """Return the factor on the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if not math.isfinite(total) or total <= self.warmup_steps:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the full learning rates under the key that torch's schedulers use."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the coming step."""
        factor = self.factor(trainer.global_step, trainer.estimated_stepping_batches)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
