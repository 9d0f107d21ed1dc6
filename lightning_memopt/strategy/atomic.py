"""Replacing a file or a directory in one step: a killed process leaves the old or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel or the file system (NFS, for one) cannot exchange two names.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def unfinished(path: Path) -> Path:
    """Return the hidden name, beside ``path``, under which its replacement is written."""
    return path.with_name(f".{path.name}.saving")


def superseded(path: Path) -> Path:
    """Return the hidden name under which the old content waits where two names cannot be exchanged."""
    return path.with_name(f".{path.name}.previous")


def begin(path: Path) -> Path:
    """Clear what killed saves have left, and return the name to write to.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    remove(unfinished(path))
    remove(superseded(path))
    return unfinished(path)


def commit(path: Path) -> None:
    """Put what was written to ``unfinished(path)`` in the place of ``path``, whatever is there.

    Every file must have been synced already. What was there before is removed afterwards.

    Raises:
        OSError: If a name cannot be changed; ``path`` holds what it held then.
    """
    new = unfinished(path)
    if new.is_dir():
        sync_folder(new)
    _put(new, path)
    sync_folder(path.parent)
    with contextlib.suppress(OSError):  # the save is complete: what cannot be removed now, the next one removes
        remove(new)
        remove(superseded(path))


def abandon(path: Path) -> None:
    """Remove what was written, after an error; ``path`` holds what it held before."""
    with contextlib.suppress(OSError):
        remove(unfinished(path))


def recover(path: Path) -> None:
    """Put the old content back where a process was killed between two renames.

    Raises:
        OSError: If it cannot be renamed.
    """
    if not os.path.lexists(path) and os.path.lexists(superseded(path)):
        with contextlib.suppress(FileNotFoundError):  # another process has just done it
            os.rename(superseded(path), path)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace ``path`` by what ``write`` writes into the stream it is given.

    Raises:
        OSError: If it cannot be written; ``path`` holds what it held then.
    """
    new = begin(path)
    try:
        write_synced(new, write)
        commit(path)
    except Exception as error:
        abandon(path)
        raise OSError(
            f"Saving {str(path)!r} failed: {_first_cause(error)}. What was saved under this name before is unchanged."
        ) from error


def write_synced(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())


def discard(path: Path) -> None:
    """Remove a file or a directory of any size; its name is gone at once.

    Raises:
        OSError: If it cannot be removed.
    """
    if not os.path.lexists(path):
        return
    remove(unfinished(path))
    os.rename(path, unfinished(path))
    remove(unfinished(path))


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(new: Path, path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    if not os.path.lexists(path) or not (new.is_dir() or is_folder):
        os.replace(new, path)
    elif not exchange(new, path):
        os.rename(path, superseded(path))
        try:
            os.rename(new, path)
        except OSError:
            recover(path)
            raise


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; return False where that is not possible.

    Raises:
        OSError: If it fails for another reason.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _first_cause(error: BaseException) -> str:
    """Describe where it began: torch's writer follows a full disk with an error of its own."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"
