"""The folders in which the classes of a config are searched, besides the installed packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# What marks the top folder of a project.
MARKERS = ("pyproject.toml", "setup.py", "setup.cfg", ".git")
OPTIONS = ("-c", "--config")


def search_folders_of(args: Sequence[str]) -> None:
    """Make modules importable that lie beside the configs of a command line, or above them in the same project.

    The folders are searched after all others, so nothing in them replaces an installed package.
    """
    for folder in folders_of(args):
        if folder not in sys.path:
            sys.path.append(folder)


def folders_of(args: Sequence[str]) -> list[str]:
    """Return the folder of every config that is a local file, and the folders above it in the same project."""
    return list(dict.fromkeys(str(folder) for file in _configs(args) for folder in _project(Path(file))))


def own_folders() -> list[str]:
    """Return the folders that are searched and hold no installed packages. An empty one is the working directory."""
    library = sysconfig.get_path("stdlib")
    others = [folder or os.getcwd() for folder in sys.path if not folder.startswith(library)]
    return [folder for folder in dict.fromkeys(others) if os.path.isdir(folder) and not folder.endswith("-packages")]


def _configs(args: Sequence[str]) -> Iterator[str]:
    for position, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in OPTIONS and equals:
            yield value
        elif option in OPTIONS and position + 1 < len(args):
            yield args[position + 1]


def _project(file: Path) -> list[Path]:
    """Return the folders from a file up to the top of its project, or its own folder if there is no such top."""
    if not os.path.isfile(file):  # nor does this fail on a config that is given as text
        return []
    folders = list(file.resolve().parents)
    for count, folder in enumerate(folders, start=1):
        if any((folder / marker).exists() for marker in MARKERS):
            return folders[:count]
    return folders[:1]
