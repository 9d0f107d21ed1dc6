"""Open a checkpoint of either format."""

from __future__ import annotations

from pathlib import Path

from lightning_memopt.strategy.files import atomic
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.opened_file import OpenedFile
from lightning_memopt.strategy.files.places import Place
from lightning_memopt.strategy.files.remote import connect


def open_checkpoint(
    path: Place, *, weights_only: bool | None = None, verify: bool = True
) -> OpenedDirectory | OpenedFile:
    """Open a directory or a file.

    Args:
        path: The checkpoint, or its URL.
        weights_only: As in ``torch.load``, for entries of a directory that are not tensors.
        verify: Whether to compare checksums of a directory.

    Raises:
        ValueError: If it is missing, incomplete or damaged.
        pickle.UnpicklingError: If a file contains objects that are not allowed.
    """
    directory, file = _kind(path)
    if directory:
        return OpenedDirectory(path, weights_only=weights_only, verify=verify)
    if not file:
        raise ValueError(
            f"The path {str(path)!r} does not point to a valid checkpoint: there is no file or directory of that name "
            f"(working directory: {Path.cwd()})."
        )
    return OpenedFile(path)


def is_directory(path: Place) -> bool:
    """Return whether a checkpoint is a directory."""
    return _kind(path)[0]


def _kind(path: Place) -> tuple[bool, bool]:
    """Return whether there is a directory, and whether there is a file."""
    if isinstance(path, Path):
        place = atomic.current(path)
        return place.is_dir(), place.is_file()
    fs, name = connect(path)
    file = fs.isfile(name)
    return not file and fs.isdir(name), file
