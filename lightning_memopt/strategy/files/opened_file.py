"""Read files of ``torch.save``: open them once, verify them, and name the file in errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import pickletools
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from lightning_memopt.strategy.files.atomic import current
from lightning_memopt.strategy.files.places import Place
from lightning_memopt.strategy.files.remote import connect

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_BLOCK, _PICKLE_SIZE = 1 << 20, 1 << 24
# A pickle names `os.system` by the module of the platform that wrote it.
_SYSTEM_MODULES = {"posix": "os", "nt": "os"}


class OpenedFile:
    """A file of ``torch.save``, opened once. All reads come from one save, even if another process replaces the file.

    Attributes:
        path: The path under which it was opened.
        identity: Identifies this save; equal on all ranks that opened the same save.
    """

    def __init__(self, path: Place) -> None:
        """Open a file, or a copy of a remote one.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If torch did not write it, or it is damaged.
        """
        self.path = path
        self._stream = open_regular(current(path)) if isinstance(path, Path) else _downloaded(path)
        try:
            self._magic = self._stream.read(len(_ZIP))
            if self._magic != _ZIP and not self._magic.startswith(_PICKLE):
                raise ValueError(f"{str(path)!r} is not a checkpoint: it is empty, or torch.save did not write it.")
            with naming(path):
                self.identity = self._identity()
        except BaseException:
            self.close()
            raise

    def read(self, *, weights_only: bool | None = None, map_location: Any = "cpu", verify: bool = True) -> Any:
        """Return the saved object. Tensors are memory-mapped, so only those that are used are read.

        Args:
            weights_only: As in ``torch.load``.
            map_location: As in ``torch.load``.
            verify: Whether to compare all checksums first, which reads the whole file.

        Raises:
            ValueError: If it is truncated or damaged.
            pickle.UnpicklingError: If it contains objects that ``weights_only`` does not allow.
        """
        with naming(self.path, self._stream):
            if verify and self._magic == _ZIP:
                verify_zip(self._stream)
            self._stream.seek(0)
            place = self._mappable()
            return torch.load(
                self._stream if place is None else place,
                map_location=map_location,
                weights_only=weights_only,
                mmap=place is not None,
            )

    @property
    def has_checksums(self) -> bool:
        """Whether the file is a zip archive, in which every entry has a checksum."""
        return self._magic == _ZIP

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of the file, by name."""
        return {str(self.path).rpartition("/")[2]: os.fstat(self._stream.fileno()).st_size}

    def close(self) -> None:
        """Close the file. Tensors that were read stay valid."""
        self._stream.close()

    def _identity(self) -> str:
        if self._magic != _ZIP:
            return str(os.fstat(self._stream.fileno()).st_size)
        self._stream.seek(0)
        with zipfile.ZipFile(self._stream) as archive:
            entries = [(info.filename, info.CRC, info.file_size) for info in archive.infolist()]
        return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()

    def _mappable(self) -> str | None:
        """Return a path to the open file, which its name may no longer refer to; None if it cannot be memory-mapped."""
        if self._magic != _ZIP:
            return None
        descriptor = self._stream.fileno()
        return next(
            (path for path in (f"/proc/self/fd/{descriptor}", f"/dev/fd/{descriptor}") if os.path.exists(path)), None
        )


def _downloaded(url: str) -> IO[bytes]:
    """Return an unnamed local copy, which can be mapped into memory."""
    fs, path = connect(url)
    with fs.open(path, "rb") as source:
        stream = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        shutil.copyfileobj(source, stream, _BLOCK)
    stream.seek(0)
    return stream


def open_regular(path: Path | str, folder: int | None = None) -> IO[bytes]:
    """Open a regular file for reading, in a folder given by its descriptor. Never blocks, as opening a pipe would.

    Raises:
        FileNotFoundError: If it does not exist.
        OSError: If it is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "this is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def verify_zip(stream: IO[bytes]) -> None:
    """Compare every entry of a file of ``torch.save`` with its CRC-32 in the file.

    Raises:
        zipfile.BadZipFile: If an entry does not match, or the file is not a zip archive.
    """
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            with archive.open(info) as entry:
                while entry.read(_BLOCK):
                    pass


@contextmanager
def naming(path: Path | str, stream: IO[bytes] | None = None) -> Generator[None, None, None]:
    """Convert any error while a file is read into one that names the file.

    Args:
        path: The path of the file.
        stream: The pickle, to find the object that is not allowed; None if no setting allows it.

    Raises:
        ValueError: If the file is damaged.
        pickle.UnpicklingError: If it contains objects that are not allowed.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _forbidden(path, error, stream) from error
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is truncated or damaged: {type(error).__name__}: {error}. Use another checkpoint."
        ) from error


def _forbidden(path: Path | str, error: Exception, stream: IO[bytes] | None) -> pickle.UnpicklingError:
    found = re.search(r"(?:GLOBAL |it contains `)([\w.]+)\.(\w+)", str(error))
    module, name = found.groups() if found else _first_global(stream)
    way_out = _TRUST if stream is not None else "Use another checkpoint."
    if not name:
        return pickle.UnpicklingError(f"{str(path)!r} cannot be read: {error} Nothing was loaded. {way_out}")
    return pickle.UnpicklingError(
        f"{str(path)!r} contains `{_SYSTEM_MODULES.get(module, module)}.{name}`, which is not allowed in a checkpoint: "
        f"loading it could run code. Nothing was loaded. {way_out}"
    )


def _first_global(stream: IO[bytes] | None) -> tuple[str, str]:
    """Return the first global in a pickle that is not torch's. torch's unpickler fails earlier on newer protocols."""
    texts: list[str] = []
    with contextlib.suppress(Exception):  # the file may be damaged, too
        assert stream is not None
        stream.seek(0)
        content = stream.read(_PICKLE_SIZE)
        if content.startswith(_ZIP):
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        for opcode, argument, _ in pickletools.genops(content):
            if "UNICODE" in opcode.name:
                texts.append(str(argument))
            elif opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                module, name = str(argument).split(" ") if opcode.name == "GLOBAL" else texts[-2:]
                if module.partition(".")[0] not in ("torch", "collections"):
                    return module, name
    return "", ""


_TRUST = (
    "Lightning's Trainer does not pass weights_only=False to sharded strategies. If you trust the source of this file, "
    "set the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, or allow the classes with "
    "torch.serialization.add_safe_globals. To avoid both, keep only tensors and builtins in hyperparameters and "
    "callback states."
)
