"""The default way in which a single checkpoint file is written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_memopt.strategy import atomic
from lightning_memopt.strategy.reading import read_torch_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Like Lightning's, but local files are replaced in one step, synced to the disk, and mapped into memory.

    Paths of remote file systems (``s3://...``) are left to the parent class.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint in the place of whatever has its name.

        Raises:
            OSError: If it cannot be written; what was there is unchanged then.
            TypeError: If there are storage options.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            atomic.write_file(Path(path), lambda stream: torch.save(checkpoint, stream))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is truncated.
        """
        if is_local(path):
            atomic.recover(Path(path))
            return read_torch_file(Path(path), weights_only=weights_only, map_location=map_location or "cpu")
        # Lightning before 2.6 does not know the argument.
        options = {} if weights_only is None else {"weights_only": weights_only}
        return super().load_checkpoint(path, map_location=map_location, **options)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, file or directory; killed halfway, it is gone all the same."""
        if is_local(path):
            atomic.discard(Path(path))
        else:
            super().remove_checkpoint(path)


def is_local(path: str | Path) -> bool:
    """Return whether a path is no URL."""
    return "://" not in str(path)
