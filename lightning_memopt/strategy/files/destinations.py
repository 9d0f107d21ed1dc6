"""Where a checkpoint directory is saved: a new folder, which takes the place of an earlier save when it is complete."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from lightning_memopt.strategy.files import atomic, remote
from lightning_memopt.strategy.files.checksums import Checksum, ChecksummedFiles, ChecksummedRemoteFiles
from lightning_memopt.strategy.files.directory import NOTE, REST, check_replaceable, copy_others, explanation
from lightning_memopt.strategy.files.places import Place

_TRIES = 20
Write = Callable[[dict[str, Any], IO[bytes]], Any]


class Destination(Protocol):
    """Saves to one name. The first rank calls everything but :meth:`writer`."""

    def check_replaceable(self) -> None:
        """Refuse to replace something that is not a checkpoint.

        Raises:
            IsADirectoryError: If the name is a directory with other files.
            FileExistsError: If it is a file that a directory cannot replace.
        """

    def begin(self) -> Any:
        """Return a new folder to write to."""

    def writer(self, new: Any) -> tuple[FileSystemWriter, dict[str, Checksum]]:
        """Return torch's writer to a new folder, and the table that it fills."""

    def has(self, new: Any, name: str) -> bool:
        """Return whether another rank's file has arrived."""

    def commit(self, new: Any, rest: dict[str, Any], write: Write) -> None:
        """Complete a new folder, and put it in the place of the earlier save.

        Args:
            new: The folder.
            rest: The content of ``meta.pt``.
            write: Writes it to a stream.
        """

    def abandon(self, new: Any) -> None:
        """Remove a folder that was not completed."""


def destination(place: Place) -> Destination:
    """Return how to save to a place."""
    return Local(place) if isinstance(place, Path) else Remote(place)


class Local:
    """A folder beside the name, which it takes by a rename."""

    def __init__(self, path: Path) -> None:
        """Save to ``path``."""
        self._path = path

    def check_replaceable(self) -> None:
        """Refuse to replace other files; as in :class:`Destination`."""
        check_replaceable(self._path)

    def begin(self) -> Path:
        """Return a new folder, with a copy of other files from the one that it replaces."""
        new = atomic.begin(self._path)
        try:
            new.mkdir()
            for _ in range(_TRIES):
                # Another process has replaced the directory.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, shutil.Error):
                    copy_others(self._path, new)
                    return new
            copy_others(self._path, new)
            return new
        except BaseException:
            atomic.abandon(new)
            raise

    def writer(self, new: Path) -> tuple[FileSystemWriter, dict[str, Checksum]]:
        """Return a writer that syncs every file to disk."""
        writer, files = FileSystemWriter(new, sync_files=True), ChecksummedFiles()
        writer.fs = files
        return writer, files.checksums

    def has(self, new: Path, name: str) -> bool:
        """Return whether a file is there."""
        return (new / name).is_file()

    def commit(self, new: Path, rest: dict[str, Any], write: Write) -> None:
        """Replace the path by the folder."""
        atomic.write_synced(new / NOTE, lambda stream: stream.write(_note(self._path.name)))
        atomic.write_synced(new / REST, lambda stream: write(rest, stream))
        atomic.commit(new, self._path)

    def abandon(self, new: Path) -> None:
        """Remove the folder. After a commit there is nothing to remove."""
        atomic.abandon(new)


class Remote:
    """A folder inside the checkpoint, which becomes current when ``meta.pt`` names it."""

    def __init__(self, url: str) -> None:
        """Save to ``url``."""
        self._url = url

    def check_replaceable(self) -> None:
        """Refuse to replace other files; as in :class:`Destination`."""
        remote.check_replaceable(self._url)

    def begin(self) -> str:
        """Return the URL of a new folder."""
        return remote.begin(self._url)

    def writer(self, new: str) -> tuple[FileSystemWriter, dict[str, Checksum]]:
        """Return a writer through fsspec."""
        # There is nothing to sync: a file is stored when it is closed.
        writer, files = FsspecWriter(new, sync_files=False), ChecksummedRemoteFiles()
        files.init_path(new)
        writer.fs = files  # type: ignore[assignment]
        return writer, files.checksums

    def has(self, new: str, name: str) -> bool:
        """Return whether an object is there."""
        fs, path = remote.connect(new)
        return fs.exists(f"{path}/{name}")

    def commit(self, new: str, rest: dict[str, Any], write: Write) -> None:
        """Write ``meta.pt``."""
        stream = io.BytesIO()
        write({**rest, remote.PARTS: new.rpartition("/")[2]}, stream)
        remote.commit(new, self._url, stream.getvalue(), _note(self._url))

    def abandon(self, new: str) -> None:
        """Remove the folder, unless it was committed."""
        remote.abandon(new)


def _note(name: str) -> bytes:
    return explanation(name).encode() + b"\n"
