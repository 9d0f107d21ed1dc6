"""The default CheckpointIO for a single checkpoint file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch.serialization import get_crc32_options, set_crc32_options
from typing_extensions import override

from lightning_memopt.strategy.files import atomic, remote
from lightning_memopt.strategy.files.opened_file import OpenedFile
from lightning_memopt.strategy.files.places import is_web, place_of


class AtomicCheckpointIO(TorchCheckpointIO):
    """TorchCheckpointIO that replaces local files atomically, syncs them to disk, verifies them and memory-maps them.

    The parent class writes to remote file systems (``s3://...``).

    Args:
        verify: Whether to compare all checksums of a file before it is used.
    """

    def __init__(self, *, verify: bool = True) -> None:
        super().__init__()
        self.verify = verify

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, and replace an existing one of this name.

        Raises:
            OSError: If it cannot be written. An existing checkpoint is unchanged then.
            TypeError: If there are storage options.
        """
        place = place_of(path)
        if storage_options is not None or not isinstance(place, Path):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            atomic.write_file(place, lambda stream: save_with_checksums(checkpoint, stream))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If it is truncated or damaged.
            pickle.UnpicklingError: If it contains objects that are not allowed.
        """
        place = place_of(path)
        if not is_web(place):
            with closing(OpenedFile(place)) as file:
                return file.read(weights_only=weights_only, map_location=map_location or "cpu", verify=self.verify)
        # As Lightning does, but it unpickles by default whatever it has downloaded. None is torch.load's default.
        asked: Any = weights_only
        return torch.hub.load_state_dict_from_url(str(place), map_location=map_location, weights_only=asked)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file or directory. Its name is gone even if the process is killed halfway."""
        place = place_of(path)
        if isinstance(place, Path):
            atomic.discard(place)
        else:
            remote.discard(place)


def atomic_io(given: CheckpointIO | None, *, verify: bool) -> CheckpointIO:
    """Return the user's CheckpointIO, or else an atomic one; a wrapper of the user's around nothing gets that inside.

    Args:
        given: The user's, or None.
        verify: As in :class:`AtomicCheckpointIO`.
    """
    if isinstance(given, _WrappingCheckpointIO):
        given.checkpoint_io = AtomicCheckpointIO(verify=verify)  # has no effect if the user has put one inside
    return AtomicCheckpointIO(verify=verify) if given is None else given


def save_with_checksums(value: Any, stream: Any) -> None:
    """Write a file with ``torch.save`` and a checksum for every entry, even if the user has disabled checksums."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        torch.save(value, stream)
    finally:
        set_crc32_options(before)


def in_background(checkpoint_io: Any) -> AsyncCheckpointIO | None:
    """Return the wrapper that saves in the background, which may be inside of others; None without one."""
    while isinstance(checkpoint_io, _WrappingCheckpointIO) and not isinstance(checkpoint_io, AsyncCheckpointIO):
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io if isinstance(checkpoint_io, AsyncCheckpointIO) else None


def wait(checkpoint_io: CheckpointIO) -> None:
    """Wait for pending saves in the background, and let later ones follow.

    Raises:
        BaseException: The error of a save in the background.
    """
    background = in_background(checkpoint_io)
    if background is not None and background._executor is not None:
        background._executor.submit(lambda: None).result()  # one thread, so all saves before it are done
        if background._error is not None:
            raise background._error


def finish(checkpoint_io: CheckpointIO) -> None:
    """Wait for saves in the background. Lightning's wrappers do not pass this on to what they wrap.

    Raises:
        BaseException: The error of a save in the background.
    """
    checkpoint_io.teardown()
    if isinstance(checkpoint_io, _WrappingCheckpointIO) and checkpoint_io.checkpoint_io is not None:
        finish(checkpoint_io.checkpoint_io)


def forget(checkpoint_io: CheckpointIO, error: BaseException) -> None:
    """Do not raise the error of a save in the background again: it has been raised, and ends the run already."""
    if isinstance(checkpoint_io, AsyncCheckpointIO) and checkpoint_io._error is error:
        checkpoint_io._error = None
    if isinstance(checkpoint_io, _WrappingCheckpointIO) and checkpoint_io.checkpoint_io is not None:
        forget(checkpoint_io.checkpoint_io, error)


def innermost(checkpoint_io: CheckpointIO) -> CheckpointIO:
    """Return the CheckpointIO inside Lightning's wrappers, such as ``AsyncCheckpointIO``."""
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        assert checkpoint_io.checkpoint_io is not None
        checkpoint_io = checkpoint_io.checkpoint_io
    return checkpoint_io


def reads_plainly(checkpoint_io: CheckpointIO) -> bool:
    """Return whether :class:`AtomicCheckpointIO` reads files and no subclass overrides how."""
    while isinstance(checkpoint_io, _WrappingCheckpointIO):
        if type(checkpoint_io).load_checkpoint not in (
            _WrappingCheckpointIO.load_checkpoint,
            AsyncCheckpointIO.load_checkpoint,
        ):
            return False
        checkpoint_io = checkpoint_io.checkpoint_io  # type: ignore[assignment]
    return type(checkpoint_io).load_checkpoint is AtomicCheckpointIO.load_checkpoint


def remove_in_order(checkpoint_io: CheckpointIO, path: str | Path) -> None:
    """Remove a checkpoint after all saves that are pending in the background, and only if they succeed.

    Lightning's callbacks remove the old checkpoint once they have asked for the new one. A run that is killed before
    that one is complete would be left with none.
    """
    background = in_background(checkpoint_io)
    if background is None or background._executor is None:
        checkpoint_io.remove_checkpoint(path)
        return

    def remove() -> None:
        if background._error is None:
            try:
                checkpoint_io.remove_checkpoint(path)
            except BaseException as error:
                background._error = error  # as for saves: the next one raises it, or the end of the run

    background._executor.submit(remove)
