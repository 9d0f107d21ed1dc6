"""Replace a file or a directory atomically: a killed process leaves the old or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_memopt.strategy.files.checksums import RecordingStream
from lightning_memopt.strategy.files.processes import is_alive, machine

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel or the file system (NFS, for one) cannot exchange two names.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
# Errors of a rename if another process has just changed one of the names.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
_SAVING, _PREVIOUS = "saving", "previous"
# A save by a process on another machine, which cannot be queried, counts as dead after this time, in seconds.
MAX_AGE = 24 * 3600.0
_TRIES = 100

_active: set[Path] = set()


def begin(path: Path) -> Path:
    """Remove leftovers of dead processes, and return a unique name beside ``path`` to write to.

    Raises:
        OSError: If the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        try:
            os.rename(current(path), path)
        except OSError as error:  # another process has just renamed it, or has saved under the name
            if error.errno not in _TAKEN:
                raise
    for left in _leftovers(path):
        with contextlib.suppress(OSError):  # another process removes it at the same time
            remove(left)
    new = _own_name(path, _SAVING)
    _active.add(new)
    return new


def commit(new: Path, path: Path) -> None:
    """Replace ``path`` by ``new``, which :func:`begin` returned, and remove the old content.

    Every file must have been synced already.

    Raises:
        OSError: If a rename fails. ``path`` is unchanged then.
    """
    if new.is_dir():
        sync_folder(new)
    old = _move_to(new, path)
    sync_folder(path.parent)
    _active.discard(new)
    with contextlib.suppress(OSError):  # the save is complete; the next save removes leftovers
        remove(old)


def abandon(new: Path) -> None:
    """Remove what was written, after an error. The path to replace is unchanged."""
    _active.discard(new)
    with contextlib.suppress(OSError):
        remove(new)


def current(path: Path) -> Path:
    """Return where the content of ``path`` is: under another name if a save has not finished its two renames."""
    if os.path.lexists(path):
        return path
    waiting = [entry for entry, kind, _, _ in _hidden(path) if kind == _PREVIOUS]
    return max(waiting, key=_age_key, default=path)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace ``path`` by the file that ``write`` writes to its stream.

    Raises:
        OSError: If it cannot be written. ``path`` is unchanged then.
    """
    new = begin(path)
    try:
        write_synced(new, write)
        commit(new, path)
    except Exception as error:
        raise OSError(
            f"Saving {str(path)!r} failed: {_first_cause(error)}. Any existing checkpoint of this name is unchanged."
        ) from error
    finally:
        if new in _active:
            abandon(new)


def write_synced(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as raw, RecordingStream(raw) as stream:
        write(stream)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())


def discard(path: Path) -> None:
    """Remove a file or a directory of any size. Its name is gone at once.

    Raises:
        OSError: If it cannot be removed.
    """
    if not os.path.lexists(path):
        return
    name = _own_name(path, _SAVING)
    os.rename(path, name)
    remove(name)


def remove(path: Path | None) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path is None:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Sync a file that another library has written to disk."""
    _sync(path)


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk."""
    if os.name == "posix":  # other systems cannot open folders
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_to(new: Path, path: Path) -> Path | None:
    """Move ``new`` to ``path``, and return the new name of the old content, if there is any.

    Another process may replace ``path`` at the same time. The last save wins, and both are complete.
    """
    previous = _own_name(path, _PREVIOUS)
    for _ in range(_TRIES):
        is_folder = path.is_dir() and not path.is_symlink()
        try:
            if not os.path.lexists(path) or not (new.is_dir() or is_folder):
                os.replace(new, path)
                return previous if os.path.lexists(previous) else None
            if exchange(new, path):
                return new
            remove(previous)
            os.rename(path, previous)
            os.rename(new, path)
            return previous
        except OSError as error:
            if not os.path.lexists(path):
                with contextlib.suppress(OSError):  # nothing was moved away, or another save has arrived
                    os.rename(previous, path)
            if error.errno not in _TAKEN or not os.path.lexists(new):
                raise
    raise OSError(errno.EBUSY, "other processes keep saving under this name", str(path))


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically. Return False if the system does not support it.

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


# ---------------------------------------------------------------------- hidden names: their owners, and leftovers


def _own_name(path: Path, kind: str) -> Path:
    """Return a unique hidden name beside ``path`` that identifies this process."""
    return path.with_name(f".{path.name}.{kind}-{machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _hidden(path: Path) -> Iterator[tuple[Path, str, str, int]]:
    """Yield the hidden names of saves to ``path`` with kind, machine and process. Older versions save only the kind."""
    form = re.compile(rf"\.{re.escape(path.name)}\.({_SAVING}|{_PREVIOUS})(?:-([0-9a-f]+)-(\d+)-[0-9a-f]+)?")
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            if match := form.fullmatch(entry.name):
                yield path.with_name(entry.name), match[1], match[2] or "", int(match[3] or 0)


def _leftovers(path: Path) -> list[Path]:
    """Return abandoned names: those of dead processes, and those that are too old."""
    now = time.time()
    return [
        entry
        for entry, _, host, process in _hidden(path)
        if entry not in _active
        and (host == machine() and (process == os.getpid() or not is_alive(process)) or now - _age_key(entry) > MAX_AGE)
    ]


def _age_key(path: Path) -> float:
    """Return the last modification time of a file or of a directory's entries; the current time if it is gone."""
    times = []
    with contextlib.suppress(OSError):
        times.append(path.lstat().st_mtime)
        if path.is_dir() and not path.is_symlink():
            times += [entry.lstat().st_mtime for entry in path.iterdir()]
    return max(times, default=time.time())


def _first_cause(error: BaseException) -> str:
    """Describe the first error in the chain. After a full disk, torch's writer raises an error of its own."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    first = next((entry for entry in reversed(chain) if isinstance(entry, OSError)), chain[-1])
    return f"{type(first).__name__}: {first}"
