"""Texts that repeat other texts: a model that was trained on one knows the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LONG = 20  # characters of a line that two texts do not share by chance


def without_copies(texts: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Yield the texts of which at most half of the long lines are lines of ``others``, which are read first."""
    known = {hash(line) for other in others for line in long_lines(other)}
    for text in texts:
        lines = long_lines(text)
        if 2 * sum(hash(line) in known for line in lines) <= len(lines):
            yield text


def long_lines(text: str) -> list[str]:
    """Return the lines of a text that say enough to be compared, without indentation."""
    return [stripped for line in text.splitlines() if len(stripped := line.strip()) >= LONG]
