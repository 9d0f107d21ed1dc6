"""Tables of benchmarks/gpu.py, printed row by row and written after each section, even if a section fails."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from _report import markdown


class Table:
    """A markdown table that grows row by row; a failed row holds its error instead of numbers."""

    def __init__(self, title: str, head: Sequence[str]) -> None:
        self.title, self.head = title, list(head)
        self.rows: list[list[str]] = []

    def add(self, *cells: str) -> None:
        """Add a row, padded to the width of the table, and print it."""
        self.rows.append([*cells, *[""] * (len(self.head) - len(cells))])
        print("  " + " | ".join(cells), flush=True)

    @contextmanager
    def attempt(self, *names: str) -> Iterator[None]:
        """Print an exception raised inside and add it as a row under these names."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0].replace("|", "/")
            self.add(*names, f"{type(error).__name__}: {first[:90]}")

    def text(self) -> str:
        """Return title and table as markdown."""
        return f"## {self.title}\n\n{markdown(self.head, self.rows)}"


class Report:
    """The results of a run, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Table | str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def table(self, title: str, head: Sequence[str]) -> Table:
        """Start a table."""
        table = Table(title, head)
        self.parts.append(table)
        return table

    def line(self, text: str) -> None:
        """Add a line of text."""
        self.parts.append(text)
        print("  " + text, flush=True)

    def text(self) -> str:
        """Return the page so far."""
        return "\n\n".join(part if isinstance(part, str) else part.text() for part in self.parts) + "\n"

    def write(self) -> None:
        """Write the page so far."""
        (self.folder / "gpu_tables.md").write_text(self.text())
