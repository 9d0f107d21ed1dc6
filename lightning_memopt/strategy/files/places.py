"""Where a checkpoint is: a local path, or a URL of another file system."""

from __future__ import annotations

from pathlib import Path

Place = Path | str
_LOCAL = ("file://", "local://")


def place_of(path: str | Path) -> Place:
    """Return a local path, or the URL on a file system that fsspec knows."""
    text = str(path)
    for protocol in _LOCAL:
        if text.startswith(protocol):
            return Path(text.removeprefix(protocol))
    return text if "://" in text else Path(text)


def inside(place: Place, name: str) -> Place:
    """Return the place of a name in a folder."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def is_web(place: Place) -> bool:
    """Return whether Lightning downloads the file: nothing can be saved there, and it has no directories."""
    return isinstance(place, str) and place.startswith(("http://", "https://"))
