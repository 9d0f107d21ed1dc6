"""The files of a checkpoint directory, as opposed to other files in it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from pathlib import Path

INDEX = ".metadata"  # torch's: keys, shapes, and the file that holds each
REST = "meta.pt"  # Lightning's: everything but weights and optimizer states
CHECKSUMS = "lightning_memopt_checksums"  # key in `meta.pt`: size and CRC-32 of all other files
SAMPLED = "lightning_memopt_files"  # the key of earlier versions: checksums of samples
NOTE = "HOW_TO_READ_THIS.txt"  # for whoever finds the folder; nothing reads it
SHARDS = re.compile(r"__\d+_\d+\.distcp")
SAVE = re.compile(r"save-([0-9a-f]+)-(\d+)-(\d+)-[0-9a-f]+")  # of a save to a URL: machine, process, time, number
_OURS = re.compile(rf"meta\.pt|\.metadata(\.tmp)?|{re.escape(NOTE)}|{SHARDS.pattern}|{SAVE.pattern}")


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a distributed checkpoint, complete or not."""
    return (path / INDEX).is_file() or (path / REST).is_file()


def explanation(path: str) -> str:
    """Return what a checkpoint directory is, and what turns it into what others read."""
    command = f"lightning-memopt {{}} {shlex.quote(path)}"
    return (
        f"{path!r} is one checkpoint, and a folder: the strategy memopt_fsdp saved it, with a file per rank. "
        "torch.load and load_from_checkpoint read files. Trainer(strategy='memopt_fsdp') continues from the folder.\n"
        f"  the weights:         {command.format('export')} weights.safetensors\n"
        f"  one file, all of it: {command.format('export')} one.ckpt --optimizer\n"
        f"  what is in it:       {command.format('inspect')}"
    )


def check_replaceable(path: Path) -> None:
    """Refuse to replace a directory that holds something else.

    Raises:
        IsADirectoryError: If it is neither empty nor a checkpoint.
    """
    # One listing: another process may move the directory away, and another one to its place, between two looks at it.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        files = {entry.name: entry.is_file() for entry in entries}
        if files.get(INDEX) or files.get(REST) or all(map(_OURS.fullmatch, files)):
            return
        raise IsADirectoryError(
            f"The checkpoint path exists and is a directory: {str(path)!r}. It holds files other than a checkpoint, "
            "which saving would delete; save under another name."
        )


def copy_others(old: Path, new: Path) -> None:
    """Copy other files in a checkpoint directory, such as a tokenizer, to the directory that replaces it."""
    if old.is_symlink() or not old.is_dir():
        return
    for entry in old.iterdir():
        if _OURS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)
