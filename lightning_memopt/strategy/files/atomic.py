"""Replacing a file or a directory in one step: a killed process leaves the old or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_memopt.strategy.files.checksums import RecordingStream

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel or the file system (NFS, for one) cannot exchange two names.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
# What a rename onto, or away from, a name says that another process has just changed.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
_SAVING, _PREVIOUS = "saving", "previous"
# A save of a process that cannot be asked, on another machine, is taken for dead after this time, in seconds.
MAX_AGE = 24 * 3600.0
_TRIES = 100

_active: set[Path] = set()


def begin(path: Path) -> Path:
    """Clear what dead processes have left, and return a name beside ``path`` to write to that no other save has.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):  # another process has just done it
            os.rename(current(path), path)
    for left in _leftovers(path):
        with contextlib.suppress(OSError):  # another process is removing it, too
            remove(left)
    new = _own_name(path, _SAVING)
    _active.add(new)
    return new


def commit(new: Path, path: Path) -> None:
    """Put what was written to ``new``, from :func:`begin`, in the place of ``path``, whatever is there.

    Every file must have been synced already. What was there before is removed afterwards.

    Raises:
        OSError: If a name cannot be changed; ``path`` holds what it held then.
    """
    if new.is_dir():
        sync_folder(new)
    old = _put(new, path)
    sync_folder(path.parent)
    _active.discard(new)
    with contextlib.suppress(OSError):  # the save is complete: what cannot be removed now, the next one removes
        remove(old)


def abandon(new: Path) -> None:
    """Remove what was written, after an error; the name that it was meant for holds what it held before."""
    _active.discard(new)
    with contextlib.suppress(OSError):
        remove(new)


def current(path: Path) -> Path:
    """Return where the content of ``path`` is: between two renames, or where a process was killed there, elsewhere."""
    if os.path.lexists(path):
        return path
    waiting = [entry for entry, kind, _, _ in _hidden(path) if kind == _PREVIOUS]
    return max(waiting, key=_age_key, default=path)


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace ``path`` by what ``write`` writes into the stream it is given.

    Raises:
        OSError: If it cannot be written; ``path`` holds what it held then.
    """
    new = begin(path)
    try:
        write_synced(new, write)
        commit(new, path)
    except Exception as error:
        raise OSError(
            f"Saving {str(path)!r} failed: {_first_cause(error)}. What was saved under this name before is unchanged."
        ) from error
    finally:
        if new in _active:
            abandon(new)


def write_synced(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as raw, RecordingStream(raw) as stream:
        write(stream)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())


def discard(path: Path) -> None:
    """Remove a file or a directory of any size; its name is gone at once.

    Raises:
        OSError: If it cannot be removed.
    """
    if not os.path.lexists(path):
        return
    name = _own_name(path, _SAVING)
    os.rename(path, name)
    remove(name)


def remove(path: Path | None) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path is None:
        return
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


def _put(new: Path, path: Path) -> Path | None:
    """Let ``path`` be what ``new`` is, and return the name that the old content has now, if it has one.

    Another process may be putting its own save there: whoever comes last stays, and both are whole.
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
                with contextlib.suppress(OSError):  # nothing was moved away, or another save is there by now
                    os.rename(previous, path)
            if error.errno not in _TAKEN or not os.path.lexists(new):
                raise
    raise OSError(errno.EBUSY, "other processes keep saving under this name", str(path))


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


# ---------------------------------------------------------------------- hidden names: whose they are, which are left


def _own_name(path: Path, kind: str) -> Path:
    """Return a hidden name beside ``path`` that tells who made it and that nobody else makes."""
    return path.with_name(f".{path.name}.{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _hidden(path: Path) -> Iterator[tuple[Path, str, str, int]]:
    """Yield the hidden names of saves to ``path`` with kind, machine and process; names of older versions have none."""
    form = re.compile(rf"\.{re.escape(path.name)}\.({_SAVING}|{_PREVIOUS})(?:-([0-9a-f]+)-(\d+)-[0-9a-f]+)?")
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            if match := form.fullmatch(entry.name):
                yield path.with_name(entry.name), match[1], match[2] or "", int(match[3] or 0)


def _leftovers(path: Path) -> list[Path]:
    """Return the names that nobody will come back to: of processes that are gone, or too old."""
    now = time.time()
    return [
        entry
        for entry, _, machine, process in _hidden(path)
        if entry not in _active
        and (
            machine == _machine()
            and (process == os.getpid() or not _is_alive(process))
            or now - _age_key(entry) > MAX_AGE
        )
    ]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and somebody else's
        return True
    return True


def _age_key(path: Path) -> float:
    """Return when a file, or anything in a directory, was last written to; now, if it is gone."""
    times = []
    with contextlib.suppress(OSError):
        times.append(path.lstat().st_mtime)
        if path.is_dir() and not path.is_symlink():
            times += [entry.lstat().st_mtime for entry in path.iterdir()]
    return max(times, default=time.time())


@functools.cache
def _machine() -> str:
    """Return what two processes share that see each other's process numbers: host, boot and container."""
    facts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):  # not Linux
            facts.append(read())
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def _first_cause(error: BaseException) -> str:
    """Describe where it began: torch's writer follows a full disk with an error of its own."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    first = next((entry for entry in reversed(chain) if isinstance(entry, OSError)), chain[-1])
    return f"{type(first).__name__}: {first}"
