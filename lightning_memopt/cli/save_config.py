"""Save the config of a run without touching another one's."""

from __future__ import annotations

import os

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class SaveConfig(SaveConfigCallback):
    """Save the config of a run beside its logs, under a unique name.

    Lightning raises an error if ``config.yaml`` exists, or overwrites it. Without a logger, the directory is the
    working directory, so the second ``fit`` would fail or replace the user's own file. This class saves to
    ``config-v1.yaml`` instead, numbered as Lightning numbers checkpoints.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the file's name on rank 0 and save."""
        if not (self.already_saved or self.overwrite) and trainer.log_dir is not None:
            stem, suffix = os.path.splitext(self.config_filename)
            name, version = self.config_filename, 0
            while os.path.exists(os.path.join(trainer.log_dir, name)):
                version += 1
                name = f"{stem}-v{version}{suffix}"
            self.config_filename = trainer.strategy.broadcast(name)
        super().setup(trainer, pl_module, stage)
