"""The text files of a folder, divided into training and validation, and where what is made from them is cached."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}


class Texts:
    """The text files of a folder, divided into training and validation.

    A hash of a file's relative path decides whether the file belongs to validation. So the split is the same on every
    machine, and no file changes sides when others are added or removed. Files are read when they are asked for.

    Args:
        root: A folder, searched with its subfolders.
        pattern: Files to read, as in ``Path.glob``. Hidden files and installed packages are left out.
        val_fraction: Share of the files used for validation, between 0 and 1.
        max_chars: Maximum number of characters to read, chosen by the same hash; None reads everything.

    Raises:
        NotADirectoryError: If ``root`` is not a folder.
        FileNotFoundError: If fewer than two text files match.
    """

    def __init__(self, root: Path, pattern: str, val_fraction: float, max_chars: int | None) -> None:
        if not root.is_dir():
            raise NotADirectoryError(f"`root` must be a folder of text files, but {str(root)!r} is not a folder.")
        self.root = root
        self._limits = {
            split: None if max_chars is None else max(1, int(share * max_chars))
            for split, share in (("train", 1 - val_fraction), ("val", val_fraction))
        }
        names = {path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file()}
        # The last bytes of the hash decide the order, because the first ones decide the side: a cap favors neither.
        order = sorted(filter(_is_wanted, names), key=lambda name: _hash(name)[::-1])
        self.files: dict[str, list[Path]] = {"train": [], "val": []}
        for name in order:
            self.files["val" if is_held_out(name, val_fraction) else "train"].append(root / name)
        self._fill_the_empty_side()
        if not all(any(True for _ in self.read(split)) for split in self.files):
            raise FileNotFoundError(
                f"Splitting by file needs at least two non-empty text files; {str(root)!r} has {len(order):,} files "
                f"that match {pattern!r}, of which {sum(not _read(root / name) for name in order):,} are empty "
                "or not UTF-8 text. Give another folder or `pattern`, or split the text into several files."
            )

    def read(self, split: str) -> Iterator[str]:
        """Yield the texts of ``"train"`` or ``"val"``, until its share of ``max_chars`` is used up."""
        left = self._limits[split]
        for path in self.files[split]:
            if left is not None and left <= 0:
                return
            text = _read(path)
            if text:
                yield text if left is None else text[:left]
                left = None if left is None else left - len(text)

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the list of files, their sizes or times, or the cap."""
        found = [
            (split, path.relative_to(self.root).as_posix(), (stat := path.stat()).st_size, stat.st_mtime_ns)
            for split, paths in self.files.items()
            for path in paths
        ]
        return hashlib.sha256(repr((str(self.root.resolve()), found, self._limits)).encode()).hexdigest()

    def _fill_the_empty_side(self) -> None:
        """By chance, all text of a few files may be on one side: then move the last file of the other."""
        for empty, other in (("val", "train"), ("train", "val")):
            if not any(True for _ in self.read(empty)):
                full = [path for path in self.files[other] if _read(path)]
                if len(full) > 1:
                    self.files[other].remove(full[-1])
                    self.files[empty].append(full[-1])


def source_folder(root: str | None) -> Path:
    """Return the given folder, or that of Python's standard library."""
    return Path(root or sysconfig.get_paths()["stdlib"]).expanduser()


def check_shares(val_fraction: float, max_chars: int | None = None) -> None:
    """Check the settings that divide files.

    Raises:
        ValueError: If a setting is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` must be between 0 and 1, got {val_fraction}.")
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"`max_chars` must be positive or null, got {max_chars}.")


def is_held_out(name: str, val_fraction: float) -> bool:
    """Return whether a file is for validation; only its path below the root decides."""
    return int.from_bytes(_hash(name)[:4], "big") < val_fraction * 2**32


def cache_folder(given: str | None) -> Path:
    """Return the given folder for what is made from the texts, or ``lightning_memopt`` where caches are."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{cache}/lightning_memopt").expanduser()


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _is_wanted(name: str) -> bool:
    parts = [part for part in name.split("/") if part != ".."]
    return not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in parts)


def _read(path: Path) -> str | None:
    """Return the text of a file, or None if it is not UTF-8 text."""
    try:
        text = path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text
