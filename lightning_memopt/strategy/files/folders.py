"""A checkpoint directory for reading: local, through one descriptor, or on another file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, Protocol

from lightning_memopt.strategy.files.atomic import current
from lightning_memopt.strategy.files.opened_file import open_regular
from lightning_memopt.strategy.files.places import Place, inside
from lightning_memopt.strategy.files.remote import connect


class Folder(Protocol):
    """An open folder."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading.

        Raises:
            FileNotFoundError: If it does not exist.
        """

    def names(self) -> list[str]:
        """Return the names in the folder."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    def inside(self, name: str) -> Folder:
        """Open a folder in this one."""

    def close(self) -> None:
        """Close it. Files that were opened stay open."""


def open_folder(place: Place) -> Folder:
    """Open a folder.

    Raises:
        OSError: If it does not exist.
    """
    return LocalFolder(current(place)) if isinstance(place, Path) else RemoteFolder(place)


class LocalFolder:
    """A folder that stays the same if another process replaces it, where the system has descriptors of folders."""

    def __init__(self, path: Path | str, within: int | None = None) -> None:
        """Open ``path``, relative to the descriptor ``within`` if there is one."""
        self._path = path
        flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
        self._descriptor = os.open(path, flags, dir_fd=within) if os.open in os.supports_dir_fd else None

    def open(self, name: str) -> IO[bytes]:
        """Open a file; as in :class:`Folder`."""
        return open_regular(self._place(name), self._descriptor)

    def names(self) -> list[str]:
        """Return the names; as in :class:`Folder`."""
        return os.listdir(self._path if self._descriptor is None else self._descriptor)

    def size(self, name: str) -> int:
        """Return a size; as in :class:`Folder`."""
        return os.stat(self._place(name), dir_fd=self._descriptor).st_size

    def inside(self, name: str) -> LocalFolder:
        """Open a folder; as in :class:`Folder`."""
        return LocalFolder(self._place(name), self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _place(self, name: str) -> Path | str:
        return name if self._descriptor is not None else Path(self._path) / name


class RemoteFolder:
    """A folder on a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Connect to the file system of ``url``."""
        self._url = url
        self._fs, self._path = connect(url)

    def open(self, name: str) -> IO[bytes]:
        """Open a file; as in :class:`Folder`."""
        return self._fs.open(f"{self._path}/{name}", "rb")

    def names(self) -> list[str]:
        """Return the names; as in :class:`Folder`."""
        return [entry.rpartition("/")[2] for entry in self._fs.ls(self._path, detail=False)]

    def size(self, name: str) -> int:
        """Return a size; as in :class:`Folder`."""
        return self._fs.size(f"{self._path}/{name}")

    def inside(self, name: str) -> RemoteFolder:
        """Open a folder; as in :class:`Folder`."""
        return RemoteFolder(str(inside(self._url, name)))

    def close(self) -> None:
        """Leave the connection to fsspec."""


def whole_size(stream: Any) -> int:
    """Return the size of an open file in bytes."""
    return stream.seek(0, os.SEEK_END)
