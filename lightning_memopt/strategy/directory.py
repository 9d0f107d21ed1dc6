"""What a checkpoint directory holds, and whether all of it belongs to one save."""

from __future__ import annotations

import pickle
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata

from lightning_memopt.strategy.reading import read_torch_file

INDEX = ".metadata"  # torch's: keys, shapes, and which rank's file holds them
REST = "meta.pt"  # Lightning's: everything but weights and optimizer states
PRINTS = "lightning_memopt_files"  # key in `meta.pt`: size and fingerprint of all other files
_OURS = re.compile(r"meta\.pt|.*\.metadata(\.tmp)?|.*\.distcp")
_WINDOW, _SMALL, _SAMPLES = 65536, 4096, 30

Print = tuple[int, int]


@dataclass(frozen=True)
class Contents:
    """What a complete directory says of itself.

    Attributes:
        index: Torch's metadata: keys, shapes and dtypes.
        rest: The checkpoint without weights and optimizer states.
    """

    index: Metadata
    rest: dict[str, Any]


def fingerprint(path: Path) -> Print:
    """Return the size of a file and a checksum of its ends and of small samples between them."""
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as stream:
        for start, length in _windows(size):
            stream.seek(start)
            checksum = zlib.crc32(stream.read(length), checksum)
    return size, checksum


def _windows(size: int) -> list[tuple[int, int]]:
    if size <= 2 * _WINDOW + _SAMPLES * _SMALL:
        return [(0, size)]
    step = (size - 2 * _WINDOW) // _SAMPLES
    samples = [(_WINDOW + position * step, _SMALL) for position in range(_SAMPLES)]
    return [(0, _WINDOW), *samples, (size - _WINDOW, _WINDOW)]


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a distributed checkpoint, complete or not."""
    return (path / INDEX).is_file() or (path / REST).is_file()


def check_replaceable(path: Path) -> None:
    """Refuse to replace a directory that holds something else.

    Raises:
        IsADirectoryError: If it is neither empty nor a checkpoint.
    """
    if path.is_dir() and not is_checkpoint(path) and any(not _OURS.fullmatch(entry.name) for entry in path.iterdir()):
        raise IsADirectoryError(
            f"The checkpoint path exists and is a directory: {str(path)!r}. It holds no checkpoint but other files, "
            "which would be lost; save under another name."
        )


def copy_others(old: Path, new: Path) -> None:
    """Copy what somebody has put beside the checkpoint, such as a tokenizer, into the directory that replaces it."""
    if old.is_symlink() or not old.is_dir():
        return
    for entry in old.iterdir():
        if _OURS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def inspect(path: Path, *, share: tuple[int, int] = (0, 1), weights_only: bool | None = None) -> Contents:
    """Return what a directory holds, after checking that it is complete and from one save.

    Args:
        path: The directory.
        share: Rank and number of the ranks that divide the reading of fingerprints among them.
        weights_only: As for ``torch.load``.

    Raises:
        ValueError: If a file is missing, truncated, from another save or unreadable; the message names it.
    """
    for name in (INDEX, REST):
        if not (path / name).is_file():
            raise ValueError(
                f"The path {str(path)!r} does not point to a valid checkpoint: {name!r} is missing. Either a save was "
                "interrupted, or a part of the directory was copied."
            )
    rest = read_torch_file(path / REST, weights_only=weights_only)
    prints: Mapping[str, Print] = rest.pop(PRINTS, {})
    rank, size = share
    for position, (name, expected) in enumerate(sorted(prints.items())):
        _check_size(path, name, expected[0])
        if position % size == rank and fingerprint(path / name) != tuple(expected):
            raise _mixed(path, name, f"its content is not what was saved together with {REST!r}")
    index = _read_index(path)
    ends = _ends(index)
    for name, end in ends.items():
        _check_size(path, name, end)
    for file in sorted(path.glob("*.distcp")):
        known = file.name in prints or file.name in ends
        if not known and file.stat().st_size:  # torch writes an empty file where a rank has nothing to save
            raise _mixed(path, file.name, f"{INDEX!r} does not know it. Remove it if the others are the ones you want")
    return Contents(index, rest)


def _read_index(path: Path) -> Metadata:
    try:
        index = FileSystemReader(path).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise ValueError(
            f"{str(path / INDEX)!r} is truncated or damaged: {type(error).__name__}: {error}. Use another checkpoint."
        ) from error
    if not isinstance(index, Metadata) or index.planner_data is None or index.storage_data is None:
        raise ValueError(
            f"{str(path / INDEX)!r} does not tell where weights and optimizer states are: it was not written by "
            "torch.distributed.checkpoint with its default planner."
        )
    return index


def _ends(index: Metadata) -> dict[str, int]:
    """Return the size that every rank's file must have."""
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def _check_size(path: Path, name: str, expected: int) -> None:
    if not (path / name).is_file():
        raise ValueError(
            f"The checkpoint {str(path)!r} is not complete: {name!r} is missing. All ranks must save to, and load "
            "from, a file system that they share; otherwise use another checkpoint."
        )
    size = (path / name).stat().st_size
    if size < expected:
        raise ValueError(
            f"The checkpoint {str(path)!r} is not complete: {name!r} is truncated or from another save, it has {size} "
            f"of {expected} bytes. Use another checkpoint."
        )
    if size > expected:
        raise _mixed(path, name, f"it has {size} bytes, {expected} were saved")


def _mixed(path: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"The checkpoint {str(path)!r} mixes files of different saves: {name!r} is from another one ({why}). "
        "Use another checkpoint."
    )
