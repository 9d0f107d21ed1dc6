"""Checkpoint directories on file systems that cannot rename, such as object stores.

Every save has a folder of its own inside the checkpoint::

    last.ckpt/
      meta.pt                     names the folder of the current save; written last, as one object
      save-<machine>-<process>-<time>-<number>/
        .metadata  __0_0.distcp ...

So a reader sees the old or the new save, and a save that is killed leaves no more than a folder that nothing names.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickletools
import secrets
import time
import zipfile
from typing import Any

from lightning_memopt.strategy.files.atomic import MAX_AGE
from lightning_memopt.strategy.files.directory import INDEX, NOTE, REST, SAVE, SHARDS
from lightning_memopt.strategy.files.processes import is_alive, machine

PARTS = "lightning_memopt_parts"  # key in `meta.pt`: the folder of the save

_active: set[str] = set()


def connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path on it, with nothing remembered of what it held.

    Raises:
        ImportError: If the file system needs a library that is missing.
        ValueError: If the protocol is unknown.
    """
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url)
    fs.invalidate_cache()
    return fs, path.rstrip("/")


def version(url: str) -> str | None:
    """Return a text that changes when a checkpoint is replaced; None if there is none."""
    fs, path = connect(url)
    for name in (f"{path}/{REST}", path):
        with contextlib.suppress(FileNotFoundError):
            return str(fs.info(name))
    return None


def check_replaceable(url: str) -> None:
    """Refuse to save a directory where something else is.

    Raises:
        FileExistsError: If there is a file under the name.
        IsADirectoryError: If there are other files, and no checkpoint.
    """
    fs, path = connect(url)
    if fs.isfile(path):
        raise FileExistsError(
            f"The checkpoint path {url!r} is a file, and a checkpoint directory cannot replace it: remove it, or save "
            "under another name."
        )
    names = _names(fs, path)
    ours = [name for name in names if name in (INDEX, REST, NOTE) or SHARDS.fullmatch(name) or SAVE.fullmatch(name)]
    if REST not in names and len(ours) < len(names):
        raise IsADirectoryError(
            f"The checkpoint path exists and is a directory: {url!r}. It holds files other than a checkpoint; save "
            "under another name."
        )


def begin(url: str) -> str:
    """Remove what dead processes have left, and return a unique folder inside ``url`` to write to."""
    fs, path = connect(url)
    # In this order: a save that becomes current meanwhile was alive, and what is current now is kept.
    left = [name for name in _names(fs, path) if _is_abandoned(path, name)]
    with contextlib.suppress(Exception):  # any folder may be the current one if `meta.pt` cannot be read
        kept = current(fs, path) if left else None
        for name in left:
            if name != kept:
                _remove(fs, f"{path}/{name}")
    name = f"save-{machine()}-{os.getpid()}-{int(time.time())}-{secrets.token_hex(4)}"
    _active.add(f"{path}/{name}")
    return f"{url.rstrip('/')}/{name}"


def commit(new: str, url: str, rest: bytes, note: bytes) -> None:
    """Make ``new``, which :func:`begin` returned, the current save, and remove the one before.

    Args:
        new: The folder of the save, complete.
        url: The checkpoint.
        rest: The content of ``meta.pt``, which names ``new``.
        note: The content of the note for readers.
    """
    fs, path = connect(url)
    before = None
    with contextlib.suppress(Exception):  # damaged, and replaced now: the next save removes its folder
        before = current(fs, path)
    fs.pipe_file(f"{path}/{NOTE}", note)
    fs.pipe_file(f"{path}/{REST}", rest)
    _active.discard(connect(new)[1])
    if before is not None:
        _remove(fs, f"{path}/{before}")
    for name in _names(fs, path) if before is None else ():  # copied from a local file system
        if name == INDEX or SHARDS.fullmatch(name):
            _remove(fs, f"{path}/{name}")


def abandon(new: str) -> None:
    """Remove what was written, after an error; nothing after a commit."""
    fs, path = connect(new)
    if path in _active:
        _active.discard(path)
        checkpoint, _, name = path.rpartition("/")
        # The error may have come after the store had taken `meta.pt`: a request that timed out, or Ctrl-C.
        with contextlib.suppress(Exception):
            if current(fs, checkpoint) != name:
                _remove(fs, path)


def discard(url: str) -> None:
    """Remove a checkpoint, a directory or a file. It is none any more as soon as the first object is gone."""
    fs, path = connect(url)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fs.rm_file(f"{path}/{REST}")
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def current(fs: Any, path: str) -> str | None:
    """Return the folder of the current save; None if there is none.

    Nothing is unpickled: ``meta.pt`` may hold objects that only its user trusts.

    Raises:
        Exception: If ``meta.pt`` cannot be read. Then nothing is known of the folders.
    """
    try:
        content = fs.cat_file(f"{path}/{REST}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    texts = [argument for opcode, argument, _ in pickletools.genops(pickled) if "UNICODE" in opcode.name]
    found = [value for key, value in itertools.pairwise(texts) if key == PARTS and SAVE.fullmatch(str(value))]
    return str(found[-1]) if found else None


def _is_abandoned(path: str, name: str) -> bool:
    match = SAVE.fullmatch(name)
    if match is None or f"{path}/{name}" in _active:
        return False
    process = int(match[2])
    dead = match[1] == machine() and (process == os.getpid() or not is_alive(process))
    return dead or time.time() - int(match[3]) > MAX_AGE


def _names(fs: Any, path: str) -> list[str]:
    fs.invalidate_cache()
    try:
        return [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(fs: Any, path: str) -> None:
    with contextlib.suppress(OSError):  # another process removes it at the same time, or the next save does
        fs.rm(path, recursive=True)
