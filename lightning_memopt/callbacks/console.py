"""Print lines for the user, from one process, and warn of reports that cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn


@rank_zero_only
def say(text: str) -> None:
    """Print a line, in color if rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(text)
    else:
        Console().print(text, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def warn_on_failed_write(callback: object, folder: Path) -> Iterator[None]:
    """Warn if a report cannot be written, for example to a full disk. This must not stop training, or hide an error."""
    try:
        yield
    except Exception as error:  # of any type: loggers have their own
        rank_zero_warn(
            f"{type(callback).__name__} could not write its report to {str(folder)!r} "
            f"({type(error).__name__}: {error})."
        )
