"""Open a checkpoint of either format."""

from __future__ import annotations

from pathlib import Path

from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.opened_file import OpenedFile


def open_checkpoint(
    path: Path, *, weights_only: bool | None = None, verify: bool = True
) -> OpenedDirectory | OpenedFile:
    """Open a directory or a file.

    Args:
        path: The checkpoint.
        weights_only: As in ``torch.load``, for entries of a directory that are not tensors.
        verify: Whether to compare checksums of a directory.

    Raises:
        ValueError: If it is missing, incomplete or damaged.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    place = atomic.current(path)
    if place.is_dir():
        return OpenedDirectory(path, weights_only=weights_only, verify=verify)
    if not place.is_file():
        raise ValueError(
            f"The path {str(path)!r} does not point to a valid checkpoint: there is no file or directory of that name "
            f"(working directory: {Path.cwd()})."
        )
    return OpenedFile(path)
