"""Tables on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any

# Width for a file or a pipe, which has none: nobody looks for a row in two lines. COLUMNS sets another.
WIDTH = 160


def console() -> Any:
    """Return a console for standard output.

    Raises:
        ImportError: If rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('Tables need rich: pip install "lightning-memopt[cli]".') from error

    own = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if own else WIDTH, highlight=False, emoji=False)


def table(
    columns: Sequence[str],
    *,
    numbers: Container[str],
    breaks: Mapping[str, str] | None = None,
) -> Any:
    """Return an empty table.

    Args:
        columns: Headers.
        numbers: The columns that are aligned to the right.
        breaks: Headers with line breaks, which keep a table narrow.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for column in columns:
        # A narrow terminal folds text and truncates nothing.
        justify: Any = "right" if column in numbers else "left"
        made.add_column((breaks or {}).get(column, column), justify=justify, overflow="fold")
    return made
