"""Tables from names to implementations. Their errors name the bad value and list what exists."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def unknown(what: str, name: object, known: list[str]) -> str:
    """Return the message for a name that is not in ``known``, with the closest one suggested."""
    return f"Unknown {what} {name!r}.{nearest(name, known)} Available: {listed(known, 30)}."


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a sentence that suggests the closest name in ``known``, or nothing if none is close."""
    plain = {_plain(each): each for each in known}
    close = difflib.get_close_matches(_plain(str(name)), list(plain), n=1)
    return f" Did you mean {plain[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    """Return a name without what classes, options and recipes spell differently, as in ``AdaPMLean``."""
    return name.lower().replace("_", "").replace("-", "")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Registry(Generic[T]):
    """A table of named entries of one sort.

    Args:
        what: What an entry is, in the singular; used in error messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under ``name``.

        Raises:
            ValueError: If the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"The {self.what} {name!r} is registered already; choose another name.")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry registered under ``name``.

        Raises:
            ValueError: If no entry has this name. The message lists the names that exist.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise ValueError(unknown(self.what, name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, in the order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
