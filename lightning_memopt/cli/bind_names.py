"""A callback that tells optimizers the names of the parameters."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memopt.optim.memopt import MemOpt


class BindNames(Callback):
    """Bind every ``MemOpt`` of the trainer to the names of the module's parameters, before a checkpoint is restored.

    This covers optimizers from the command line and from the module's ``configure_optimizers``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the optimizers."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, MemOpt):
                optimizer.bind(pl_module)
