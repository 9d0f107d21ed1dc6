"""Checksums of whole files, computed while they are written and compared when they are read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as RemoteFileSystem
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase

# Size of a file in bytes, and its CRC-32.
Checksum = tuple[int, int]
_BLOCK = 1 << 20


class RecordingStream:
    """A file for writing that records the first error of the operating system.

    torch's writers continue after an error, and their final error ("unexpected pos 704 vs 598") hides that the disk is
    full. The ``with`` block raises the first error at its end.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        """Write to ``raw``, a new file."""
        self._raw = raw
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        with self._remembered():
            return self._raw.write(data)

    def flush(self) -> None:
        """Flush the buffer to the operating system."""
        with self._remembered():
            self._raw.flush()

    def close(self) -> None:
        """Close the file."""
        with self._remembered():
            self._raw.close()

    def tell(self) -> int:
        """Return the position."""
        return self._raw.tell()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._raw.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._error is not None and error is not self._error:
            raise self._error

    @contextmanager
    def _remembered(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error
            raise


class ChecksummedStream(RecordingStream):
    """A file that is written sequentially and computes its checksum."""

    def __init__(self, raw: IO[bytes]) -> None:
        """Write to ``raw``, a new file."""
        super().__init__(raw)
        self._size = self._crc = 0

    def write(self, data: Any) -> int:
        """Write bytes and add them to the checksum."""
        count = super().write(data)
        self._size += count
        self._crc = zlib.crc32(data, self._crc)
        return count

    @property
    def checksum(self) -> Checksum:
        """Size and CRC-32 of the bytes written so far."""
        return self._size, self._crc


class Checksumming(FileSystemBase):
    """A mixin for torch's file systems for distributed checkpoints: a checksum of every file that they write.

    Attributes:
        checksums: File name → checksum.
    """

    def __init__(self) -> None:
        """Start without checksums."""
        super().__init__()
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file; as in torch's class."""
        with super().create_stream(path, mode) as raw:  # type: ignore[safe-super]
            if "w" not in mode:
                yield raw
                return
            with ChecksummedStream(raw) as stream:  # type: ignore[arg-type]
                yield stream
            self.checksums[Path(path).name] = stream.checksum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file; as in torch's class."""
        super().rename(path, new_path)  # type: ignore[safe-super]
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class ChecksummedFiles(Checksumming, FileSystem):
    """Local files with checksums."""


class ChecksummedRemoteFiles(Checksumming, RemoteFileSystem):
    """Files on a file system that fsspec knows, with checksums."""


def checksum(stream: IO[bytes]) -> Checksum:
    """Return the checksum of a file that is open for reading."""
    stream.seek(0)
    size = crc = 0
    block = bytearray(_BLOCK)
    while count := stream.readinto(block):  # type: ignore[attr-defined]
        crc = zlib.crc32(memoryview(block)[:count], crc)
        size += count
    return size, crc


def parsed(table: Any) -> dict[str, Checksum]:
    """Validate a table of checksums that was read from a file, and return it.

    Raises:
        ValueError: If it is not such a table.
    """
    if not isinstance(table, Mapping) or not all(map(_is_entry, table.items())):
        raise ValueError(f"the table of checksums is damaged: {table!r:.200}")
    return {name: (size, crc) for name, (size, crc) in table.items()}


def _is_entry(entry: tuple[Any, Any]) -> bool:
    name, sums = entry
    is_name = isinstance(name, str) and Path(name).name == name
    return is_name and isinstance(sums, tuple | list) and [type(number) for number in sums] == [int, int]
