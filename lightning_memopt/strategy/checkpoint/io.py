"""The default way in which a single checkpoint file is written and read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch.serialization import get_crc32_options, set_crc32_options
from typing_extensions import override

from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.opened_file import OpenedFile


class AtomicCheckpointIO(TorchCheckpointIO):
    """Like Lightning's, but local files are replaced in one step, synced to the disk, verified and mapped into memory.

    Paths of remote file systems (``s3://...``) are left to the parent class.

    Args:
        verify: Whether to compare the checksums of everything in a file before it is used.
    """

    def __init__(self, *, verify: bool = True) -> None:
        super().__init__()
        self.verify = verify

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
            atomic.write_file(Path(path), lambda stream: save_with_checksums(checkpoint, stream))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is truncated or damaged.
            pickle.UnpicklingError: If it asks for objects that are not allowed.
        """
        if is_local(path):
            with closing(OpenedFile(Path(path))) as file:
                return file.read(weights_only=weights_only, map_location=map_location or "cpu", verify=self.verify)
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


def save_with_checksums(value: Any, stream: Any) -> None:
    """Write a file of torch's with a checksum of every entry, also where the user has switched these off."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        torch.save(value, stream)
    finally:
        set_crc32_options(before)


def innermost(checkpoint_io: CheckpointIO) -> CheckpointIO:
    """Return what Lightning's wrappers, such as ``AsyncCheckpointIO``, are around."""
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        assert checkpoint_io.checkpoint_io is not None
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io


def reads_plainly(checkpoint_io: CheckpointIO) -> bool:
    """Return whether files are read by :class:`AtomicCheckpointIO` alone: nobody has overridden how."""
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        if type(checkpoint_io).load_checkpoint not in (
            _WrappingCheckpointIO.load_checkpoint,
            AsyncCheckpointIO.load_checkpoint,
        ):
            return False
        checkpoint_io = checkpoint_io.checkpoint_io  # type: ignore[assignment]
    return type(checkpoint_io).load_checkpoint is AtomicCheckpointIO.load_checkpoint


def is_local(path: str | Path) -> bool:
    """Return whether a path is no URL."""
    return "://" not in str(path)
