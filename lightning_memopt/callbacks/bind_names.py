"""The callback that gives optimizers the names of a module's parameters."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memopt.optim.memopt import MemOpt


class BindNames(Callback):
    """Bind every ``MemOpt`` of the trainer to the module, before a checkpoint is restored.

    For optimizers that know no names: those of bare parameters, such as ``list(self.parameters())``. All others learn
    the sizes of attention heads and how fused weights are laid out. :class:`~lightning_memopt.MemOptCLI` has this
    callback, and ``strategy="memopt_fsdp"`` binds by itself. Any other Trainer takes it as one line::

        trainer:
          callbacks:
            - class_path: lightning_memopt.BindNames
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the optimizers."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, MemOpt):
                optimizer.bind(pl_module)
